"""Blends of shards: which shards are read, how often, and in which order."""
