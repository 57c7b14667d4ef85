"""Reading a corpus: the input files, their division into byte ranges, and a reader for each format."""
