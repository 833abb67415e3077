"""The findings of ablations read as sentences, and every number has its control."""

from dataclasses import replace

import numpy as np

from reasonscope.data.intervals import Estimate
from reasonscope.probes.architecture.heads import Head
from reasonscope.steering import Ablation, AblationEffect
from reasonscope.steering.ablation.effects import _Split
from reasonscope.steering.ablation.summaries import ablation_summary, regeneration_summary, split_summary


def estimate(value, half):
    return Estimate(value=value, low=value - half, high=value + half)


def effect(value, null, p):
    return AblationEffect(
        ablation=Ablation(name="heads", heads=(Head(layer=1, index=0),)),
        effect=estimate(value, 0.05),
        null=tuple(null),
        n_disjoint=len(null),
        p_value=p,
        side_effects={"kl_thinking": estimate(0.2, 0.01)},
        n_edited=10,
        control="as many random heads of the same layers",
        losses={"a/0": 0.1, "b/0": 0.5},
    )


def test_an_ablation_says_which_p_its_controls_allow():
    few = effect(0.3, [0.0, 0.1, 0.2], 1 / 4)
    found = ablation_summary({"heads": few})
    assert found.finding == (
        "heads: the given answers become 0.3 [0.25, 0.35] nats less likely per token; as many random heads of the same layers give "
        "0.1 [0, 0.2] (p = 0.25, at best 0.25)."
    )
    assert "p cannot reach 0.05" in found.notes[0]
    assert found.notes[1:] == ["Over 2 traces. Random controls: as many random heads of the same layers."]
    rng = np.random.default_rng(0)
    both = ablation_summary({"heads": few, "mlp": effect(1.0, rng.normal(0, 0.1, 40).tolist(), 1 / 41)})
    assert both.finding.startswith("1 of 2 ablations") and both.finding.endswith(": mlp.")
    assert [row[2].rpartition(", ")[2] for row in both.rows] == ["n = 3", "n = 40"]
    assert [row[3] for row in both.rows] == ["0.25 (least 0.25)", "0.0244 (least 0.0244)"]


def test_moves_as_far_have_a_column_of_their_own():
    found = replace(effect(0.3, [0.0, 0.1, 0.2], 1 / 4), matched=(0.4, 0.1, 0.0))
    (row,) = ablation_summary({"heads": found}).rows
    assert row[4:6] == ("0.1 [0, 0.4]", "0.5")


def test_parts_of_the_traces_stand_beside_their_own_controls():
    assert split_summary({"heads": effect(0.3, [0.0], 0.5)}) is None
    on = _Split(n_traces=3, effect=estimate(0.4, 0.1), null=(0.0, 0.1), matched=(), p_value=0.04)
    off = replace(on, effect=estimate(0.0, 0.1), p_value=1.0)
    found = split_summary({"heads": replace(effect(0.3, [0.0], 0.5), splits={"thinking on": on, "thinking off": off})})
    assert found.finding == (
        "On parts of the traces, 1 of 2 effects are beyond chance (p ≤ 0.05); beyond their controls: heads (thinking on)."
    )
    assert [row[1:3] for row in found.rows] == [("thinking on", "3"), ("thinking off", "3")]


def test_without_problems_nothing_is_written_again():
    assert regeneration_summary({}) is None
    told = regeneration_summary({}, not_measured={"edges": "nothing was cut"})
    assert told.notes == ["edges did not answer again: nothing was cut."]
