"""Copies of a run's checkpoints at another address (`checkpoint.mirror`), from which a run continues on an empty machine."""
