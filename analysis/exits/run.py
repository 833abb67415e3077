"""Early exits on a run: force answers along its traces, choose thresholds on some problems, and judge the rules on the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reasonscope.analysis.exits.evaluation import TOLERANCES, ExitReport, check_tolerance, exit_report
from reasonscope.analysis.exits.kept import KeptSignals
from reasonscope.analysis.exits.live import live_outcomes
from reasonscope.analysis.exits.probe import ExitProbe, false_alarm_threshold, fit_exit_probe
from reasonscope.analysis.exits.signals import ExitSignals
from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.branches import PrefixWriter
from reasonscope.probes.models.model import Model
from reasonscope.probes.properties.refusal_cliff import token_scores
from reasonscope.steering.exits.places import PlaceKind, Places
from reasonscope.steering.exits.rules import PROBE, slug
from reasonscope.steering.exits.signals import PlaceReader
from reasonscope.steering.experiments.held_out import split_run
from reasonscope.steering.recipes.controls import exit_part
from reasonscope.steering.recipes.recipe import Recipe


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitStudy:
    """Early exits of a run.

    Attributes:
        report: What the rules save and cost.
        judged: The ids of the traces that they are judged on.
        calibrated: The groups of problems that thresholds come from.
        fitted: The probe that was fitted on the other traces; None if one was given, or none could be.
        probe: What the rule "probe" read; None without one.
        without_probe: Why no probe could be fitted; empty if one could, or was given.
        places: After what thinking may stop, and how many tokens these places are apart.
        seed: The random seed.
        n_kept: Of how many traces the forced answers were kept from before.
        n_traces: Traces on both sides.
        uncounted: Live runs of which the tokens of forced answers are not known, and why.
    """

    report: ExitReport
    judged: tuple[str, ...]
    calibrated: tuple[str, ...]
    fitted: ExitProbe | None
    probe: LinearProbe | None
    without_probe: str
    places: tuple[PlaceKind, int]
    seed: int
    n_kept: int
    n_traces: int
    uncounted: Mapping[str, str] = field(default_factory=dict)


def early_exits(
    store: TraceStore,
    model: Model,
    *,
    probe: LinearProbe | None = None,
    live: Mapping[str, TraceStore] | None = None,
    at: Sequence[tuple[str, float]] = (),
    tolerance: float = 0.02,
    held_out: float = 0.5,
    n: int | None = None,
    kind: PlaceKind = "paragraph",
    every: int = 4,
    batch_size: int = 32,
    keep: Path | None = None,
    false_alarms: float | None = None,
    seed: int = 0,
) -> ExitStudy:
    """Measure what stopping the thinking early would have saved on a run, by several rules, beside a fixed budget.

    Args:
        store: A run with gold answers; with residual states for a probe.
        model: The model that wrote it.
        probe: What the rule "probe" reads; traces that it learned from are left out. By default a probe of right answers is fitted on the
            problems that are not held out.
        live: Runs of the same problems and samples in which something stopped the model while it wrote, by name.
        at: Rules at thresholds of your own, judged beside the others: (name, threshold).
        tolerance: Accuracy that a threshold may cost; thresholds at 0, .02, .05 and .1 are chosen, too.
        held_out: Share of the groups of problems that the rules are judged on, of those with thinking that the probe did not learn from.
        n: At most so many problems to judge on.
        kind: Thinking may stop after each "paragraph" or "sentence".
        every: The fewest tokens of thinking between two places.
        batch_size: Answers that are forced together.
        keep: A folder for the forced answers, from which another study, or this one after an interruption, goes on.
        false_alarms: Judge `probe` at the conformal threshold, too, that it passes at a wrong answer in at most this share of problems.
        seed: Random seed.

    Returns:
        The report, with the fitted probe.

    Raises:
        InputError: If there are too few problems with thinking and a gold answer, no thinking that thresholds come from has a place to
            stop, a live run lacks one of the traces, or the tolerance is not between 0 and 1.

    Example:
        study = early_exits(rs.open_run("runs/mine").store, model)
        print(exit_summary(study))
    """
    check_tolerance(tolerance)
    traces = [trace for trace in store if _usable(trace)]
    if not traces:
        raise InputError("no trace has thinking, tokens and a gold answer; record problems with answers")
    if probe is not None:
        traces = probe.unseen(traces)
    calibrated, judged = _sides(traces, held_out, n, seed)
    places = Places.of(model, kind=kind, every=every)
    reader = PlaceReader(model, writer=PrefixWriter(model, batch_size=batch_size), seed=seed)
    kept = KeptSignals(keep, {"model": store.meta.get("model", {}), "places": [kind, every], "seed": seed})
    found = {
        trace.id: kept.of(reader, places, trace)
        for trace in tracked([*calibrated, *judged], "forcing answers", "traces")
    }
    learned, tested = ([found[trace.id] for trace in side] for side in (calibrated, judged))
    if not any(len(one.cuts) for one in learned):
        raise InputError(
            f"no thinking that thresholds come from has the end of a {kind} before its own end; "
            "choose other places to stop (--places), or record more problems"
        )
    fitted, why_not = (None, "") if probe else _fitted(store, learned, seed)
    if fitted is not None:
        learned = [one.with_score(fitted.held_out.get(one.trace, one.score)) for one in learned]
        tested = _scored(fitted.probe, store, tested)
    elif probe is not None:
        learned, tested = _scored(probe, store, learned), _scored(probe, store, tested)
    if false_alarms is not None:
        if probe is None:
            raise InputError("a threshold by false alarms needs a saved probe of other problems; give --probe")
        at = [*at, (PROBE, false_alarm_threshold(probe, learned, false_alarms=false_alarms))]
    watched = {name: live_outcomes(other, judged, model, reader) for name, other in (live or {}).items()}
    report = exit_report(
        learned,
        tested,
        tolerances=tuple(dict.fromkeys((*TOLERANCES, tolerance))),
        live={name: outcomes for name, (outcomes, _) in watched.items()},
        at=at,
        seed=seed,
    )
    return ExitStudy(
        report=report,
        judged=tuple(trace.id for trace in judged),
        calibrated=tuple(sorted({trace.problem.group for trace in calibrated})),
        fitted=fitted,
        probe=fitted.probe if fitted else probe,
        without_probe=why_not,
        places=(kind, every),
        seed=seed,
        n_kept=kept.n_found,
        n_traces=len(found),
        uncounted={name: why for name, (_, why) in watched.items() if why},
    )


def _scored(probe: LinearProbe, store: TraceStore, signals: Sequence[ExitSignals]) -> list[ExitSignals]:
    """The signals with what the probe says after the last token before each cut."""
    return [
        one.with_score(token_scores(probe, store, store.trace(one.trace))[one.cuts - 1]) if len(one.cuts) else one
        for one in signals
    ]


def exit_recipes(study: ExitStudy, tolerance: float, *, provenance: Mapping[str, Any] | None = None) -> list[Recipe]:
    """The rules of a study at one tolerance, and at thresholds of your own, as recipes that stop a model while it writes.

    A rule whose threshold is to stop nowhere has none.
    """
    kind, every = study.places
    recipes = []
    for point in study.report.at(tolerance):
        rule, _, given = point.rule.partition(" = ")
        if not np.isfinite(point.threshold):
            continue
        part = exit_part(
            rule,
            point.threshold,
            probe=study.probe if rule == PROBE else None,
            kind=kind,
            every=every,
            seed=study.seed,
        )
        name = f"exit-{slug(rule)}" + (f"-{given}" if given else "")
        read = study.probe.provenance.get("learned_from", ()) if rule == PROBE and study.probe else ()
        about = {"method": name, "groups": sorted({*study.calibrated, *read}), **(provenance or {})}
        recipes.append(Recipe(name=name, controls=(part,), provenance=about))
    return recipes


def _usable(trace: Trace) -> bool:
    return trace.correct is not None and len(trace.token_ids) > 0 and trace.n_thinking_tokens > 0


def _sides(traces: Sequence[Trace], held_out: float, n: int | None, seed: int) -> tuple[list[Trace], list[Trace]]:
    """The traces to calibrate on and to judge on."""
    split = split_run(traces, share=held_out, n=n, seed=seed)
    learn, judge = set(split.ids), {problem.id for problem in split.held_out}
    sides = [t for t in traces if t.id in learn], [t for t in traces if t.id not in learn and t.problem.id in judge]
    for side, what in zip(sides, ("calibrate", "judge"), strict=True):
        if len({trace.problem.group for trace in side}) < 2:
            raise InputError(f"fewer than two groups of problems with thinking to {what} on; record more problems")
    return sides


def _fitted(store: TraceStore, signals: Sequence[ExitSignals], seed: int) -> tuple[ExitProbe | None, str]:
    sites = [site for site in map(Site.parse, store.sites) if site.point == "resid_post"]
    try:
        return fit_exit_probe(store, signals, sites, seed=seed), ""
    except InputError as error:  # the other rules need no probe
        return None, str(error)
