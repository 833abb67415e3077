"""Trajectories, entropies and confidence equal the golden numbers; what is too short or missing says so."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_reference.entropy import forking_masks, forking_thresholds, high_window_counts, listed_entropy

from reasonscope.analysis.tokens.confidence import _cut_points, _overconfidence, classify_confidence
from reasonscope.analysis.tokens.entropy import (
    _phase_entropy,
    _window_entropy,
    entropy_of_trace,
)
from reasonscope.analysis.traces.trajectory import SIGNALS, _blocks, _segment_mean, random_walk, signals
from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import Problem, Sampling, Span
from reasonscope.probes.generation.decoding import sample


def cases(name, kind):
    path = Path(__file__).parents[2] / "golden" / f"{name}.json"
    found = [case for case in json.loads(path.read_text())["cases"] if case["inputs"]["kind"] == kind]
    assert found
    return [pytest.param(case["inputs"], case["expected"], id=str(case.get("name"))) for case in found]


def numbers(values):
    return np.array([np.nan if value is None else value for value in values], dtype=float)


@pytest.mark.parametrize(("inputs", "expected"), cases("latent_trajectory", "signals"))
def test_golden_signals(inputs, expected):
    found = signals(np.array(inputs["segment_means"]))
    for name in SIGNALS:
        np.testing.assert_allclose(getattr(found, name), numbers(expected[name]), atol=1e-9)


@pytest.mark.parametrize(("inputs", "expected"), cases("latent_trajectory", "tokens"))
def test_golden_segment_means_in_one_chunk_or_many(inputs, expected):
    for hidden, wanted in zip(np.array(inputs["hidden"]), np.array(expected["segment_means"]), strict=True):
        spans = _blocks(len(hidden), inputs["block"])
        np.testing.assert_allclose(_segment_mean(hidden, spans), wanted, atol=1e-9)
        np.testing.assert_allclose(_segment_mean(iter(np.array_split(hidden, 4)), spans), wanted, atol=1e-9)


def test_a_random_walk_is_aligned_by_the_root_of_its_steps_and_a_line_by_one():
    rng = np.random.default_rng(0)
    means = np.cumsum(rng.standard_normal((2, 26, 64)), axis=1)
    null = random_walk(means, n_controls=40)
    assert null[:, 2].mean() == pytest.approx(1 / 5, abs=0.02)
    np.testing.assert_allclose(null[:, 1], np.tile(signals(means).cumulative, (40, 1)))
    line = np.arange(26)[None, :, None] * np.ones((1, 1, 64))
    assert signals(line).aligned[0] == pytest.approx(1) and null[:, 2].max() < 0.4


def test_segments_have_to_be_there():
    for spans, message in (([Span(2, 2)], "no tokens"), ([Span(0, 9)], "of 4 tokens")):
        with pytest.raises(InputError, match=message):
            _segment_mean(np.ones((4, 2)), spans)
    with pytest.raises(InputError, match="blocks of 0"):
        _blocks(3, 0)


@pytest.mark.parametrize(("inputs", "expected"), cases("entropy_windows", "forking"))
def test_golden_forking(inputs, expected):
    lines = [np.array(line) for line in inputs["entropies"]]
    for per, name in (("corpus", "global"), ("sequence", "per_sequence")):
        thresholds = forking_thresholds(lines, percentile=inputs["percentile"], per=per)
        wanted = expected[f"threshold_{name}"]
        np.testing.assert_allclose(thresholds, wanted if isinstance(wanted, list) else [wanted] * len(lines), atol=1e-9)
        masks = forking_masks(lines, thresholds)
        assert [mask.tolist() for mask in masks] == expected[f"mask_{name}"]
    batch = forking_thresholds(lines, percentile=inputs["percentile"], per="batch", batch=len(lines))
    np.testing.assert_allclose(batch, expected["threshold_global"])


@pytest.mark.parametrize(("inputs", "expected"), cases("entropy_windows", "entropy"))
def test_golden_entropy_of_what_is_recorded_while_decoding(inputs, expected):
    logits = torch.tensor(inputs["logits"], dtype=torch.float64)
    *_, found = sample(logits, Sampling(temperature=inputs["temperature"]), torch.zeros(len(logits)))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)  # of float32


@pytest.mark.parametrize(("inputs", "expected"), cases("entropy_windows", "window"))
def test_golden_windows(inputs, expected):
    words = inputs["tokens"]
    listed = [listed_entropy([value for _, value in row]) for row in inputs["logprobs"]]
    np.testing.assert_allclose(listed, expected["entropy"], atol=1e-9)
    means = _window_entropy(np.array(listed), inputs["window"])
    np.testing.assert_allclose(means, numbers(expected["window_mean"]), atol=1e-9)
    best = [words[max(row, key=lambda item: item[1])[0]] for row in inputs["logprobs"]]
    tailless = np.array([listed_entropy([value for _, value in row], tail=False) for row in inputs["logprobs"]])
    filled = _window_entropy(tailless, inputs["window"], variant="published")
    for name, reference in (("corrected", None), ("reference", filled)):
        found = high_window_counts(best, means, inputs["crucial"], percentile=inputs["percentile"], reference=reference)
        wanted = expected[name]
        assert (found.valid, found.invalid) == (wanted["valid"], wanted["invalid"])
        assert found.soft_cost == pytest.approx(wanted["soft_cost"], abs=1e-9)
        np.testing.assert_allclose(found.threshold, numbers([wanted["threshold"]])[0], atol=1e-9)


@pytest.mark.parametrize(("inputs", "expected"), cases("entropy_windows", "phases"))
def test_golden_phases(inputs, expected):
    values, close = np.array(inputs["entropies"]), inputs["close_index"]
    close = len(values) if close is None else close
    found = _phase_entropy(values[:close], values[close + 1 :], alpha=inputs["alpha"])
    wanted = numbers([expected[f"{name}"] for name in ("think_mean", "answer_mean", "penalty")])
    np.testing.assert_allclose([found.thinking, found.answer, found.penalty], wanted, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "written", "thinking", "answer"),
    [
        ("<think>\n", "Wait, let me check. It is 7.\n</think>\n\nThe answer is 7.", 1, 3),
        ("<think>\nOkay, so I need", " to add 3 and 4. It is 7.\n</think>\n\nThe answer is 7.", 1, 3),
        ("<think>\nOkay, so I need", " to add 3 and 4.", 1, np.nan),
        ("<think>\nHmm.", "\n</think>\n\nThe answer is 7.", np.nan, 3),
        ("<think>\nOkay, I can answer it without thinking.\n</think>\n\n", "The answer is 7.", np.nan, 3),
        ("<think>\n\n</think>\n\n", "The answer is 7.", np.nan, 3),
        ("", "The answer is 7.", np.nan, 3),
    ],
)
def test_phases_are_those_of_what_the_model_wrote(tokenizer, given, written, thinking, answer):
    trace = trace_from_text(
        id="a/0", problem=Problem(id="a", prompt="?"), prompt=f"What is 3 + 4?\n{given}", completion=written, tokenizer=tokenizer
    )  # fmt: skip
    begins = trace.offsets[trace.n_prompt_tokens :, 0]
    values = np.select([begins < trace.chars.close.start, begins < trace.chars.answer.start], [1.0, 9.0], 3.0)
    values[-1] = np.nan  # nobody measured it
    found = entropy_of_trace(replace(trace, entropies=values.astype(np.float32)), sentences=sentences(trace))
    np.testing.assert_array_equal([found.numbers["thinking"]["value"], found.numbers["answer"]], [thinking, answer])
    assert np.isnan(found.arrays["window"][-9:]).all() and not found.arrays["forking"][-1]


@pytest.mark.parametrize(("inputs", "expected"), cases("premature_confidence", "curve"))
def test_golden_confidence_curve(inputs, expected):
    found = classify_confidence(inputs["confidence"], threshold=inputs["threshold"])
    np.testing.assert_allclose(found.spearman, numbers([expected["spearman"]])[0], atol=1e-9)
    assert found.kind == expected["class"]


@pytest.mark.parametrize(("inputs", "expected"), cases("premature_confidence", "overconfidence"))
def test_golden_overconfidence(inputs, expected):
    assert _overconfidence(inputs["pass_rate"]) == pytest.approx(expected["value"], abs=1e-9)


@pytest.mark.parametrize(("inputs", "expected"), cases("premature_confidence", "cuts"))
def test_golden_cuts(inputs, expected):
    assert _cut_points(inputs["length"], inputs["parts"]) == expected
