"""A corpus from a recipe: plan, fetch, build, blend, data card, publication."""
