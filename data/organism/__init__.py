"""The model organism: a grammar of reasoning whose truth is known, and the small models trained on it."""
