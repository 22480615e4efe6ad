"""Commands, one file each; ``arguments.py`` is what they share."""
