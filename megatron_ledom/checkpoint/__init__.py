"""Checkpoints of a run: their folder, retention, manifest, writing and loading."""
