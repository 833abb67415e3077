"""A base model is compared with the reasoner token by token, and the reasoner with itself is the null."""

from dataclasses import replace

import numpy as np
import pytest

from reasonscope.analysis import figures
from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.analysis.tokens.misalignment import _worth, misalignment_of_trace
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model


def test_a_greedy_trace_is_its_models_own_and_not_a_random_models():
    reasoner = load_model("organism")
    (trace,) = rollouts(reasoner, load_problems("ledger:brief", n=1, seed=5), Sampling(max_new_tokens=60))
    known = sentences(trace)
    own = misalignment_of_trace(reasoner, reasoner, trace, known, bins=4)
    assert own.numbers["rate"] == 0 and own.null.low.max() == 0
    assert (own.null.high > 0.05).all(), "a few tokens that are its own do not say that all are"
    base = load_model("organism-base")
    found = misalignment_of_trace(base, reasoner, trace, known, bins=4)
    assert found.numbers["rate"] >= 0 and found.numbers["rate_of_reasoner"] == 0
    assert found.arrays["misses"].shape == (trace.n_thinking_tokens,) and found.arrays["by_index"].shape == (10,)
    assert "bins" in misalignment_of_trace(base, reasoner, trace, known, bins=500).reason


def test_what_was_given_of_the_thinking_is_not_judged():
    reasoner, base = load_model("organism"), load_model("organism-base")
    (trace,) = rollouts(reasoner, load_problems("ledger:brief", n=1, seed=5), Sampling(max_new_tokens=60))
    known, start = sentences(trace), trace.tokens.thinking.start
    whole = misalignment_of_trace(base, reasoner, trace, known, bins=4).arrays["misses"]

    def prefilled(n):
        cut = replace(trace, n_prompt_tokens=n, logprobs=None, entropies=None)
        return misalignment_of_trace(base, reasoner, cut, known, bins=4)

    found = prefilled(start + 10)
    np.testing.assert_array_equal(found.arrays["misses"], whole[10:])
    judged = np.where(np.arange(len(whole)) < 10, np.nan, whole)
    for place, value in enumerate(found.arrays["by_index"]):
        there = [judged[s.tokens.start + place - start] for s in known if place < len(s.tokens)]
        there = [miss for miss in there if np.isfinite(miss)]
        np.testing.assert_allclose(value, np.mean(there) if there else np.nan)
    assert np.nansum(found.arrays["by_index"]) > 0
    for n in (trace.tokens.thinking.stop - 7, trace.tokens.thinking.stop, 0):
        assert "bins" in prefilled(n).reason


def test_models_of_different_tokenizers_are_refused(tmp_path):
    reasoner = load_model("organism")
    (trace,) = rollouts(reasoner, load_problems("ledger:brief", n=1, seed=5), Sampling(max_new_tokens=4))
    other = type(reasoner.tokenizer)(tokenizer_object=reasoner.tokenizer_backend, eos_token="x")
    other.add_tokens(["zz"])
    foreign = load_model(tiny_model("qwen3"), tokenizer=other)
    with pytest.raises(InputError, match="different tokenizers"):
        misalignment_of_trace(foreign, reasoner, trace, [], bins=4)


def test_a_result_is_drawn_with_its_null_shaded_its_interval_and_its_unit():
    values = np.array([[0.1, 0.9, 0.2], [1.0, 2.0, np.nan]])
    result = Result(
        method="anchors",
        quantity="importance",
        unit="nats",
        axes=(Axis.of("metric", ("accuracy", "kl")), Axis.of("sentence", 3)),
        values=values,
        null=Band.of(0.0, 0.5, values.shape, "mixed answers"),
        interval=Band.of(values - 0.1, values + 0.1, values.shape, "bootstrap"),
        reason="the last has none",
        arrays={"effects": np.full((3, 3), np.nan), "peaks": values > 0.5},
        numbers={"texts": ["a", "b", "c"]},
        provenance={"trace": "x/0"},
    )
    drawn = figures.of_result(result)
    assert set(drawn) == {"lines", "effects"}
    lines = drawn["lines"]
    names = [trace.name for trace in lines.data]
    assert names.count("measured") == 2 and "null: mixed answers" in names and names.count("peak") == 2
    assert lines.layout.yaxis.title.text == "nats" and lines.layout.xaxis2.title.text == "sentence"
    assert "x/0" in lines.layout.title.text
    heads = Result(
        method="heads",
        quantity="attention",
        unit="1",
        axes=(Axis.of("metric", ("span", "sink")), Axis.of("layer", 2), Axis.of("head", 3)),
        values=np.arange(12.0).reshape(2, 2, 3),
        null=Band.of(0.0, 5.0, (2, 2, 3), "uniform"),
    )
    (mapped,) = figures.of_result(heads).values()
    assert [t.type for t in mapped.data] == ["heatmap", "scatter"] * 2 and len(mapped.data[3].x) == 6
    assert mapped.layout.yaxis.title.text == "layer" and mapped.layout.xaxis2.title.text == "head"
    only = figures.along(result, only=["kl"])
    assert [t.name for t in only.data].count("measured") == 1
    assert drawn["effects"].layout.xaxis.title.text == "source sentence"


def test_tokens_of_a_sentence_that_are_alike_are_worth_less():
    sentence = np.repeat(np.arange(20), 10)
    each = np.random.default_rng(0).random(200) < 0.3
    assert _worth(each.astype(float), sentence) > 0.7
    alike = np.repeat(np.arange(20) % 4 == 0, 10).astype(float)
    assert _worth(alike, sentence) == pytest.approx(0.1 * 19 / 20), "twenty sentences, and their spread from as many"
    assert _worth(np.ones(200), sentence) == 1 and _worth(each.astype(float), np.zeros(200, dtype=int)) == 1
