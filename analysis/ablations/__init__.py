"""Ablation and patching of a run: plans that keep their results, resume, and are drawn."""
