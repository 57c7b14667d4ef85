"""Write, read, check, join and reverse the files of shards."""
