"""The model organism: a grammar of reasoning that knows the truth, and the small models trained on it."""
