"""What flows through the toolkit: problems, traces and their parts, answers, and the store that holds them with their activations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
