"""Analyses of single tokens: MI peaks, entropy, confidence, alternatives and forced answers."""
