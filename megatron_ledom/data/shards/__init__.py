"""The files of a shard: writing, reading, checking, joining and turning them."""
