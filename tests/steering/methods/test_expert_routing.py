"""RICE's scores equal the golden numbers; turning an expert up touches the tokens that go there and no others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reasonscope.data.errors import ArchitectureError, InputError
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.models.model import load_model
from reasonscope.steering.methods.expert_routing import (
    WEIGHTS,
    Expert,
    ExpertCounts,
    cognitive_experts,
    count_experts,
    npmi,
    random_experts,
    reinforced,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "rice_npmi.json").read_text(encoding="utf-8"))
SEQUENCES = [[5, 6, 7, 8], [9, 6, 5]]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["inputs"]["kind"])
def test_golden_scores(case):
    given, tolerance = case["inputs"], case["tolerance"]
    if given["kind"] == "scalar":
        assert npmi(given["k"], given["K"], given["M"], given["T"]).item() == pytest.approx(
            case["expected"], abs=tolerance
        )
        return
    on = {name: np.array(k) for name, k in given["k"].items()}
    counts = ExpertCounts(on_markers=on, in_total=np.array(given["K"]), markers=given["M"], tokens=given["T"])
    for name, expected in case["expected"]["npmi"].items():
        np.testing.assert_allclose(npmi(on[name], given["K"], given["M"][name], given["T"]), expected, atol=tolerance)
    best = cognitive_experts(counts, weights=given["weights"], top=given["top"])
    assert [[expert.layer, expert.index] for expert in best] == case["expected"]["top_pairs"]


@pytest.fixture(scope="module")
def load(character_tokenizer):
    return lambda family: load_model(tiny_model(family), tokenizer=character_tokenizer)


def test_experts_are_counted_and_turned_up(load):
    model = load("qwen3_moe")
    counts = count_experts(model, SEQUENCES, {"six": 6})
    assert (counts.tokens, counts.markers["six"]) == (7, 2)
    assert counts.in_total.sum(axis=1).tolist() == [14, 0, 14]  # two experts a token; the block between is dense
    ids = torch.tensor([SEQUENCES[0]])
    plain = model.backend.forward(ids, mask=torch.ones_like(ids)).logits
    with reinforced(model, [Expert(0, 1)], 1.0):
        same = model.backend.forward(ids, mask=torch.ones_like(ids)).logits
    every = [Expert(0, index) for index in range(4)]
    with reinforced(model, every, 4.0):
        other = model.backend.forward(ids, mask=torch.ones_like(ids)).logits
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other, atol=1e-3)
    assert torch.equal(plain, model.backend.forward(ids, mask=torch.ones_like(ids)).logits)


def test_a_dense_model_and_counts_that_cannot_be_are_refused(load):
    with pytest.raises(ArchitectureError, match="mixture of experts"):
        count_experts(load("qwen3"), SEQUENCES, {"six": 6})
    for counts in (
        (5, 4, 10, 100),
        (5, 20, 100, 100),
        (5, 20, 4, 100),
        (-1, 20, 10, 100),
        (5, 101, 10, 100),
        (0, 0, 0, 9),
    ):
        with pytest.raises(InputError, match="counts of a part"):
            npmi(*counts)
    assert WEIGHTS == {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}  # the paper's


def test_experts_that_no_marker_met_are_not_candidates(load):
    model = load("qwen3_moe")
    markers = {"<think>": 5, "</think>": 8, "Alternatively": 9}
    counts = count_experts(model, SEQUENCES, markers)
    best = cognitive_experts(counts, top=2)
    assert all(any(on[expert.layer, expert.index] > 0 for on in counts.on_markers.values()) for expert in best)
    assert all(expert.layer != 1 for expert in best)  # the block between is dense
    with reinforced(model, best, 2.0):
        pass
    with pytest.raises(InputError, match="were chosen on a marker"):
        cognitive_experts(counts, top=9)


def test_random_experts_are_other_ones_of_the_same_layers_that_tokens_go_to():
    in_total = np.array([[5, 0, 2, 3, 1, 4], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    chosen = [Expert(0, 2), Expert(2, 0), Expert(2, 5)]
    sets = random_experts(chosen, in_total, n_controls=20, seed=1)
    assert len({frozenset(one) for one in sets}) == len(sets) == 20  # of 4 times 6
    for one in sets:
        assert sorted(expert.layer for expert in one) == [0, 2, 2]
        assert not set(one) & {*chosen, Expert(0, 1)}
    assert not set(sets[0]) & set(sets[1])  # as many as fit share nothing
    assert sets == random_experts(chosen, in_total, n_controls=20, seed=1)
    with pytest.raises(InputError, match="block 2 has 2 other experts that tokens go to, fewer than the 4"):
        random_experts([Expert(2, i) for i in range(4)], in_total)
