"""Attention: sentence attention, receiver heads, head profiles and attention maps."""
