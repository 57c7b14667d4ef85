"""Memory, time and cost of a run before it starts, and the text of a dry run."""
