"""Analyses of traces and activations, with their controls: tokens, sentences, heads, and whole traces."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
