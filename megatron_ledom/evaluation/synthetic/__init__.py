"""Synthetic sets that show effects of the direction: training text in text order, and questions about it.

Each generator is a function of a number and a seed; `ledom make-analysis-data` writes its result. All names in the
texts are invented, so no model has seen them elsewhere. Every question has one right answer. The wrong answers are of
the same kind, appear in the same training text, and are among the choices equally often, so a model that knows nothing
scores at chance. Each generator's docstring says which parts of a question are in the training text. Nothing here
imports torch.
"""
