"""Ablations and patches as results: what was measured beside its controls, in the format of every analysis."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.data.arrays import Values
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.effects import AblationEffect
from reasonscope.steering.ablation.patching import PatchEffect, PatchPair
from reasonscope.steering.ablation.plan import Sweep
from reasonscope.steering.ablation.regeneration import RegenerationEffect

_ABLATION, ANSWERS, _PATCHING = "ablation", "ablation_answers", "patching"
_METRICS = {
    "recovered logit difference": "share",
    "recovered probability": "share",
    "logit difference": "logits",
    "probability": "1",
}


def ablation_result(
    effects: Mapping[str, AblationEffect], sweeps: Mapping[str, Sweep], provenance: Mapping[str, Any]
) -> Result:
    """Axes (ablation,): nats per answer token, with intervals over problems; the null is the range of the random sets.

    `arrays` hold every control: `controls` and `matched` (ablation, draw), NaN if there are fewer, and `losses` (ablation, trace).
    """
    found = list(effects.values())
    traces = list(found[0].losses)
    nulls = [(min(one.null), max(one.null)) for one in found]
    return Result(
        method=_ABLATION,
        quantity="log-likelihood that the given answers lose",
        unit="nats per answer token",
        axes=(Axis.of("ablation", effects),),
        values=np.array([one.effect.value for one in found]),
        null=Band(
            low=np.array([low for low, _ in nulls]), high=np.array([high for _, high in nulls]), what=_what(found)
        ),
        interval=Band(
            low=np.array([one.effect.low for one in found]),
            high=np.array([one.effect.high for one in found]),
            what="over problems, 95 %",
        ),
        arrays={
            "controls": _table([one.null for one in found]),
            "matched": _table([one.matched for one in found]),
            "losses": np.array([[one.losses[id] for id in traces] for one in found]),
        },
        numbers={
            "ablations": {name: one.to_dict() for name, one in effects.items()},
            "sweeps": {name: asdict(sweep) for name, sweep in sweeps.items()},
            "traces": traces,
        },
        provenance=provenance,
    )


def answers_result(effects: Mapping[str, RegenerationEffect], provenance: Mapping[str, Any]) -> Result:
    """Axes (ablation, metric): what the ablated model wrote; the null is the range of models without as many random others."""
    found = list(effects.values())
    metrics = list(dict.fromkeys(name for one in found for name in one.arm.measures))
    values, low, high = (np.full((len(found), len(metrics)), np.nan) for _ in range(3))
    null = np.full((2, len(found), len(metrics)), np.nan)
    for i, one in enumerate(found):
        for j, name in enumerate(metrics):
            if (measured := one.arm.measures.get(name)) is not None:
                values[i, j], low[i, j], high[i, j] = measured.value, measured.low, measured.high
            if by_chance := [arm.measures[name].value for arm in one.random if name in arm.measures]:
                null[:, i, j] = min(by_chance), max(by_chance)
    return Result(
        method=ANSWERS,
        quantity="what the ablated model writes",
        unit="1",
        axes=(Axis.of("ablation", effects), Axis.of("metric", metrics)),
        values=values,
        null=Band(low=null[0], high=null[1], what="range of models without as many random others"),
        interval=Band(low=low, high=high, what="over problems, 95 %"),
        reason="" if np.isfinite(values).all() else "a measure is undefined for this ablation",
        numbers={
            "units": {"tokens": "tokens", "kl": "nats per token", "perplexity": "1"},
            "ablations": {name: one.to_dict() for name, one in effects.items()},
        },
        provenance=provenance,
    )


def patching_result(model: Model, found: PatchEffect, pair: PatchPair, provenance: Mapping[str, Any]) -> Result:
    """Axes (metric, layer, token) or (metric, layer, head); the null is the range of the states of unrelated texts at the same places.

    Recovered is the share of the way from the corrupted to the clean text: 0 changes nothing, 1 gives the clean text's answer back.
    """
    shape = found.logit_difference.shape
    raw = np.stack([found.logit_difference, found.probability])
    by_chance = np.stack([_with_shares(one, found) for one in found.null]) if len(found.null) else None
    last = "head" if found.at == "heads" else "token"
    reasons = [
        "the two texts give the right and the wrong token the same logits"
        * (found.of_clean[0] == found.of_corrupted[0]),
        model.layout.without_heads if found.at == "heads" else "",
        "some blocks lack the site" * bool(np.isnan(raw).all(axis=(0, 2)).any()),
    ]
    null = None
    if by_chance is not None:
        what = f"range of the states of {len(by_chance)} unrelated texts at the same place"
        null = Band(low=by_chance.min(axis=0), high=by_chance.max(axis=0), what=what)
    return Result(
        method=_PATCHING,
        quantity=f"the answer given back by the clean text's {'heads' if found.at == 'heads' else found.at}",
        unit="1",
        axes=(Axis.of("metric", _METRICS), Axis.of("layer", shape[0]), Axis.of(last, found.places)),
        values=_with_shares(raw, found),
        null=null,
        null_missing="" if null else "no unrelated text was given",
        reason=next((reason for reason in reasons if reason), ""),
        numbers={
            "units": _METRICS,
            "at": found.at,
            "clean": dict(zip(("logit difference", "probability"), found.of_clean, strict=True)),
            "corrupted": dict(zip(("logit difference", "probability"), found.of_corrupted, strict=True)),
            "right": _text(model, pair.right),
            "wrong": _text(model, pair.wrong),
            **({} if last == "head" else {"pieces": [_text(model, pair.corrupted[i]) for i in found.places]}),
        },
        provenance=provenance,
    )


def _with_shares(raw: Values, found: PatchEffect) -> Values:
    """Logit difference and probability (2, layer, place), after the shares that they recover: (4, layer, place)."""
    shares = []
    for values, clean, corrupted in zip(raw, found.of_clean, found.of_corrupted, strict=True):
        gap = clean - corrupted
        shares.append((values - corrupted) / gap if gap else np.full_like(values, np.nan))
    return np.stack([*shares, *raw])


def _what(found: Sequence[AblationEffect]) -> str:
    """The controls in words, if they are the same for all."""
    what = {one.control for one in found}
    return f"range of {what.pop() if len(what) == 1 else 'as many random others'}"


def _table(rows: Sequence[Sequence[float]]) -> Values:
    table = np.full((len(rows), max(1, *map(len, rows))), np.nan)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def _text(model: Model, token: int) -> str:
    return str(model.tokenizer_backend.decode([token], skip_special_tokens=False))
