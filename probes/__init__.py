"""Reading a model: loading, sites, generation, recording, probes of four properties, and checks that the numbers are right."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
