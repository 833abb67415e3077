"""interp-engine 1.14, the engine of Neuronpedia, on its eager backend. https://pypi.org/project/interp-engine/"""

import torch
from interp_engine import capture_generation, load_model, run_with_cache


def load(folder):
    return load_model(str(folder), dtype="float32", device="cpu")


def points(model):
    return [f"resid_post.{layer}" for layer in range(model.n_layers)]


def prefill(model, job):
    with torch.no_grad():
        cache = run_with_cache(model, job.ids, points(model))
    return {"activations": [cache[point] for point in points(model)]}


def generate(model, job):
    done, cache = capture_generation(model, job.ids[0].tolist(), points(model), max_tokens=job.new)
    return {"tokens": [list(done.token_ids)], "activations": [cache[point] for point in points(model)]}


WORKLOADS = {"W1": prefill, "W2": generate}
