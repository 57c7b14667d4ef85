"""Comparison of the planner with published runs."""
