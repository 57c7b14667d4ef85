"""Read the answer from a text, and decide if it is right."""
