"""Thought anchors: which sentences of the reasoning the answer depends on (arXiv 2506.19143)."""
