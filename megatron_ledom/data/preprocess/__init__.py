"""Preprocessing: texts to a shard, in parts that survive a kill."""
