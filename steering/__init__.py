"""What writes to a model: steering vectors, where they apply, decoding methods, and experiments that measure what they do."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
