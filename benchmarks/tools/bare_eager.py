"""transformers alone with eager attention, which TransformerLens always uses: its row for a fair comparison."""

from tools.bare import WORKLOADS
from tools.bare import load as load_bare

__all__ = ["WORKLOADS", "load"]


def load(folder):
    return load_bare(folder, "eager")
