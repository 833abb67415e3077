"""The hooks that a careful researcher writes by hand; also the reference whose tokens and activations the others have to equal."""

from contextlib import ExitStack, contextmanager

import torch

from tools.bare import greedy, load

__all__ = ["WORKLOADS", "load"]


@contextmanager
def reading(model):
    parts = [[] for _ in model.model.layers]

    def hook(kept):
        return lambda module, args, output: kept.append(output if isinstance(output, torch.Tensor) else output[0])

    with ExitStack() as stack:
        for layer, kept in zip(model.model.layers, parts, strict=True):
            stack.callback(layer.register_forward_hook(hook(kept)).remove)
        yield parts


@contextmanager
def adding(model, job, where):
    """Adds the vector after the middle block, in the columns that `where` (first pass?) allows."""
    vector, first = torch.from_numpy(job.vector), [True]

    def hook(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        begins, first[0] = first[0], False
        if not where(begins):
            return None
        after = hidden + vector
        return after if isinstance(output, torch.Tensor) else (after, *output[1:])

    handle = model.model.layers[job.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def prefill(model, job):
    with reading(model) as parts, torch.no_grad():
        model(job.ids, attention_mask=job.mask, use_cache=False)
    return {"activations": [part[0] for part in parts]}


def generate(model, job):
    with reading(model) as parts:
        tokens = greedy(model, job)
    return {"tokens": tokens, "activations": [torch.cat(part, dim=1) for part in parts]}


def steer(model, job):
    with adding(model, job, lambda begins: True):
        return {"tokens": greedy(model, job)}


def steer_generated(model, job):
    with adding(model, job, lambda begins: not begins):
        return {"tokens": greedy(model, job)}


WORKLOADS = {"W1": prefill, "W2": generate, "W4": steer, "W5": steer_generated, "W6": generate}
