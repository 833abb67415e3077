"""Published ways to find a steering vector, one per module, and the registry of their names."""
