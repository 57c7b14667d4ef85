"""The samples of a blend, and the batches of a rank."""
