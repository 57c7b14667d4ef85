"""Blends of shards: the shards that a run reads, how often, and in which order."""
