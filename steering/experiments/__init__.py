"""Controlled experiments: dose responses, decoding methods and side effects."""
