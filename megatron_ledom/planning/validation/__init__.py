"""The planner beside published runs."""
