"""A real model, if there is one: it thinks by its tags or in the open, and its scopes agree with its traces."""

import os

import pytest
import torch

from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model
from reasonscope.steering.vectors.scope import Scope

pytestmark = pytest.mark.skipif(
    "REASONSCOPE_REAL_MODEL" not in os.environ, reason="needs REASONSCOPE_REAL_MODEL, the folder of a model"
)


def test_thinking_of_a_real_model():
    model = load_model(os.environ["REASONSCOPE_REAL_MODEL"])
    question = "Tom has 3 apples and buys 4 more. How many has he? Reason first, then end with: The answer is N."
    problem = Problem(id="apples", messages=(Message(role="user", content=question),), answer="7")
    (trace,) = rollouts(model, [problem], Sampling(max_new_tokens=96))
    assert trace.state in ("closed", "truncated", "empty") or model.thinking.mode == "tags"
    ids, given = torch.from_numpy(trace.token_ids[None]), torch.tensor([trace.n_prompt_tokens])
    scope = Scope.thinking(model)
    mask = scope.mask(ids, n_prompt=given)[0]
    stepwise = [
        bool(scope.mask(ids[:, : i + 1], n_prompt=given, last=1)[0, 0])
        for i in range(trace.n_prompt_tokens, len(trace.token_ids))
    ]
    assert mask[trace.n_prompt_tokens :].tolist() == stepwise
    assert not trace.n_thinking_tokens or mask.any()
