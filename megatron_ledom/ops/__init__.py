"""Fused operators, one file each: the PyTorch reference, and the choice between it and the kernels of csrc/."""
