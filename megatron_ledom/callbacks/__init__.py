"""The callbacks of training: what a run does beside its steps. `build.py` composes the list, `training/callback.py` has the moments.

docs/python_api.md says how to add one to a run; one for every run is appended in `build.py`.
"""
