"""Traces and activations in, results out; results to figures."""
