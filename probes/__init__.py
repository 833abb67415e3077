"""Reading a model: loading, sites, generation, recording, probes of four properties and of any label, and checks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
