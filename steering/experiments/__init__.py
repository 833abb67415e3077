"""Controlled experiments: dose responses, ablations, attention knockout and side effects."""
