"""Changing a model: steering vectors and their scope, decoding methods, and experiments that measure their effects."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
