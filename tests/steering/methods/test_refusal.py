"""The refusal direction: golden choices, what ablation removes, and weights that do the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from reasonscope.data.errors import ArchitectureError, InputError
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.families import tiny_config, tiny_model
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Clamp, Scope, Steering, SteeringVector
from reasonscope.steering.methods.refusal import (
    Scores,
    ablated_everywhere,
    contexts_until,
    extract_refusal,
    refusal_candidates,
    refusal_logodds,
    refusal_scores,
    select_direction,
)
from reasonscope.steering.vectors.orthogonalise import orthogonalised, save_orthogonalised

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "refusal_selection.json").read_text(encoding="utf-8"))
HARMFUL, HARMLESS = [[5, 6, 7], [8, 6, 9, 7]], [[10, 11, 12], [13, 14, 15, 12]]


@pytest.fixture(scope="module")
def load(character_tokenizer):
    return lambda family: load_model(tiny_model(family), tokenizer=character_tokenizer)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_choices(case):
    given = dict(case["inputs"])
    tables = {name: np.array(given.pop(name), dtype=np.float64) for name in ("bypass", "induce", "kl")}
    choice = select_direction(Scores(**tables), **given)
    expected = case["expected"]
    if expected["position"] is None:
        assert choice is None
    else:
        assert (choice.position, choice.layer, choice.n_surviving) == tuple(
            expected[name] for name in ("position", "layer", "n_surviving")
        )


def test_candidates_are_differences_of_means_and_scores_see_their_effect(load):
    model = load("qwen3")
    candidates = refusal_candidates(model, HARMFUL, HARMLESS, n_positions=2)
    site = Site("resid_pre", 1)
    states = [
        model.backend.forward(torch.tensor([ids]), mask=torch.ones(1, len(ids)), read=[site]).activations[site][0, -1]
        for ids in HARMFUL + HARMLESS
    ]
    expected = (states[0] + states[1] - states[2] - states[3]) / 2
    np.testing.assert_allclose(candidates[-1, 1], expected, atol=1e-5)
    nothing = np.zeros_like(candidates)
    assert np.isnan(refusal_scores(model, nothing, HARMFUL, HARMLESS, [3]).bypass).all()
    scores = refusal_scores(model, candidates[-1:], HARMFUL, HARMLESS, [3])
    assert np.isfinite(scores.bypass).all() and (scores.kl > 0).all()
    vector = extract_refusal(
        model, HARMFUL, HARMLESS, HARMFUL, HARMLESS, [3], kl_threshold=np.inf, induce_threshold=-np.inf
    )
    assert vector.provenance["scores"]["bypass"] == pytest.approx(scores.bypass[0, :2].min())
    with pytest.raises(InputError, match=r"no direction of the first 2 layers .* methods refusal and refusal-ablate"):
        extract_refusal(model, HARMFUL, HARMLESS, HARMFUL, HARMLESS, [3], kl_threshold=-1.0)


def test_contexts_end_after_the_words(written_store):
    store = written_store(
        [(Problem(id=name, prompt="q"), 0, text, "no") for name, text in (("a", "so this"), ("b", "x"))]
    )
    (context,) = contexts_until(store, "this")
    trace = store.trace("a/0")
    assert context == trace.token_ids[: len(context)].tolist() and trace.offsets[
        len(context) - 1, 1
    ] == trace.text.find("this") + len("this")
    with pytest.raises(InputError, match="no trace has 'that'"):
        contexts_until(store, "that")


def test_clamped_states_are_at_the_clamp(load):
    model, site = load("qwen3"), Site("resid_pre", 1)
    direction = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    vector = SteeringVector(directions={site: direction}, method="refusal")
    level = 0.7
    ids = torch.tensor(HARMFUL[:1])
    write = Steering(vector, 1.0, Scope(), operator=Clamp(to=level)).edits
    state = model.backend.forward(ids, mask=torch.ones_like(ids), write=write, read=[site]).activations[site][0, -1]
    assert float(state @ torch.from_numpy(direction / np.linalg.norm(direction))) == pytest.approx(level, abs=1e-4)


def test_log_odds():
    logprobs = torch.log(torch.tensor([[0.2, 0.8]], dtype=torch.float64))
    assert refusal_logodds(logprobs, [1]) == pytest.approx(np.log(4), abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "phi3", "gpt2", "gpt_neox"])
def test_orthogonal_weights_are_the_ablation(load, family):
    model = load(family)
    direction = np.random.default_rng(0).standard_normal(model.d_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model.hf.state_dict()["lm_head.weight"].clone()
    ablated = model.backend.forward(ids, mask=torch.ones_like(ids), write=ablated_everywhere(model, direction)).logits
    last = Site("resid_post", model.n_layers - 1)
    clean = load_model(orthogonalised(model, direction), tokenizer=model.tokenizer)
    seen = clean.backend.forward(ids, mask=torch.ones_like(ids), read=[last])
    torch.testing.assert_close(seen.logits, ablated, atol=1e-4, rtol=1e-4)
    assert (seen.activations[last] @ torch.from_numpy(direction / np.linalg.norm(direction)).float()).abs().max() < 1e-4
    assert torch.equal(before, model.hf.state_dict()["lm_head.weight"])


def test_it_is_saved_as_a_model_whose_embedding_was_shared_before(character_tokenizer, tmp_path):
    config = tiny_config("qwen3")
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_model(AutoModelForCausalLM.from_config(config), tokenizer=character_tokenizer)
    direction = np.ones(model.d_model)
    save_orthogonalised(model, direction, tmp_path / "clean")
    again = load_model(str(tmp_path / "clean"))
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.backend.forward(ids, mask=torch.ones_like(ids), write=ablated_everywhere(model, direction)).logits
    torch.testing.assert_close(
        again.backend.forward(ids, mask=torch.ones_like(ids)).logits, expected, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(InputError, match="not empty"):
        save_orthogonalised(model, direction, tmp_path / "clean")


def test_what_it_does_not_hold_for_is_refused(load):
    with pytest.raises(ArchitectureError, match="gemma2"):
        orthogonalised(load("gemma2"), np.ones(32))
    with pytest.raises(InputError, match="length 0"):
        orthogonalised(load("llama"), np.zeros(32))
    with pytest.raises(InputError, match="0 harmless"):
        refusal_scores(load("llama"), np.ones((1, 3, 32)), HARMFUL, [], [3])
    with pytest.raises(InputError, match="both are needed"):
        refusal_candidates(load("llama"), HARMFUL, [], n_positions=1)
