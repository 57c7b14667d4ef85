"""Process groups of a run, how its ranks meet, and what they do together."""
