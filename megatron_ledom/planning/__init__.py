"""Memory, time and cost of a run before it starts, and what a dry run says."""
