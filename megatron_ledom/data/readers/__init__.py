"""Files of a corpus to texts: which files, who reads which bytes of them, and a reader for each format."""
