"""Receiver results on the organism: bounded by their nulls, and honest about traces that are too short."""

import random
from dataclasses import replace

import numpy as np
import pytest

from reasonscope.analysis.attention.head_profiles import METRICS, _uniform_rhythm, head_table
from reasonscope.analysis.attention.receiver_heads import receiver_heads, receiver_scores
from reasonscope.analysis.causal.attention_agreement import attention_agreement
from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.problems import ledger_of
from reasonscope.data.organism.writer import write_ledger
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.text.parse import build_trace
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.models.model import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


def written(model, problem, text):
    """A trace of a problem whose completion is given and not generated."""
    prompt = model.encode_prompt(problem)
    completion = model.tokenizer.encode(text, add_special_tokens=False)
    return build_trace(
        id=problem.id,
        problem=problem,
        token_ids=np.array([*prompt, *completion]),
        n_prompt_tokens=len(prompt),
        tokenizer=model.tokenizer_backend,
        finish_reason="stop",
        model=model.fingerprint,
    )


@pytest.fixture(scope="module")
def traces(model):
    """What the grammar writes about three short ledgers, read by the model that learned it."""
    found = []
    problems = sorted(load_problems("ledger", n=40, seed=5), key=lambda problem: problem.difficulty or 0)
    for problem in problems[6:9]:
        writing = write_ledger(ledger_of(problem), "default", random.Random(0))
        found.append(written(model, problem, f"<think>\n{writing.thinking}\n</think>\n\n{writing.answer}"))
    return found


def test_heads_stand_beside_uniform_attention_and_their_interval(model, traces):
    found = receiver_heads(model, traces, top=3)
    assert found.values.shape == (model.n_layers, model.n_heads)
    assert (found.interval.low <= found.values + 1e-9).all() and len(np.unique(found.null.low)) == 1
    assert all(not head.startswith("0.") for head in found.numbers["heads"]) and len(found.numbers["heads"]) == 3
    assert found.numbers["n_traces"] == 3 and -1 <= found.numbers["split_half_reliability"] <= 1


def test_scores_are_missing_where_no_target_is_far_enough(model, traces):
    found = receiver_scores(model, traces[0], [Head(layer=4, index=0)])
    assert np.isnan(found.values[-4:]).all() and np.isfinite(found.values[:-4]).all()
    assert found.provenance["cut"] == cut_trace(traces[0]).cut_hash
    assert ((found.null.low <= found.null.high) | np.isnan(found.values)).all()


def test_attention_finds_true_dependencies_better_than_chance(model, traces):
    found = attention_agreement(model, traces, n_permutations=50)
    auroc = found.at(metric="auroc")
    assert (auroc > found.null.high[:, 0]).all()


@pytest.mark.parametrize("thinking", ["", "One only. "])
def test_traces_without_sentences_to_compare_are_a_state(model, traces, thinking):
    trace = written(model, traces[0].problem, f"<think>\n{thinking}\n</think>\n\n\\boxed{{3}}")
    assert "a kurtosis needs" in receiver_heads(model, [trace]).reason
    assert "a score needs a target" in receiver_scores(model, trace, [Head(layer=1, index=0)]).reason
    with pytest.raises(InputError, match="two such traces"):
        attention_agreement(model, [trace, traces[0]])


def test_a_trace_longer_than_the_context_is_an_error(model, traces):
    thinking = "So 1 + 1 = 2.\n\n" * 200
    trace = written(model, replace(traces[0].problem), f"<think>\n{thinking}\n</think>\n\n2")
    with pytest.raises(ContextError, match="holds 1024"):
        receiver_heads(model, [trace])


def test_every_head_is_described_beside_uniform_attention(model, traces):
    known = sentences(traces[0])
    found = head_table(model, traces[0], known)
    assert (
        found.interval.what.startswith(f"bootstrap over {len(known)} sentences") and "200 places" in found.interval.what
    )
    assert (found.interval.low <= found.values).all() and (found.values <= found.interval.high).all()
    assert (found.interval.low < found.interval.high).any(axis=(1, 2)).all()
    assert found.values.shape == (len(METRICS), model.n_layers, model.n_heads)
    assert found.unit_of("waad") == "tokens" and (found.values[METRICS.index("waad")] <= 10).all()
    assert len(found.arrays["waad"]) == len(found.arrays["fai"]) == traces[0].n_thinking_tokens
    assert len(found.numbers["local"]) == int(0.3 * model.n_layers * model.n_heads)
    silent = written(model, traces[0].problem, "</think>\n\nThe answer is 3.")
    assert "no row to read" in head_table(model, silent).reason


def test_a_head_that_looks_at_all_alike_has_the_waad_and_fai_of_chance():
    first, n = 7, 90
    query, key = np.arange(first, first + n)[:, None], np.arange(first + n)
    alike = np.where(key <= query, 1 / (query + 1), 0.0)
    waad = (alike * np.minimum(query - key, 10)).sum(axis=1).mean()
    fai = [alike[i + 10 : i + 51, first + i].mean() if i + 10 < n else 0.0 for i in range(n)]
    assert _uniform_rhythm(query[:, 0]) == pytest.approx((waad, np.mean(fai)))
