"""What changes when something is removed or rewritten: suppression, head ablation and edge attribution."""
