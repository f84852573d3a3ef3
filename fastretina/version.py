"""The version of the program, which packed files and checkpoints note."""

__version__ = "0.2.0"
