"""Fused operators, one per file, each with its PyTorch reference and the choice between it and a kernel of csrc/."""
