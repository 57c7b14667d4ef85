"""The configuration of a run: its keys, how it is loaded, and the checks of it."""
