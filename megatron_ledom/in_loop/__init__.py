"""Evaluation inside the training loop: the tasks of `evaluation` on the model that `training` trains.

The only part that knows both. The loop is handed a function and knows nothing of tasks.
"""
