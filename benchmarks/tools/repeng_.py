"""repeng 0.4 with an older transformers; it knows no positions. https://github.com/vgel/repeng"""

from repeng import ControlModel, ControlVector

from tools.bare import greedy
from tools.bare import load as load_bare

__all__ = ["WORKLOADS", "load"]


def load(folder):
    hf = load_bare(folder)
    return ControlModel(hf, [len(hf.model.layers) // 2])  # every layer named here needs a direction


def steer(model, job):
    model.set_control(ControlVector(model.model.config.model_type, {job.layer: job.vector}), 1.0)
    try:
        return {"tokens": greedy(model, job)}
    finally:
        model.reset()


WORKLOADS = {"W4": steer}
