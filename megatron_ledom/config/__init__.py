"""The configuration of a run: its keys, loading and checks."""
