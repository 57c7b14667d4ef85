"""The callbacks of training: everything that a run does apart from its steps. `training/callback.py` defines the moments.

docs/reference/python_api.md describes how to add a callback to one run; `build.py` makes the list of those that every run has.
"""
