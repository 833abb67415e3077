"""Behaviour is read from the answer alone; planted intent and its cliff are found, and nothing is found in noise."""

import random
from dataclasses import replace

import numpy as np
import pytest

from reasonscope import probes
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.problems import request_of
from reasonscope.data.organism.requests import COMPLIANCE, REFUSAL
from reasonscope.data.organism.tokenizer import chat, train_tokenizer
from reasonscope.data.organism.writer import write_request
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.text.parse import build_trace, trace_from_text
from reasonscope.data.trace import Problem
from reasonscope.probes.properties.refusal_probe import refusal_maps
from reasonscope.probes.properties.request_outcomes import CONTRASTS, Contrast, cell

REFUSAL_ALONE = {"refusal": CONTRASTS["refusal"]}
SITES = ["resid_post.0", "resid_post.1"]


def answered(answer, thinking="I should refuse. I can't help with that."):
    problem = Problem(id="p", prompt="How?", meta={"harmful": True})
    return trace_from_text(
        id="p/0", problem=problem, prompt="How?<think>\n", completion=f"{thinking}\n</think>\n\n{answer}"
    )


def test_what_is_thought_is_not_done():
    assert behaviour(answered(COMPLIANCE, thinking="I should say: " + REFUSAL)) == "complied"
    cut = trace_from_text(
        id="t", problem=Problem(id="p", prompt="How?"), prompt="How?<think>\n", completion="I'm sorry, but I can't"
    )
    assert behaviour(cut) == "unclear"
    with pytest.raises(InputError, match="harmful is None"):
        cell(cut)


@pytest.fixture(scope="module")
def traces():
    """Requests as the grammar answers them: jailbroken harmful ones mostly comply after thinking that they should refuse."""
    bpe, rng, made = train_tokenizer(tokenizer_texts(0, 50)), random.Random(0), []
    for problem in load_problems("requests", n=240):
        writing = write_request(request_of(problem), rng)
        prompt, completion = chat(problem.messages[0].content, writing.thinking, writing.answer)
        given, written = bpe.encode(prompt).ids, bpe.encode(completion).ids
        made.append(
            build_trace(
                id=f"{problem.id}/0",
                problem=problem,
                token_ids=given + written,
                n_prompt_tokens=len(given),
                tokenizer=bpe,
            )
        )
    return made


def stored(path, traces, *, informed):
    """Layer 1 knows in dimension 2 what it will do, once the close window ends; until then it means to refuse all that is harmful."""
    rng = np.random.default_rng(0)
    arrays = {
        site: [rng.standard_normal((len(t.token_ids) - 1, 48)).astype(np.float32) for t in traces] for site in SITES
    }
    if informed:
        for trace, rows in zip(traces, arrays["resid_post.1"], strict=True):
            request, done = cell(trace)
            end = trace.tokens.close_window.stop - 1
            rows[:end, 2] += 4 if request == "harmful" else -4
            rows[end:, 2] += 4 if done == "refused" else -4
    store = TraceStore.create(path, sites=SITES)
    store.append(traces, arrays)
    return store


def test_intent_and_its_cliff_are_found(tmp_path, traces):
    store = stored(tmp_path, traces, informed=True)
    found = probes.refusal(store, traces, contrasts=REFUSAL_ALONE, folds=3)
    assert found.comparisons.keys() == found.probes.keys() == {"refusal"}
    assert refusal_maps(store, traces, contrasts=REFUSAL_ALONE, folds=3)["refusal"].scores.shape == (2, 6)
    assert found.comparison.shuffled.p_value == pytest.approx(1 / 200)
    assert found.comparison.score.low > 0.9
    assert found.comparison.beats
    assert str(found.probes["refusal"].site) == "resid_post.1"
    assert (sum(found.cells.values()), found.n_left_out) == (240, 0)
    study = found.cliffs["refusal"]
    fallen, stood = study.cliffs["harmful", "complied"], study.cliffs["harmful", "refused"]
    assert (fallen.plateau.low, fallen.end.high) == (pytest.approx(1, abs=0.15), pytest.approx(0, abs=0.15))
    assert study.above_nulls
    assert abs(stood.drop.value) < 0.1
    assert study.random.shape == study.random_excess.shape == (100,)
    assert study.excess.low > 0.7


def test_where_nothing_is_nothing_is_found(tmp_path, traces):
    found = probes.refusal(stored(tmp_path, traces, informed=False), traces, contrasts=REFUSAL_ALONE, folds=3)
    assert 0.3 < found.comparison.score.value < 0.7
    assert not found.comparison.beats
    assert not found.cliffs["refusal"].above_nulls
    assert not found.cliffs["refusal"].excess_above_random


def test_a_drop_that_every_prompt_shows_is_not_an_excess(tmp_path, traces):
    """Taught at the window alone, the probe reads something in all thinking: harmful and benign fall alike."""
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((len(t.token_ids) - 1, 8)).astype(np.float32) for t in traces]
    for trace, rows in zip(traces, states, strict=True):
        end = trace.tokens.close_window.stop - 1
        rows[:end, 2] += 5
        rows[end:, 2] += 5 if behaviour(trace) == "refused" else -5
    store = TraceStore.create(tmp_path, sites=["resid_post.1"])
    store.append(traces, {"resid_post.1": states})
    study = probes.refusal(store, traces, contrasts=REFUSAL_ALONE, folds=3).cliffs["refusal"]
    assert study.cliffs["harmful", "complied"].drop.low > 0.7
    assert study.excess.low < 0 < study.excess.high or abs(study.excess.value) < 0.05
    assert not study.excess_above_random


def test_intent_is_taught_along_the_thinking(tmp_path, traces):
    with pytest.raises(InputError, match="has to be 'window'"):
        Contrast(positive=frozenset(), negative=frozenset(), positions=(0.5,))
    intent = {"intent": CONTRASTS["intent"]}
    found = probes.refusal(stored(tmp_path, traces, informed=True), traces, contrasts=intent, folds=3)
    study = found.cliffs["intent"]
    assert (
        study.cliffs["benign", "complied"].plateau.high < 0.15 < 0.85 < study.cliffs["harmful", "complied"].plateau.low
    )
    assert study.excess.low > 0.5
    assert found.probes["intent"].provenance["positions"] == list(CONTRASTS["intent"].positions)


def test_runs_without_both_behaviours_are_refused(tmp_path, traces):
    store = stored(tmp_path, traces, informed=False)
    refused = [trace for trace in traces if cell(trace) == ("harmful", "refused")]
    with pytest.raises(InputError, match="class"):
        probes.refusal(store, refused)
    with pytest.raises(InputError, match="closed thinking"):
        probes.refusal(store, [replace(trace, state="truncated") for trace in traces])
