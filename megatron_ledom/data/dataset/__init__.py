"""Samples of a blend, and batches of a rank."""
