"""Does the model mean to refuse? Probes on what it went on to do, and the cliff at the closing tag (arXiv 2510.06036)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np

from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths
from reasonscope.data.trace import Trace
from reasonscope.probes.evaluation.baselines import Points, baseline_features, residual_sites
from reasonscope.probes.evaluation.comparison import N_RESAMPLES, Comparison
from reasonscope.probes.evaluation.grouped_folds import trace_groups
from reasonscope.probes.fitting.held_out import HeldOut, LayerMap, compare_binary, held_out_probes, layer_map
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.permuted_sweep import N_PERMUTATIONS
from reasonscope.probes.fitting.positions import has_cliff, row_at, states_at
from reasonscope.probes.properties.judge import Verdicts
from reasonscope.probes.properties.refusal_cliff import PLATEAU, CliffStudy, cliff_study
from reasonscope.probes.properties.report import NO_TRACES, class_shortage, not_closed, probe_numbers, undefined_notes
from reasonscope.probes.properties.request_outcomes import CONTRASTS, HARMFUL_COMPLIED, Contrast, RequestOutcome, cell

_BASELINES = ("prompt_length", "bag_of_words", "thinking_length")
_MAIN = "refusal"
_RECORD = "reasonscope record --problems requests --n 160 --out RUN"


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
    contrasts: Mapping[str, Contrast]
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
    contrasts: Mapping[str, Contrast] = CONTRASTS,
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
    if few := len(requests.groups_of(HARMFUL_COMPLIED)) < 2:
        undefined["cliff"] = "fewer than two harmful requests were complied with, so nothing falls; record more of them"
    sizes = _Sizes(folds=folds, n_permutations=n_permutations, n_resamples=n_resamples, seed=seed)
    comparisons, studies, probes = {}, {}, {}
    for name, contrast in tracked(list(fitted.items()), "refusal probe", "contrasts", name=itemgetter(0)):
        held = _held_out(name, contrast, store, requests, sizes)
        comparisons[name] = _compared(contrast, held, store, requests, sizes)
        probes[name] = held.final
        if not few:
            studies[name] = cliff_study(
                held,
                store,
                requests.traces,
                requests.cells,
                plateau=plateau,
                n_controls=n_controls,
                n_resamples=n_resamples,
                seed=seed,
            )
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
    contrasts: Mapping[str, Contrast] = CONTRASTS,
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


def _shortage(contrast: Contrast, requests: _Requests, folds: int) -> str:
    """Why `contrast` cannot be fitted; empty if it can."""
    classes = {"positive": contrast.positive, "negative": contrast.negative | contrast.negative_at_window}
    found = {
        f"{which} class ({' or '.join(sorted(map(' '.join, cells)))})": len(requests.groups_of(*cells))
        for which, cells in classes.items()
    }
    remedy = f"record more requests ({_RECORD}), several samples of each (--samples), or label the answers (--labels, --judge)"
    return class_shortage(found, folds, remedy)


def _compared(contrast: Contrast, held: HeldOut, store: TraceStore, requests: _Requests, sizes: _Sizes) -> Comparison:
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


def _held_out(name: str, contrast: Contrast, store: TraceStore, requests: _Requests, sizes: _Sizes) -> HeldOut:
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
