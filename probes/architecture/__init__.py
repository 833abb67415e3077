"""Where a model keeps its parts: sites, heads, and each family's layout."""
