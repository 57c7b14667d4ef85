"""Reading an answer out of a text, and deciding if it is right."""
