"""This project, by its native hooks."""

from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.generation.decoding import generate as write
from reasonscope.probes.models.model import load_model
from reasonscope.steering.vectors.intervention import Steering
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector


def load(folder):
    return load_model(str(folder), dtype="float32")


def everywhere(model):
    return [Site("resid_post", layer) for layer in range(model.n_layers)]


def prefill(model, job):
    _, seen = run_with_cache(model, job.ids, everywhere(model))
    return {"activations": list(seen.values())}


def _write(model, job, **how):
    prompts = [ids[kept.bool()].tolist() for ids, kept in zip(job.ids, job.mask, strict=True)]
    sampling = Sampling(temperature=0, max_new_tokens=job.new)
    return write(model, prompts, sampling, seeds=[0] * len(prompts), **how)


def _tokens(done):
    return {"tokens": [one.token_ids[one.n_prompt_tokens :] for one in done]}


def generate(model, job):
    done = _write(model, job, read=everywhere(model))
    return _tokens(done) | {"activations": [list(one.activations.values())[-1] for one in done]}


def _steer(model, job, scope):
    site = Site("resid_post", job.layer)
    steering = Steering(SteeringVector(directions={site: job.vector}, method="bench", provenance={}), 1.0, scope)
    return _tokens(_write(model, job, write=steering.edits, on_step=steering.on_step))


def steer(model, job):
    return _steer(model, job, Scope())


def steer_generated(model, job):
    return _steer(model, job, Scope(generation_window=(0, None)))


WORKLOADS = {"W1": prefill, "W2": generate, "W4": steer, "W5": steer_generated, "W6": generate}
