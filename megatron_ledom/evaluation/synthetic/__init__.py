"""Synthetic sets that show effects of the direction: training text in text order, and questions about it.

Each generator is a function of a number and a seed; `ledom make-analysis-data` writes its result. The names of
the facts, worlds and labels are invented, so no model has seen them elsewhere. Every multiple-choice question has one
right answer. The wrong answers are of the same kind, and are as frequent in the training text and among the choices, so
a model that knows nothing scores at chance. Each generator's docstring says which parts of a question are in the
training text. Nothing here imports torch.
"""
