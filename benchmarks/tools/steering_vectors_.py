"""steering-vectors 0.12 with an older transformers. https://steering-vectors.github.io/steering-vectors/

Its rule for positions, `min_token_index`, counts inside each pass: of a decoding it edits the prompt at most.
"""

import torch
from steering_vectors import SteeringVector

from tools.bare import greedy, load

__all__ = ["WORKLOADS", "load"]


def _steer(model, job, **rule):
    vector = SteeringVector(layer_activations={job.layer: torch.from_numpy(job.vector)}, layer_type="decoder_block")
    with vector.apply(model, multiplier=1.0, **rule):
        return {"tokens": greedy(model, job)}


def steer(model, job):
    return _steer(model, job)


def steer_generated(model, job):
    return _steer(model, job, min_token_index=job.ids.shape[1])


WORKLOADS = {"W4": steer, "W5": steer_generated}
