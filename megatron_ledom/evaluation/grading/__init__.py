"""Read the answer of a text, and decide if it is right."""
