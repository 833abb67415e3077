"""Look inside reasoning models: capture, probe, steer and analyse what they think before they answer.

    import reasonscope as rs

    model = rs.load_model("Qwen/Qwen3-1.7B")
    store = rs.record(model, rs.load_problems("problems.jsonl"), "runs/mine", sites="resid_post.*")
    report = rs.probes.length(store)
    results = rs.analyse("entropy", "runs/mine")

Names are imported when they are first used, so that `import reasonscope` is fast and needs no torch.
"""

from importlib.metadata import version as _version

import lazy_loader as _lazy_loader

__version__ = _version("reasonscope")
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
