"""The data that the toolkit works on: problems, traces and their parts, answers, and the store that keeps traces with
activations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
