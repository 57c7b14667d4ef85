"""Tasks: where their files are, how a prompt is made of a row; benchmarks.py has the table of those that are known."""
