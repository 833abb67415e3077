"""Does the model mean to refuse? Probes on what it went on to do, and the cliff at the closing tag (arXiv 2510.06036)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths
from reasonscope.data.text.behaviour import Behaviour, behaviour
from reasonscope.data.trace import Trace
from reasonscope.probes.evaluation.baselines import Points, baseline_features, residual_sites
from reasonscope.probes.evaluation.comparison import N_RESAMPLES, Comparison
from reasonscope.probes.evaluation.grouped_folds import trace_groups
from reasonscope.probes.fitting.held_out import HeldOut, LayerMap, compare_binary, held_out_probes, layer_map
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.permuted_sweep import N_PERMUTATIONS
from reasonscope.probes.fitting.positions import Position, has_cliff, row_at, states_at
from reasonscope.probes.properties.judge import Verdicts
from reasonscope.probes.properties.refusal_cliff import PLATEAU, Cliff, cliff, random_direction_drops, token_scores
from reasonscope.probes.properties.report import NO_TRACES, class_shortage, not_closed, probe_numbers, undefined_notes

RequestLabel = Literal["harmful", "benign"]
RequestOutcome = tuple[RequestLabel, Behaviour]

_HARMFUL_COMPLIED: RequestOutcome = ("harmful", "complied")
_BENIGN_COMPLIED: RequestOutcome = ("benign", "complied")
_BASELINES = ("prompt_length", "bag_of_words", "thinking_length")
_MAIN = "refusal"
_RECORD = "reasonscope record --problems requests --n 160 --out RUN"


def cell(trace: Trace, behaviours: Mapping[str, Behaviour] | None = None) -> RequestOutcome:
    """Which of the cells (harmful or benign) × (refused, complied or unclear) a trace falls into.

    What it did is judged by the rules, or given by `behaviours` (by id; a trace that is missing there is unclear). Raises InputError if
    the problem's meta does not say whether the request is harmful.
    """
    harmful = trace.problem.meta.get("harmful")
    if not isinstance(harmful, bool):
        raise InputError(
            f"problem {trace.problem.id!r} does not say whether its request is harmful (meta.harmful is {harmful!r}); "
            'write "meta": {"harmful": true} or false in the problem file'
        )
    done = behaviour(trace) if behaviours is None else behaviours.get(trace.id, "unclear")
    return "harmful" if harmful else "benign", done


@dataclass(frozen=True, kw_only=True)
class _Contrast:
    """Which requests a probe learns to tell apart, and where in the trace it learns.

    Attributes:
        positive: Cells of the positive class.
        negative: Cells of the negative class.
        negative_at_window: Cells that belong to the negative class at the close window only; their thinking is not learned from.
        positions: Where the probe learns. The last is the close window, where the answer is decided.
        predicted: What the probe predicts, for a sentence: "predicts …".
    """

    positive: frozenset[RequestOutcome]
    negative: frozenset[RequestOutcome]
    negative_at_window: frozenset[RequestOutcome] = frozenset()
    positions: tuple[Position, ...] = ("window",)
    predicted: str = "which class a request belongs to"

    def __post_init__(self) -> None:
        if self.positions[-1:] != ("window",):
            raise InputError(f"positions {self.positions}: the last has to be 'window', where the answer is decided")

    def is_training_cell(self, of: RequestOutcome, position: Position) -> bool:
        """Whether the probe learns from traces of the cell `of` at `position`."""
        return of in self.positive | self.negative or (position == "window" and of in self.negative_at_window)

    def rows(self, cells: Sequence[RequestOutcome]) -> tuple[list[int], Values]:
        """The rows that the probe learns from at the window, and their targets, 1 for the positive class."""
        rows = [i for i, of in enumerate(cells) if self.is_training_cell(of, "window")]
        return rows, np.array([cells[i] in self.positive for i in rows], dtype=np.float64)


CONTRASTS: Mapping[str, _Contrast] = {
    # What the model will do with requests of the same kind: this is the probe of refusal.
    "refusal": _Contrast(
        positive=frozenset({("harmful", "refused")}),
        negative=frozenset({("harmful", "complied")}),
        predicted="whether the model will refuse a harmful request",
    ),
    # What was asked, whatever the model does.
    "harmfulness": _Contrast(
        positive=frozenset({("harmful", "refused"), ("harmful", "complied")}),
        negative=frozenset({("benign", "refused"), ("benign", "complied")}),
        predicted="whether the request is harmful",
    ),
    # Will it refuse, at matching positions? Along the thinking the probe learns only from traces whose outcome matches their stated
    # intent, at the close window from all. It learns nothing from the thinking of traces that noticed the harm and complied, so that
    # their plateau is a finding.
    "intent": _Contrast(
        positive=frozenset({("harmful", "refused")}),
        negative=frozenset({("benign", "complied")}),
        negative_at_window=frozenset({("harmful", "complied")}),
        positions=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0, "window"),
        predicted="whether the model will refuse",
    ),
}


@dataclass(frozen=True, kw_only=True)
class CliffStudy:
    """How far the scores of one probe fall at the closing tag, and how far they would fall by chance.

    Every state changes at a closing tag, so a drop alone says little.

    Attributes:
        cliffs: The cliff of each cell with at least two problems.
        scores: Scores of every trace by id, (token,), each from a probe that was not fitted on its problem.
        random: Mean drop of harmful requests that were complied with along random directions, (direction,).
        excess: How much further these fall than benign requests that were complied with; None without such benign requests.
        random_excess: The same along random directions, (direction,).
    """

    cliffs: Mapping[RequestOutcome, Cliff]
    scores: Mapping[str, Values]
    random: Values
    excess: Estimate | None
    random_excess: Values | None

    @property
    def above_nulls(self) -> bool:
        """Whether the interval of the drop lies above that of benign requests and above 97.5 % of the random directions."""
        benign = self.cliffs.get(_BENIGN_COMPLIED)
        low = self.cliffs[_HARMFUL_COMPLIED].drop.low
        return benign is not None and low > benign.drop.high and low > float(np.quantile(self.random, 0.975))

    @property
    def excess_above_random(self) -> bool:
        """Whether the interval of the excess lies above 97.5 % of the random directions."""
        if self.excess is None or self.random_excess is None:
            return False
        return self.excess.low > float(np.quantile(self.random_excess, 0.975))

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON; for random directions the mean, the central 95 % and the highest."""
        shown: dict[str, Any] = {" ".join(of): cliff.to_dict() for of, cliff in self.cliffs.items()}
        highest = float(self.random.max())
        shown["random_directions"] = {"drop": _middle(self.random).to_dict(), "highest": highest, "n": len(self.random)}
        shown["above_nulls"] = self.above_nulls
        if self.excess is not None and self.random_excess is not None:
            shown["excess_over_benign"] = {
                **self.excess.to_dict(),
                "random_directions": _middle(self.random_excess).to_dict(),
                "above_random": self.excess_above_random,
            }
        return shown

    def sentence(self, name: str) -> str:
        """What the cliff of the contrast `name` shows."""
        fell, benign, chance = self.cliffs[_HARMFUL_COMPLIED], self.cliffs.get(_BENIGN_COMPLIED), _middle(self.random)
        others = "" if benign is None else f"; for benign requests by {in_hundredths(benign.drop)}"
        verdict = "more than both" if self.above_nulls else "not more than by chance"
        return (
            f"Cliff of {name} at the end of the thinking: for {len(fell.ids)} harmful requests that were complied with, the probability "
            f"falls from {in_hundredths(fell.plateau.value)} to {in_hundredths(fell.end.value)}, by {in_hundredths(fell.drop)}{others}; "
            f"along random directions by {in_hundredths(chance.low)} to {in_hundredths(chance.high)} ({verdict})."
        )


