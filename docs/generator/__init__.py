"""Writes the generated pages of the documentation: `python -m docs.generator`, see __main__.py."""
