"""Synthetic sets for what a reading direction decides: training text in reading order, and questions about it.

Each generator is a function of a number and a seed; `ledom make-analysis-data` writes what it returns. Everything named in the
texts is invented, so that no model knows it from elsewhere. Every question has one right answer; wrong ones are of the same kind, known
from the same training text, and stand as often among the choices, so that who knows nothing gets what chance gives. What of a
question's text may have been trained on is said by its generator. Nothing here imports torch.
"""
