"""nnsight 0.8: one trace with `tracer.cache(modules=…)`, edits in `tracer.iter`. https://nnsight.net/documentation/"""

import torch
from nnsight import TransformersModel
from transformers import PreTrainedTokenizerFast

from tools.bare import load as load_bare


def load(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return TransformersModel(load_bare(folder), tokenizer=tokenizer, device="cpu")


def modules(model):
    return [f"model.model.layers.{layer}" for layer in range(len(model.model.layers))]


def prefill(model, job):
    with torch.no_grad(), model.trace(input_ids=job.ids, attention_mask=job.mask, use_cache=False) as tracer:
        cache = tracer.cache(modules=modules(model))
    return {"activations": [cache[name].output for name in modules(model)]}


def generate(model, job):
    with torch.no_grad(), model.generate(**_given(job)) as tracer:
        cache = tracer.cache(modules=modules(model))
        tokens = tracer.result.save()
    return {"tokens": tokens, "activations": [torch.cat(cache[name].output, dim=1) for name in modules(model)]}


def _given(job):
    return {"input_ids": job.ids, "attention_mask": job.mask, "max_new_tokens": job.new, "do_sample": False}


def steer(model, job):
    vector, layer = torch.from_numpy(job.vector), job.layer
    with torch.no_grad(), model.generate(**_given(job)) as tracer:
        for _ in tracer.iter[: job.new]:
            model.model.layers[layer].output += vector
        tokens = tracer.result.save()
    return {"tokens": tokens}


def steer_generated(model, job):
    vector, layer = torch.from_numpy(job.vector), job.layer
    with torch.no_grad(), model.generate(**_given(job)) as tracer:
        for _ in tracer.iter[1 : job.new]:
            model.model.layers[layer].output += vector
        tokens = tracer.result.save()
    return {"tokens": tokens}


WORKLOADS = {"W1": prefill, "W2": generate, "W4": steer, "W5": steer_generated, "W6": generate}
