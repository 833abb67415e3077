"""Recipes in vLLM: their hooks travel as the source of the same modules that edit hidden states here."""
