"""What happened in runs in which something stopped the model while it wrote, with the tokens of the answers that it forced to decide."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reasonscope.analysis.exits.outcomes import Outcomes
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.generation.monitored import LEARNED_FROM, MONITOR_KEY
from reasonscope.probes.models.model import Model
from reasonscope.steering.exits.places import Places
from reasonscope.steering.exits.rules import rule_named, stopping_place
from reasonscope.steering.exits.signals import PlaceReader
from reasonscope.steering.recipes.controls import EXIT, ControlPart
from reasonscope.steering.recipes.recipe import Recipe


def live_outcomes(
    store: TraceStore, judged: Sequence[Trace], model: Model, reader: PlaceReader
) -> tuple[Outcomes, str]:
    """What happened to these traces in a run in which something stopped the model, and why tokens of forced answers are missing, if any.

    Raises InputError if it lacks one of them, or if what stopped it learned from one of their problems.
    """
    known = set(store.ids)
    if missing := [trace.id for trace in judged if trace.id not in known]:
        raise InputError(
            f"{store.path} has no trace {missing[0]!r}; record the same problems and samples with --monitor, or leave the run out"
        )
    _check_held_out(store, {trace.problem.group for trace in judged})
    traces = [store.trace(trace.id) for trace in judged]
    tried, why_not = _tried(store, traces, model, reader)
    written = np.array([float(len(trace.written_thinking)) for trace in traces])
    right = np.array([float(trace.correct is True) for trace in traces])
    return Outcomes(right=right, tokens=written + tried), why_not


def _tried(store: TraceStore, traces: Sequence[Trace], model: Model, reader: PlaceReader) -> tuple[Values, str]:
    """The tokens of the answers that a run forced in each trace, and why they are not known, if they are not.

    A run does not keep them. The same rule forces the same answers along its finished text, since they are greedy.
    """
    none = np.zeros(len(traces))
    if store.recipe is None:
        return none, ""
    if not store.recipe.exists():
        return none, "the run has lost its recipe"
    recipe = Recipe.load(store.recipe)
    tries = [part for part in recipe.controls if part.name == EXIT and rule_named(part.settings["rule"]).tries]
    if not tries:
        return none, ""
    if recipe.parts:
        return none, "vectors steered the model that wrote them"
    (part,) = tries
    places = Places.of(model, kind=part.settings["kind"], every=part.settings["every"])
    each = tracked(traces, "forcing the answers of a live run", "traces")
    return np.array([_tokens_of_tries(part, places, reader, trace) for trace in each]), ""


def _tokens_of_tries(part: ControlPart, places: Places, reader: PlaceReader, trace: Trace) -> float:
    """The tokens that a rule took to decide, until it stopped."""
    rule, ids = rule_named(part.settings["rule"]), trace.token_ids.tolist()
    assert rule.tries is not None
    cuts, spent = places.of_trace(trace)
    found = reader.read(ids, cuts, spent, margins=rule.passes)
    found = reader.forced(found, ids, cuts, rule.tries(found))
    at = stopping_place(rule.statistic(found), part.settings["threshold"])
    return float(found.trial[: None if at is None else at + 1].sum())


def _check_held_out(store: TraceStore, groups: set[str]) -> None:
    """Raise InputError if the monitor or the recipe of a run learned from any of these groups of problems, or does not say."""
    sources: list[Mapping[str, Any]] = []
    if (monitor := store.meta.get(MONITOR_KEY)) is not None:
        sources.append({"groups": monitor[LEARNED_FROM]} if LEARNED_FROM in monitor else {})
    if store.recipe is not None and store.recipe.exists():
        sources.append(Recipe.load(store.recipe).learned)
    for learned in sources:
        if "groups" not in learned:
            raise InputError(
                f"what stopped {store.path} does not say which problems it learned from, so it cannot be judged; make it again and "
                "record the run again"
            )
        if seen := sorted(groups & {*learned["groups"]}):
            raise InputError(
                f"what stopped {store.path} learned from {len(seen)} of the problems to judge on ({seen[0]!r} …); "
                "judge the split that it comes from (the same --held-out and --seed), or record other problems"
            )
