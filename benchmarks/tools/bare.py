"""transformers alone: what every other tool is measured against. Nothing is captured and nothing steered."""

import torch
from transformers import AutoModelForCausalLM

KERNEL = "sdpa"


def load(folder, kernel=KERNEL):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel).eval()


def greedy(model, job):
    """https://huggingface.co/docs/transformers/main_classes/text_generation"""
    with torch.no_grad():
        return model.generate(job.ids, attention_mask=job.mask, max_new_tokens=job.new, do_sample=False)


def prefill(model, job):
    with torch.no_grad():
        model(job.ids, attention_mask=job.mask, use_cache=False)
    return {}


def generate(model, job):
    return {"tokens": greedy(model, job)}


WORKLOADS = {"W1": prefill, "W2": generate, "W4": generate, "W5": generate, "W6": generate}
