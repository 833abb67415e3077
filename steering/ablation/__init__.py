"""Ablation: what is lost without heads, neurons, experts, directions, tokens or attention edges, beside random ones of the same size."""
