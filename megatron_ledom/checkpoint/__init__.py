"""Checkpoints of a run: their folder and which of them stay, the manifest, writing and loading."""
