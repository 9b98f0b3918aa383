"""The built-in scorers, one file each."""
