"""Tasks: their files and their prompts. `benchmarks.py` is the table of the published ones."""
