"""Steering vectors: their files, operators, token scopes, and how they are applied to a model."""
