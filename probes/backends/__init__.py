"""The engines that run a model: each reads and writes the same sites by the same call."""
