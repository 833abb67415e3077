"""Traces and activations in, results with their controls out: tokens, sentences, heads, and whole traces."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
