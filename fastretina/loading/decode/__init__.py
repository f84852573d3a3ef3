"""From a sample's bytes to RGB pixels."""
