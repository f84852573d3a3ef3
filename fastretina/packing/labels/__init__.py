"""Layouts of label files, one module each, and what they share; `registry` lists them."""
