"""Causal analyses: what changes if something is removed or rewritten (suppression, head ablation, edge attribution)."""
