"""Outputs that survive a kill or a full disk: whole files and folders, locks against a second writer, JSON without NaN."""
