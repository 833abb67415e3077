"""The findings of ablations in words, with tables that show every number next to its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from reasonscope.data.intervals import Estimate
from reasonscope.data.summary import Summary, in_percent, in_words, plural
from reasonscope.steering.experiments.summaries import (
    REFUSED,
    column,
    measures_in_words,
    range_in_words,
    range_of_changes,
)

if TYPE_CHECKING:  # they make their summaries here
    from reasonscope.steering.ablation.effects import AblationEffect
    from reasonscope.steering.ablation.regeneration import RegenerationEffect


def ablation_summary(
    effects: Mapping[str, AblationEffect], *, files: Sequence[str] = (), next_command: str = ""
) -> Summary:
    """How much less likely each ablation makes the given answers, beside random ablations and random moves of the same size."""
    moves = any(found.matched for found in effects.values())
    rows = []
    for name, found in effects.items():
        sure = f"{in_words(found.p_value)} (least {in_words(found.smallest_p)})"
        own = (name, in_words(found.effect), f"{_middle_and_range(found.null)}, n = {len(found.null)}", sure)
        far = (_middle_and_range(found.matched), in_words(found.p_matched)) if moves else ()
        rows.append((*own, *far, in_words(found.side_effects.get("kl_thinking"))))
    columns = ("ablation", "nats per answer token", "random others (median, range)", "p")
    return Summary(
        finding=_ablation_finding(effects),
        columns=(*columns, *(("moved as far", "its p") if moves else ()), "KL of the thinking"),
        rows=rows,
        notes=[*_few_controls(effects), *_read(effects)],
        files=files,
        next_command=next_command,
    )


def split_summary(effects: Mapping[str, AblationEffect]) -> Summary | None:
    """The same on parts of the traces; None if these do not differ in difficulty or in whether they think."""
    rows = [
        (name, part, f"{one.n_traces}", in_words(one.effect), _middle_and_range(one.null), in_words(one.p_value))
        for name, found in effects.items()
        for part, one in found.splits.items()
    ]
    if not rows:
        return None
    beyond = [f"{row[0]} ({row[1]})" for row in rows if float(row[5]) <= 0.05]
    said = f"beyond their controls: {', '.join(beyond)}" if beyond else "none is beyond its controls"
    return Summary(
        finding=f"On parts of the traces, {len(beyond)} of {len(rows)} effects are beyond chance (p ≤ 0.05); {said}.",
        columns=("ablation", "traces", "n", "nats per answer token", "random others (median, range)", "p"),
        rows=rows,
    )


def regeneration_summary(
    effects: Mapping[str, RegenerationEffect],
    *,
    not_measured: Mapping[str, str] | None = None,
    next_command: str = "",
) -> Summary | None:
    """What the ablated model writes when it answers again, beside random ablations; None if no ablation was asked for that."""
    notes = [f"{name} did not answer again: {why}." for name, why in (not_measured or {}).items()]
    if not effects:
        return Summary(finding="No ablated model answered again.", notes=notes) if notes else None
    measured = [name for name in ("accuracy", *REFUSED) if any(name in one.arm.measures for one in effects.values())]
    rows = [
        (
            name,
            in_words(one.arm.tokens),
            in_percent(one.arm.change),
            range_of_changes(one.random),
            *measures_in_words(one.arm, measured),
            *(
                range_in_words([arm.measures[key].value for arm in one.random if key in arm.measures])
                for key in measured
            ),
            f"{one.n_changed} of {len(one.answers)}",
        )
        for name, one in effects.items()
    ]
    of_random = [f"{column(name)}, random" for name in measured]
    n = next(iter(effects.values())).arm.n_problems
    return Summary(
        finding=f"When the ablated model answers {plural(n, 'problem')} again, {_changed(effects)}.",
        columns=("ablation", "thinking tokens", "change", "random", *map(column, measured), *of_random, "other answer"),
        rows=rows,
        notes=notes,
        next_command=next_command,
    )


def _middle_and_range(null: Sequence[float]) -> str:
    """The median of the controls, the lowest and the highest; a dash without any."""
    if not len(null):
        return "–"
    middle, low, high = np.quantile(null, [0.5, 0, 1])
    return in_words(Estimate(value=float(middle), low=float(low), high=float(high)))


def _ablation_finding(effects: Mapping[str, AblationEffect]) -> str:
    if len(effects) == 1:
        ((name, found),) = effects.items()
        return (
            f"{name}: the given answers become {_less_likely(found.effect)} per token; {found.control} give "
            f"{_middle_and_range(found.null)} (p = {in_words(found.p_value)}, at best {in_words(found.smallest_p)})."
        )
    found_beyond = [name for name, found in effects.items() if found.p_value <= 0.05]
    which = f": {', '.join(found_beyond)}" if found_beyond else ""
    return (
        f"{len(found_beyond)} of {len(effects)} ablations make the given answers less likely than random ablations"
        f" of the same size do (p ≤ 0.05){which}."
    )


def _less_likely(effect: Estimate) -> str:
    more = effect.value < 0
    turned = Estimate(value=-effect.value, low=-effect.high, high=-effect.low) if more else effect
    return f"{in_words(turned)} nats {'more' if more else 'less'} likely"


def _few_controls(effects: Mapping[str, AblationEffect]) -> list[str]:
    few = [name for name, found in effects.items() if found.smallest_p > 0.05]
    if not few:
        return []
    return [
        f"{', '.join(few)}: fewer than 19 other ablations of this size exist, so p cannot reach 0.05 (see “least”); "
        "look at the effect beside its controls, or use a model with more heads and layers."
    ]


def _read(effects: Mapping[str, AblationEffect]) -> list[str]:
    """How many traces were read, and what the controls are."""
    what = dict.fromkeys(found.control for found in effects.values())
    n = sorted({len(found.losses) for found in effects.values()})
    return [f"Over {' or '.join(map(str, n))} traces. Random controls: {'; '.join(what)}."] if n != [0] else []


def _changed(effects: Mapping[str, RegenerationEffect]) -> str:
    name, most = max(effects.items(), key=lambda item: item[1].n_changed)
    if not most.n_changed:
        return "every final answer stays as it was"
    return f"{name} changes {most.n_changed} of {len(most.answers)} final answers"
