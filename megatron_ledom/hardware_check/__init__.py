"""Checks of a machine with GPUs: kernels, training layouts, checkpoints, conversion, scores and speed, in one report."""
