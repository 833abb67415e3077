"""The shipped organism is what its card says."""

import json
import random

import pytest

from reasonscope.analysis.organism import _label_agreement, _put_right, evaluate_organism, truths
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.reader import read_steps
from reasonscope.data.text.steps_and_sentences import steps
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def traces(model):
    problems = load_problems("ledger", n=24, seed=9)
    return rollouts(model, problems, Sampling(temperature=0.7, max_new_tokens=900), batch_size=24)


def test_it_thinks_in_its_language_and_is_right_more_often_than_not(traces):
    kinds = [truth.kind for trace in traces for truth in truths(trace)]
    assert sum(kind is not None for kind in kinds) >= 0.99 * len(kinds)
    assert sum(bool(trace.correct) for trace in traces) >= 12
    assert all(trace.state == "closed" for trace in traces)


def test_labels_and_steps_agree_with_the_grammar(traces):
    assert _label_agreement(traces) >= 0.95
    agree = [
        step.kind == known.kind
        for trace in traces
        for step, known in zip(steps(trace), read_steps(trace.thinking, truths(trace))[1:], strict=False)
    ]
    assert sum(agree) >= 0.99 * len(agree) > 0


def test_some_forced_mistakes_are_put_right(model, traces):
    assert _put_right(model, traces[:12], random.Random(0)) > 0.1


def test_the_base_model_does_not_think():
    base = load_model("organism-base")
    trace = rollouts(base, load_problems("ledger", n=1), Sampling(max_new_tokens=40))[0]
    assert "Wait" not in trace.text


@pytest.mark.slow
def test_every_number_of_the_card_holds(model):
    measures = evaluate_organism(model)
    assert {measure.name: measure.value for measure in measures if not measure.met} == {}
    json.dumps([measure.value for measure in measures], allow_nan=False)