@dataclass(frozen=True, kw_only=True)
class RefusalReport:
    """What the state at the last token of the close window says about the answer, and what the states before it say.

    Attributes:
        comparisons: By contrast, the AUROC on held-out problems among the cells of the contrast.
        cliffs: By contrast, the cliffs of all traces; absent if fewer than two harmful requests were complied with.
        probes: By contrast, the probe that was fitted on all training rows.
        contrasts: The contrasts that were fitted.
        undefined: What could not be fitted or measured, and why.
        cells: Number of traces in each cell.
        n_left_out: Traces without closed thinking or without an answer, which are in nothing else.
        n_groups: Groups of problems among the others.
        verdicts: Who labelled the answers; None for the rules.
    """

    comparisons: Mapping[str, Comparison]
    cliffs: Mapping[str, CliffStudy]
    probes: Mapping[str, LinearProbe]
    contrasts: Mapping[str, _Contrast]
    undefined: Mapping[str, str]
    cells: Mapping[RequestOutcome, int]
    n_left_out: int
    n_groups: int
    verdicts: Verdicts | None = None

    @property
    def main(self) -> str:
        """The contrast that the report is about: "refusal", or the first that could be fitted."""
        return _MAIN if _MAIN in self.comparisons else next(iter(self.comparisons))

    @property
    def comparison(self) -> Comparison:
        """The comparison of the contrast `main`."""
        return self.comparisons[self.main]

    @property
    def probe(self) -> LinearProbe:
        """The probe of the contrast `main`."""
        return self.probes[self.main]

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON; `comparison` and `probe` are those of the contrast `main`, `contrasts` has all of them."""
        contrasts = {
            name: {
                "comparison": comparison.to_dict(),
                "probe": probe_numbers(self.probes[name]),
                **({"cliffs": self.cliffs[name].to_dict()} if name in self.cliffs else {}),
            }
            for name, comparison in self.comparisons.items()
        }
        return {
            "main": self.main,
            "comparison": self.comparison.to_dict(),
            "probe": probe_numbers(self.probe),
            "contrasts": contrasts,
            "undefined": dict(self.undefined),
            "cells": {" ".join(of): count for of, count in sorted(self.cells.items())},
            "n_left_out": self.n_left_out,
            "n_groups": self.n_groups,
            "labels": self.verdicts.to_dict() if self.verdicts else {"by": "rules"},
        }

    def summary(self) -> Summary:
        """The finding of the contrast `main` for people, with the other contrasts and the cliffs."""
        others = {name: one for name, one in self.comparisons.items() if name != self.main}
        rows = [
            *self.comparison.rows(),
            *(
                (f"{name} {what}", number, str(one.n_problems))
                for name, one in others.items()
                for what, number in (
                    ("probe", in_hundredths(one.score)),
                    ("− its best baseline", in_hundredths(one.difference, signed=True)),
                )
            ),
        ]
        # A probe that learned at the window only reads in the thinking what it never saw, so its cliff says little.
        along = [name for name in self.cliffs if len(self.contrasts[name].positions) > 1] or list(self.cliffs)
        counts = ", ".join(f"{count} {' '.join(of)}" for of, count in sorted(self.cells.items()))
        left_out = f"; {self.n_left_out} without closed thinking or an answer are left out" if self.n_left_out else ""
        return Summary(
            finding=self.comparison.finding(
                "The state at the end of the thinking", self.contrasts[self.main].predicted
            ),
            columns=self.comparison.columns,
            rows=rows,
            notes=[
                f"Requests: {counts}{left_out}.",
                *(self.verdicts.notes() if self.verdicts else []),
                *(self.cliffs[name].sentence(name) for name in along),
                *undefined_notes(self.undefined),
            ],
        )


def refusal(
    store: TraceStore,
    traces: Sequence[Trace] | None = None,
    *,
    verdicts: Verdicts | None = None,
    folds: int = 5,
    seed: int = 0,
    contrasts: Mapping[str, _Contrast] = CONTRASTS,
    plateau: float = PLATEAU,
    n_controls: int = 100,
    n_permutations: int = N_PERMUTATIONS,
    n_resamples: int = N_RESAMPLES,
) -> RefusalReport:
    """Predict from the closing tag whether the model will refuse, and measure how far the score falls there.

    Args:
        store: A run with residual sites whose problems say in `meta` whether they are harmful.
        traces: The traces to learn from; by default those of all requests.
        verdicts: What each answer does, by a file of labels (`verdicts_of_file`) or a model that judges (`judged`), both in
            `reasonscope.probes.properties.judge`; by default the rules say so.
        folds: Parts that the problems are split into; layer and penalty are chosen inside each training part.
        seed: Seed of the folds, shuffles, resamples and random directions.
        contrasts: The contrasts to fit. One that lacks a class is left out and named in `undefined`.
        plateau: Share of the thinking, counted from its end, whose median is the plateau.
        n_controls: Number of random directions that the drop is compared with.
        n_permutations: Shuffles of the labels; the smallest p-value is 1 / (n_permutations + 1).
        n_resamples: Resamples of the problems for the intervals.

    Returns:
        AUROCs on held-out problems, cliffs by cell with their nulls, and the probes.

    Raises:
        InputError: No problem says whether it is harmful, no trace has closed thinking and an answer, no contrast has both classes in
            at least `folds` groups, or the run has no residual site.

    Refusal Falls off a Cliff (arXiv 2510.06036).

    Departures: Labels are what this very model did; refusal is learned among harmful prompts; a problem stays in one fold; layer and
        penalty are chosen inside the fold; baselines and nulls are shown. A contrast that learns at the window only reads in the
        thinking what it never saw: its cliff says that a direction falls, not that a thought changed.

    Example:
        store = TraceStore.open("runs/requests/store")
        report = refusal(store)
        print(report.summary())
    """
    if traces is None:
        traces = [trace for trace in store if "harmful" in trace.problem.meta]
    if not traces and not store.ids:
        raise InputError(NO_TRACES)
    if not traces:
        raise InputError(
            "no problem of this run is a request: none says in its meta whether it is harmful. Record requests "
            f'({_RECORD}), or a problem file with "meta": {{"harmful": true}} or false'
        )
    residual_sites(store)  # a run without states is refused before anything else is blamed
    cells = [cell(trace, verdicts.behaviours if verdicts else None) for trace in traces]
    kept = [i for i, trace in enumerate(traces) if has_cliff(trace)]
    if not kept:
        raise InputError(not_closed(traces, "requests"))
    requests = _Requests(traces=[traces[i] for i in kept], cells=[cells[i] for i in kept])
    undefined = {name: why for name, one in contrasts.items() if (why := _shortage(one, requests, folds))}
    fitted = {name: one for name, one in contrasts.items() if name not in undefined}
    if not fitted:
        (_, why), *others = undefined.items()
        raise InputError(why + (f" (the same for {' and '.join(name for name, _ in others)})" if others else ""))
    if few := len(requests.groups_of(_HARMFUL_COMPLIED)) < 2:
        undefined["cliff"] = "fewer than two harmful requests were complied with, so nothing falls; record more of them"
    sizes = _Sizes(folds=folds, n_permutations=n_permutations, n_resamples=n_resamples, seed=seed)
    comparisons, studies, probes = {}, {}, {}
    for name, contrast in tracked(list(fitted.items()), "refusal probe", "contrasts", name=itemgetter(0)):
        held = _held_out(name, contrast, store, requests, sizes)
        comparisons[name] = _compared(contrast, held, store, requests, sizes)
        probes[name] = held.final
        if not few:
            studies[name] = _cliffs(held, store, requests, plateau, n_controls, sizes)
    return RefusalReport(
        comparisons=comparisons,
        cliffs=studies,
        probes=probes,
        contrasts=fitted,
        undefined=undefined,
        cells=Counter(cells),
        n_left_out=len(traces) - len(kept),
        n_groups=len({trace.problem.group for trace in requests.traces}),
        verdicts=verdicts,
    )


def refusal_maps(
    store: TraceStore,
    traces: Sequence[Trace],
    *,
    verdicts: Verdicts | None = None,
    contrasts: Mapping[str, _Contrast] = CONTRASTS,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, LayerMap]:
    """By contrast, the held-out AUROC of probes fitted at each layer and position. Raises InputError as `refusal` does."""
    closed = [trace for trace in traces if has_cliff(trace)]
    cells, maps = [cell(trace, verdicts.behaviours if verdicts else None) for trace in closed], {}
    for name, contrast in tracked(list(contrasts.items()), "map of layers", "contrasts", name=itemgetter(0)):
        rows, targets = contrast.rows(cells)
        inside = [closed[i] for i in rows]
        maps[name] = layer_map(
            store, inside, targets, trace_groups(inside), residual_sites(store), folds=folds, seed=seed
        )
    return maps


@dataclass(frozen=True, kw_only=True)
class _Requests:
    """Traces with a cliff, and the cell of each."""

    traces: Sequence[Trace]
    cells: Sequence[RequestOutcome]

    def groups_of(self, *cells: RequestOutcome) -> set[str]:
        """The groups of problems with a trace in one of `cells`."""
        return {trace.problem.group for trace, of in zip(self.traces, self.cells, strict=True) if of in cells}


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """How many folds, shuffles and resamples a report uses, and their seed."""

    folds: int
    n_permutations: int
    n_resamples: int
    seed: int


def _shortage(contrast: _Contrast, requests: _Requests, folds: int) -> str:
    """Why `contrast` cannot be fitted; empty if it can."""
    classes = {"positive": contrast.positive, "negative": contrast.negative | contrast.negative_at_window}
    found = {
        f"{which} class ({' or '.join(sorted(map(' '.join, cells)))})": len(requests.groups_of(*cells))
        for which, cells in classes.items()
    }
    remedy = f"record more requests ({_RECORD}), several samples of each (--samples), or label the answers (--labels, --judge)"
    return class_shortage(found, folds, remedy)


def _compared(contrast: _Contrast, held: HeldOut, store: TraceStore, requests: _Requests, sizes: _Sizes) -> Comparison:
    """The scores at the close window beside the baselines there, among the cells of the contrast."""
    rows, targets = contrast.rows(requests.cells)
    inside = [requests.traces[i] for i in rows]
    ends = Points(traces=inside, tokens=[row_at(trace, "window") for trace in inside])
    features = baseline_features(ends, store, _BASELINES)
    problems = [trace.problem.id for trace in inside]
    return compare_binary(
        targets,
        held,
        rows,
        features,
        trace_groups(inside),
        problems=problems,
        n_resamples=sizes.n_resamples,
        folds=sizes.folds,
        seed=sizes.seed,
    )


def _held_out(name: str, contrast: _Contrast, store: TraceStore, requests: _Requests, sizes: _Sizes) -> HeldOut:
    """Probes and scores (trace,) at the last position of the contrast; the probes learn at its other positions too."""
    pairs = [(trace, row_at(trace, position)) for trace in requests.traces for position in contrast.positions]
    points = Points(traces=[trace for trace, _ in pairs], tokens=[row for _, row in pairs])
    sites, n = residual_sites(store), len(contrast.positions)
    held = held_out_probes(
        states_at(store, points, sites)[:, :, 0],
        np.repeat([float(of in contrast.positive) for of in requests.cells], n),
        np.array([contrast.is_training_cell(of, position) for of in requests.cells for position in contrast.positions]),
        trace_groups(points.traces),
        sites,
        model=requests.traces[0].model,
        provenance={"target": name, "positions": list(contrast.positions)},
        n_permutations=sizes.n_permutations,
        folds=sizes.folds,
        seed=sizes.seed,
    )
    return replace(held, probes=held.probes[n - 1 :: n], scores=held.scores[n - 1 :: n])


def _cliffs(
    held: HeldOut, store: TraceStore, requests: _Requests, plateau: float, directions: int, sizes: _Sizes
) -> CliffStudy:
    pairs = tracked(list(zip(requests.traces, held.probes, strict=True)), "scoring tokens", "traces")
    scores = {trace.id: token_scores(probe, store, trace) for trace, probe in pairs}
    members: dict[RequestOutcome, list[Trace]] = {of: [] for of in sorted(set(requests.cells))}
    for trace, of in zip(requests.traces, requests.cells, strict=True):
        members[of].append(trace)
    several = {of: own for of, own in members.items() if len({trace.problem.group for trace in own}) > 1}
    cliffs = {
        of: cliff(scores, own, plateau=plateau, n_resamples=sizes.n_resamples, seed=sizes.seed)
        for of, own in several.items()
    }
    fell, stood = several[_HARMFUL_COMPLIED], several.get(_BENIGN_COMPLIED, [])
    drops = random_direction_drops(
        held.final, store, [*fell, *stood], n_controls=directions, plateau=plateau, seed=sizes.seed
    )
    random = drops[:, : len(fell)].mean(axis=1)
    return CliffStudy(
        cliffs=cliffs,
        scores=scores,
        random=random,
        excess=_excess(cliffs[_HARMFUL_COMPLIED], cliffs[_BENIGN_COMPLIED], [*fell, *stood], sizes) if stood else None,
        random_excess=random - drops[:, len(fell) :].mean(axis=1) if stood else None,
    )


def _excess(fell: Cliff, stood: Cliff, traces: Sequence[Trace], sizes: _Sizes) -> Estimate:
    drops = np.concatenate([fell.drops, stood.drops])
    n = len(fell.drops)

    def difference(rows: Rows) -> float:
        ours, theirs = drops[rows[rows < n]], drops[rows[rows >= n]]
        return float(ours.mean() - theirs.mean()) if len(ours) and len(theirs) else float("nan")

    groups = [trace.problem.group for trace in traces]
    return resample_groups(difference, groups, n_resamples=sizes.n_resamples, seed=sizes.seed)


def _middle(values: Values) -> Estimate:
    """The mean and the central 95 % of the draws of a null."""
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(value=float(values.mean()), low=float(low), high=float(high))
