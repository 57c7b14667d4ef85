"""Tokenizer files: one reader for every command, and exact conversions to the tokenizer.json of the `tokenizers` library."""
