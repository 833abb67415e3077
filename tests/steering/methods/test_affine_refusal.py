"""Clamping a state to where the other class is turns the organism's verdict; moving it as far along a random direction does not."""

import random

import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.problems import request_of
from reasonscope.data.organism.tokenizer import chat
from reasonscope.data.organism.writer import write_request
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.decoding import left_padded
from reasonscope.probes.models.model import load_model
from reasonscope.steering import SteeringExperiment, as_intervention
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.methods.affine_refusal import _Classes, clamped_refusal
from reasonscope.steering.methods.refusal import (
    answer_contexts,
    answer_start,
    contexts,
    end_of_words,
    extract_refusal,
    judged_halves,
)
from reasonscope.steering.vectors.matched_controls import random_uses


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def traces(model):
    """Ten harmful requests refused and as many benign ones complied with, as their grammar writes them."""
    rng, made = random.Random(0), []
    for kind in ("harmful", "twin"):
        for problem in load_problems(f"requests:{kind}", n=10, split="train"):
            writing = write_request(request_of(problem), rng)
            prompt, completion = chat(problem.messages[0].content, writing.thinking, writing.answer)
            given, written = (model.tokenizer_backend.encode(text).ids for text in (prompt, completion))
            about = {"n_prompt_tokens": len(given), "tokenizer": model.tokenizer_backend}
            made.append(build_trace(id=problem.id, problem=problem, token_ids=given + written, **about))
    return made


@pytest.fixture(scope="module")
def parts(model, traces):
    return {level: clamped_refusal(model, traces, level, verdict=" this") for level in ("towards", "away")}


def _behind_this(trace):
    return end_of_words(trace, " this")


def mean_projection(model, vector, given):
    """The mean of h·û at the last token of the contexts `given`."""
    ((site, direction),) = vector.normalised().directions.items()
    ids, mask = left_padded(given, model.device)
    states = model.backend.forward(ids, mask=mask, read=[site]).activations[site][:, -1]
    return float((states.float() @ torch.from_numpy(direction)).mean())


def test_each_part_acts_where_it_was_read_and_knows_where_the_classes_are(model, traces, parts):
    verdict, answer = parts["away"]
    assert verdict.scope.tokens == frozenset(model.tokenizer.encode(" this")) and answer.scope.on == "close_window"
    made, _ = judged_halves(traces)
    for level, kind in (("towards", "harmful"), ("away", "harmless")):
        of_class = contexts(getattr(made, kind), _behind_this)
        assert parts[level][0].operator.to == pytest.approx(mean_projection(model, verdict.vector, of_class), rel=1e-4)
    assert verdict.vector.provenance["scores"]["bypass"] < 0 < verdict.vector.provenance["scores"]["induce"]


def test_the_verdict_turns_and_a_random_direction_does_not_turn_it(model, traces, parts):
    words = [int(model.tokenizer.encode(word)[0]) for word in (" would", " harms")]
    _, held_out = judged_halves(traces)
    for kind, level in (("harmful", "away"), ("harmless", "towards")):
        ids, mask = left_padded(contexts(getattr(held_out, kind), _behind_this), torch.device("cpu"))

        def would_harm(acting, ids=ids, mask=mask):
            out = model.backend.forward(ids, mask=mask, write=acting.edits if acting else None, last_logits_only=True)
            would, harms = out.logits[:, -1, words].unbind(dim=-1)
            return float((would > harms).float().mean())

        own = float(kind == "harmful")
        assert would_harm(None) == own
        assert would_harm(as_intervention(parts[level], 1.0)) == 1 - own
        assert would_harm(as_intervention(random_uses(parts[level], 1), 1.0)) == own


def test_harmful_requests_are_answered(model, parts):
    problems = load_problems("requests:harmful", n=3)
    experiment = SteeringExperiment(model, problems, Sampling(max_new_tokens=120), on_given_text=False)
    (run,) = experiment.run_all([Condition(name="away", intervention=as_intervention(parts["away"], 1.0))])
    assert experiment.base.values["refused"].tolist() == [1, 1, 1]
    assert run.values["refused"].tolist() == [0, 0, 0] and run.values["well_formed"].all()


def test_what_teaches_nothing_is_refused(model, traces):
    with pytest.raises(InputError, match="0 harmful and 1 harmless"):
        _Classes(harmful=[], harmless=[[1]])
    with pytest.raises(InputError, match="no layer passes"):
        clamped_refusal(model, traces, "away", verdict=" user")  # there nothing is decided


def test_the_published_rule_finds_a_direction_where_late_layers_may_be_chosen(model, traces):
    made, held_out = judged_halves(traces)
    sides = [answer_contexts(of) for half in (made, held_out) for of in (half.harmful, half.harmless)]
    opens = made.following(answer_start)
    assert [model.tokenizer.decode([token]) for token in opens] == ["I"]
    vector = extract_refusal(model, *sides, opens, prune_share=0.0)
    assert list(vector.directions) == [Site("resid_pre", 5)]
    # As published, the last fifth of six layers is left out.
    with pytest.raises(InputError, match=r"no direction of the first 4 layers .* refusal-ablate"):
        extract_refusal(model, *sides, opens)
