"""TransformerLens 4: `TransformerBridge`, eager attention (it has no other). https://transformerlensorg.github.io/TransformerLens/"""

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tools.bare import load as load_bare


def load(folder):
    hf = load_bare(folder, "eager")
    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)


def names(bridge):
    return [f"blocks.{layer}.hook_out" for layer in range(bridge.cfg.n_layers)]


def prefill(bridge, job):
    with torch.no_grad():
        _, cache = bridge.run_with_cache(job.ids, names_filter=names(bridge))
    return {"activations": [cache[name] for name in names(bridge)]}


def _write(bridge, job, **how):
    return bridge.generate(
        job.ids,
        attention_mask=job.mask,
        max_new_tokens=job.new,
        do_sample=False,
        stop_at_eos=False,
        return_type="tokens",
        verbose=False,
        **how,
    )


def generate(bridge, job):
    with torch.no_grad():
        tokens, cache = _write(bridge, job, return_cache=True, names_filter=names(bridge))
    return {"tokens": tokens, "activations": [cache[name] for name in names(bridge)]}


def _steer(bridge, job, where):
    vector = torch.from_numpy(job.vector)

    def add(hidden, hook):
        return hidden + vector if where(hidden) else hidden

    with torch.no_grad(), bridge.hooks(fwd_hooks=[(f"blocks.{job.layer}.hook_out", add)]):
        return {"tokens": _write(bridge, job)}


def steer(bridge, job):
    return _steer(bridge, job, lambda hidden: True)


def steer_generated(bridge, job):
    return _steer(bridge, job, lambda hidden: hidden.shape[1] == 1)


WORKLOADS = {"W1": prefill, "W2": generate, "W4": steer, "W5": steer_generated, "W6": generate}
