"""Infilling: a forward and a reverse model write the text between a prefix and a suffix."""
