"""Rows of attention, reduced as they come: here or inside vLLM, and never a matrix of tokens × tokens."""
