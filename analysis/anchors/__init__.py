"""Thought anchors: which sentences of a thinking its answer hangs on (arXiv 2506.19143)."""
