"""Texts to a shard, in parts that a killed run does not lose."""
