"""Judging models of both directions on the same tasks. Needs torch and transformers only."""
