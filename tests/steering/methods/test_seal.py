"""SEAL's vector equals the golden numbers; bad classes and states are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.steps_and_sentences import steps
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.methods.seal import _seal_direction, extract_seal

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "seal_vector.json").read_text(encoding="utf-8"))
KINDS = {"E": "execution", "R": "reflection", "T": "transition"}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_vectors(case):
    labels = [KINDS[label] for trace in case["inputs"]["labels"] for label in trace]
    for layer, expected in zip(case["inputs"]["hidden"], case["expected"]["vector"], strict=True):
        states = np.array([state for trace in layer for state in trace])
        if expected is None or None in expected:
            with pytest.raises(InputError, match="both classes"):
                _seal_direction(states, labels)
            continue
        tolerance = case["tolerance"]
        # the released code's sign is the reverse of the paper's, which is ours
        np.testing.assert_allclose(-_seal_direction(states, labels), expected, rtol=tolerance, atol=tolerance)


def test_one_class_alone_can_be_left():
    states = np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    kinds = ["execution", "reflection", "transition"]
    np.testing.assert_array_equal(_seal_direction(states, kinds, away_from=("reflection",)), [1.0, -1.0])


def test_a_missing_class_and_nan_are_refused():
    with pytest.raises(InputError, match="2 execution steps and 0 of reflection or transition"):
        _seal_direction(np.zeros((2, 3)), ["execution", "execution"])
    with pytest.raises(
        InputError, match=r"such as “wait”.*length-probe learns from this run, asc and speed from pairs"
    ):
        _seal_direction(np.zeros((2, 3)), ["execution", "execution"])
    with pytest.raises(InputError, match="NaN"):
        _seal_direction(np.array([[np.nan], [0.0]]), ["execution", "reflection"])


SITE = Site("resid_post", 1)
THINKING = (
    "<think>\nOkay.\n\nFirst step (one)\n\nWait, is it 7?\n\nWe think differently here: 3.\n\n"
    "Alternatively, 4.\n\nSo 7.\n</think>\n\n7"
)


@pytest.fixture
def store(tokenizer, tmp_path):
    """Two traces of one text, with random states; the prompt has a blank line too."""
    traces = [
        trace_from_text(
            id=f"{name}/0",
            problem=Problem(id=name, prompt="Question: 3 + 4?\n\n"),
            prompt="Question: 3 + 4?\n\n",
            completion=THINKING,
            tokenizer=tokenizer,
            model={"name": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "weights": "w"},
        )
        for name in ("a", "b")
    ]
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((len(trace.token_ids) - 1, 4)).astype(np.float32) for trace in traces]
    with TraceStore.create(tmp_path / "s", meta={"model": {"weights": "w"}}, sites=[str(SITE)]) as made:
        made.append(traces, {str(SITE): rows})
    return TraceStore.open(tmp_path / "s")


def test_the_vector_of_a_run_is_that_of_the_states_at_its_separators(store):
    vector = extract_seal(store, SITE)
    found = [
        (step, store.activations(id, str(SITE))[step.separator]) for id in store.ids for step in steps(store.trace(id))
    ]
    kinds, states = [step.kind for step, _ in found], np.stack([state for _, state in found])
    assert kinds.count("transition") == 4  # the misspelt keyword is repaired
    np.testing.assert_allclose(vector.directions[SITE], _seal_direction(states, kinds), rtol=1e-6)
    assert vector.provenance["groups"] == ["a", "b"] and vector.provenance["model"] == {"weights": "w"}


def test_one_class_alone(store):
    parts = {kind: extract_seal(store, SITE, away_from=(kind,)) for kind in ("reflection", "transition")}
    both = extract_seal(store, SITE)
    # the mean over the union weighs the classes by their steps: 1 reflection and 2 transitions a trace
    pooled = (parts["reflection"].directions[SITE] + 2 * parts["transition"].directions[SITE]) / 3
    np.testing.assert_allclose(both.directions[SITE], pooled, rtol=1e-5, atol=1e-6)


def test_the_reference_variant_keeps_the_sign_and_the_misspelling_of_the_released_code(store):
    reference = extract_seal(store, SITE, variant="published")
    faithful = extract_seal(store, SITE, keywords="published")
    np.testing.assert_allclose(reference.directions[SITE], -faithful.directions[SITE], rtol=1e-6)
    assert reference.provenance["steps"]["transition"] == 2
    assert not np.allclose(faithful.directions[SITE], extract_seal(store, SITE).directions[SITE])


def test_the_published_form_reads_the_prompt_of_other_models_than_deepseek(store, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("reasonscope.steering.methods.seal._think_only", lambda _: False)
    whole = extract_seal(store, SITE, variant="published").provenance["steps"]
    inside = extract_seal(store, SITE).provenance["steps"]
    assert sum(whole.values()) > sum(inside.values())
