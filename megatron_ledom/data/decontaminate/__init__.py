"""`ledom decontaminate`: search a corpus for evaluation items, and write it again without them."""
