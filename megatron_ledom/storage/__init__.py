"""Safe outputs: whole files and folders after a kill or a full disk, locks against a second writer, JSON without NaN."""
