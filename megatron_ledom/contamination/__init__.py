"""Search for the items of evaluation sets in training text, by n-grams of normalized words."""
