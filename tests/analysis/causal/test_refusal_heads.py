"""Cliff heads on the organism: chosen by what they write, compared with random heads."""

import random

import numpy as np
import pytest

from reasonscope.analysis.causal.refusal_heads import HeadTrial, _fallen, _suppressing_heads, cliff_heads
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.problems import request_of
from reasonscope.data.organism.requests import COMPLIANCE
from reasonscope.data.organism.writer import write_request
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.models.model import load_model
from reasonscope.steering.vectors.scope import Scope


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def traces(model):
    """Harmful requests that the grammar thinks about, and then complies with."""
    found = []
    for problem in load_problems("requests:jailbreak", n=3, seed=2):
        writing = write_request(request_of(problem), random.Random(0))
        prompt = model.encode_prompt(problem)
        text = f"<think>\n{writing.thinking}\n</think>\n\n{COMPLIANCE}"
        found.append(
            build_trace(
                id=problem.id,
                problem=problem,
                token_ids=np.array([*prompt, *model.tokenizer.encode(text, add_special_tokens=False)]),
                n_prompt_tokens=len(prompt),
                tokenizer=model.tokenizer_backend,
                finish_reason="stop",
                model=model.fingerprint,
            )
        )
    return found


@pytest.fixture(scope="module")
def trial():
    return HeadTrial(
        harmful=load_problems("requests:jailbreak", n=2, seed=3),
        benign=load_problems("requests:plain", n=2, seed=3),
        solved=load_problems("ledger", n=2, seed=3),
        sampling=Sampling(temperature=0.7, max_new_tokens=4),
    )


@pytest.fixture(scope="module")
def probe(model):
    coef = np.random.default_rng(0).standard_normal(model.d_model)
    return LinearProbe(
        coef=coef, intercept=0.0, site=Site("resid_post", 4), task="binary", method="test", model=model.fingerprint
    )


def test_the_lowest_writes_are_chosen():
    writes = np.array([[0.0, -3.0], [2.0, -1.0]])
    assert _suppressing_heads(writes, 0.5) == [Head(layer=0, index=1), Head(layer=1, index=1)]
    assert _suppressing_heads(writes) == [Head(layer=0, index=1)]
    with pytest.raises(InputError, match="share"):
        _suppressing_heads(writes, 0)


def test_ablation_stands_beside_random_heads(model, probe, traces, trial):
    assert len(_fallen(traces)) == 3
    found = cliff_heads(model, probe, traces, trial, n_controls=2)
    assert found.values.shape == (2, 3) and found.arrays["random"].shape == (2, 3)
    assert found.null is not None and found.interval is not None and len(found.numbers["heads"]) == 1
    assert set(found.numbers["beyond_every_draw"]) == {"harmful refused", "benign refused", "accuracy"}


def test_heads_are_silent_in_the_close_window_alone(model, probe, traces, trial):
    """Four tokens of an answer never reach the closing tag, so nothing is taken away yet."""
    found = cliff_heads(model, probe, traces, trial, n_controls=1, scope=Scope.of(model, on="close_window"))
    assert (found.values[1] == found.values[0]).all() and (found.arrays["random"] == found.values[0]).all()


def test_no_cliff_is_a_state_and_too_few_problems_an_error(model, probe, trial):
    assert "a cliff cannot occur" in cliff_heads(model, probe, [], trial).reason
    with pytest.raises(InputError, match="at least two"):
        HeadTrial(harmful=[], benign=trial.benign, solved=trial.solved, sampling=trial.sampling)
