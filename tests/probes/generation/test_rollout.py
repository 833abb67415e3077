"""Rollouts do not depend on their batch; a continuation keeps what was begun and goes on from it."""

import numpy as np
import pytest

from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.generation.rollout import continuations, rollouts, trace_seed
from reasonscope.probes.models.model import load_model

SAMPLING = Sampling(temperature=0.7, max_new_tokens=60)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def problems():
    return load_problems("ledger", n=4, seed=5)


def test_batches_change_nothing_and_order_is_kept(model, problems):
    together = rollouts(model, problems, SAMPLING, samples=2, batch_size=8)
    apart = rollouts(model, problems[::-1], SAMPLING, samples=2, batch_size=1)
    assert [trace.id for trace in together] == [f"{p.id}/{i}" for p in problems for i in range(2)]
    by_id = {trace.id: trace for trace in apart}
    for trace in together:
        np.testing.assert_array_equal(trace.token_ids, by_id[trace.id].token_ids)
    assert together[0].text != together[1].text


def test_a_continuation_keeps_what_was_begun(model, problems):
    trace = rollouts(model, problems[:1], SAMPLING)[0]
    begun = "Okay, I need a few steps. The question asks for the balance"
    done = continuations(model, [(trace, begun)], SAMPLING)[0]
    assert done.thinking.startswith(begun) and len(done.thinking) > len(begun)
    assert done.n_prompt_tokens == trace.n_prompt_tokens
    assert done.text[: done.chars.prompt.stop] == trace.text[: trace.chars.prompt.stop]
    known = np.isfinite(done.logprobs)
    assert not known[0] and known[-1]
    assert len(done.logprobs) == len(done.token_ids) - done.n_prompt_tokens
    assert done.sampling.seed == trace_seed(SAMPLING.seed, trace.id)


def test_a_continuation_takes_the_place_of_what_a_thinking_was_prefilled_with(model, problems):
    prefilled = rollouts(
        model, problems[:1], SAMPLING, prefill="Okay, I need a few steps. The question asks for the balance"
    )
    assert prefilled[0].tokens.thinking.start < prefilled[0].n_prompt_tokens
    done = continuations(model, [(prefilled[0], "Okay")], SAMPLING)[0]
    assert done.thinking.startswith("Okay") and done.n_prompt_tokens == done.tokens.thinking.start
    assert len(done.logprobs) == len(done.token_ids) - done.n_prompt_tokens


def test_what_has_no_thinking_or_no_room_is_refused(model, problems):
    silent = rollouts(model, problems[:1], SAMPLING, think=False)[0]
    assert silent.state == "empty"
    with pytest.raises(InputError, match="no thinking block to replace"):
        continuations(model, [(silent, "Okay")], SAMPLING)
    with pytest.raises(ContextError, match="problem 'long'"):
        rollouts(model, [Problem(id="long", prompt="word " * 3000)], SAMPLING)
