"""Recipes: everything that a steered run needs, in one object and one file."""
