"""Does it mean to refuse? Probes on what the same model went on to do, and the cliff at the closing tag (arXiv 2510.06036)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, resample_groups
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.behaviour import Behaviour, behaviour
from reasonscope.data.trace import Trace
from reasonscope.probes.evaluation.baselines import Points, residual_sites
from reasonscope.probes.evaluation.grouped_folds import trace_groups
from reasonscope.probes.fitting.held_out import (
    Comparison,
    HeldOut,
    LayerMap,
    baseline_features,
    compared,
    held_out_probes,
    layer_map,
)
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import Position, has_cliff, row_at, states_at
from reasonscope.probes.properties.refusal_cliff import PLATEAU, Cliff, cliff, random_direction_drops, token_scores

RequestLabel = Literal["harmful", "benign"]
RequestOutcome = tuple[RequestLabel, Behaviour]

HARMFUL_COMPLIED: RequestOutcome = ("harmful", "complied")
BENIGN_COMPLIED: RequestOutcome = ("benign", "complied")
_BASELINES = ("prompt_length", "bag_of_words", "thinking_length")


def cell(trace: Trace) -> RequestOutcome:
    """Which of the cells harmful or benign × refused, complied or unclear a trace falls into.

    Raises InputError where the problem's meta does not say whether the request is harmful.
    """
    harmful = trace.problem.meta.get("harmful")
    if not isinstance(harmful, bool):
        raise InputError(
            f"problem {trace.problem.id!r}: its meta has harmful = {harmful!r}; true or false is needed to label a request"
        )
    return "harmful" if harmful else "benign", behaviour(trace)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What a probe is taught: the cells of its positive and of its negative class, and the positions, the window last.

    `negative_at_window` are cells of the negative class at the window alone: their thinking teaches nothing.
    """

    positive: frozenset[RequestOutcome]
    negative: frozenset[RequestOutcome]
    negative_at_window: frozenset[RequestOutcome] = frozenset()
    positions: tuple[Position, ...] = ("window",)

    def __post_init__(self) -> None:
        if self.positions[-1:] != ("window",):
            raise InputError(f"positions {self.positions}: the last has to be 'window', where the answer is decided")

    def is_training_cell(self, of: RequestOutcome, position: Position) -> bool:
        return of in self.positive | self.negative or (position == "window" and of in self.negative_at_window)

    def rows(self, cells: Sequence[RequestOutcome]) -> tuple[list[int], Values]:
        """Which of the rows teach it, and their targets, 1 for the positive class."""
        rows = [i for i, of in enumerate(cells) if self.is_training_cell(of, "window")]
        return rows, np.array([cells[i] in self.positive for i in rows], dtype=np.float64)


CONTRASTS: Mapping[str, Contrast] = {
    # What it will do, where the request is the same in kind: this is the probe of intent.
    "refusal": Contrast(
        positive=frozenset({("harmful", "refused")}),
        negative=frozenset({("harmful", "complied")}),
    ),
    # What it was asked, whatever it does.
    "harmfulness": Contrast(
        positive=frozenset({("harmful", "refused"), ("harmful", "complied")}),
        negative=frozenset({("benign", "refused"), ("benign", "complied")}),
    ),
    # Will it refuse, at matching positions: along the thinking from those whose deed is as their thought, at the window from all.
    # The thinking of those who thought of the harm and complied teaches it nothing, so that their plateau is a finding.
    "intent": Contrast(
        positive=frozenset({("harmful", "refused")}),
        negative=frozenset({("benign", "complied")}),
        negative_at_window=frozenset({("harmful", "complied")}),
        positions=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0, "window"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class CliffStudy:
    """The cliffs of one probe by cell (of two problems or more), and what chance would show of (harmful, complied).

    `random` (direction,): mean drops of the harmful and complied along random directions. `above_nulls`: whether the interval of
    their drop lies above that of the benign and complied, and above the 97.5 % quantile of the random directions.

    `excess`: how much further the harmful and complied fall than the benign and complied, and `random_excess` (direction,) the same
    along random directions. Every state changes at a closing tag, so that a drop alone is little; None without such benign traces.
    """

    cliffs: Mapping[RequestOutcome, Cliff]
    scores: Mapping[str, Values]
    random: Values
    excess: Estimate | None
    random_excess: Values | None

    @property
    def above_nulls(self) -> bool:
        benign = self.cliffs.get(BENIGN_COMPLIED)
        low = self.cliffs[HARMFUL_COMPLIED].drop.low
        return benign is not None and low > benign.drop.high and low > float(np.quantile(self.random, 0.975))

    @property
    def excess_above_random(self) -> bool:
        if self.excess is None or self.random_excess is None:
            return False
        return self.excess.low > float(np.quantile(self.random_excess, 0.975))


@dataclass(frozen=True, kw_only=True)
class RefusalReport:
    """What the last token of the close window says of the answer, and what the tokens before it say.

    By contrast: `comparisons` are AUROCs on held-out problems, inside the cells of the contrast; `cliffs` are of every trace, each
    read by the probe that did not learn from its problem; `probes` learned from all. `cells` counts the traces of each cell;
    `n_left_out` of them had no closed thinking or no answer and are in nothing else.
    """

    comparisons: Mapping[str, Comparison]
    cliffs: Mapping[str, CliffStudy]
    probes: Mapping[str, LinearProbe]
    cells: Mapping[RequestOutcome, int]
    n_left_out: int
    n_groups: int


def refusal(
    store: TraceStore,
    traces: Sequence[Trace] | None = None,
    *,
    contrasts: Mapping[str, Contrast] = CONTRASTS,
    plateau: float = PLATEAU,
    n_controls: int = 100,
    folds: int = 5,
    seed: int = 0,
) -> RefusalReport:
    """Fit and evaluate the probes of `contrasts` on `traces` of requests, at the last token of the close window.

    Departures from arXiv 2510.06036: labels are what this model did; refusal is taught inside harmful prompts; folds keep a problem
    together; layer and penalty are chosen inside the fold; baselines and nulls stand beside every number. A contrast that is taught
    at the window alone reads in the thinking what it never saw: its cliff says that a direction falls, not that a thought changed.

    Raises InputError where problems do not say whether they are harmful, a class has fewer problems than folds, or fewer than two
    harmful requests were complied with.
    """
    if traces is None:
        traces = [trace for trace in store if "harmful" in trace.problem.meta]
    cells = [cell(trace) for trace in traces]
    kept = [i for i, trace in enumerate(traces) if has_cliff(trace)]
    if not kept:
        raise InputError(f"none of {len(traces)} traces has closed thinking and an answer; record with more tokens")
    requests = _Requests(traces=[traces[i] for i in kept], cells=[cells[i] for i in kept])
    comparisons, studies, probes = {}, {}, {}
    for name, contrast in contrasts.items():
        held = _held_out(name, contrast, store, requests, folds, seed)
        rows, targets = contrast.rows(requests.cells)
        inside = [requests.traces[i] for i in rows]
        groups = trace_groups(inside)
        ends = Points(traces=inside, tokens=[row_at(trace, "window") for trace in inside])
        features = baseline_features(ends, store, _BASELINES)
        comparisons[name] = compared(targets, held, rows, features, groups, folds=folds, seed=seed)
        studies[name] = _cliffs(held, store, requests, plateau, n_controls, seed)
        probes[name] = held.final
    return RefusalReport(
        comparisons=comparisons,
        cliffs=studies,
        probes=probes,
        cells=Counter(cells),
        n_left_out=len(traces) - len(kept),
        n_groups=len({trace.problem.group for trace in requests.traces}),
    )


def refusal_maps(
    store: TraceStore,
    traces: Sequence[Trace],
    *,
    contrasts: Mapping[str, Contrast] = CONTRASTS,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, LayerMap]:
    """By contrast, the held-out AUROC of probes trained at each layer and position on the deed. Raises as `refusal` does."""
    closed = [trace for trace in traces if has_cliff(trace)]
    cells, maps = [cell(trace) for trace in closed], {}
    for name, contrast in contrasts.items():
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


def _held_out(name: str, contrast: Contrast, store: TraceStore, requests: _Requests, folds: int, seed: int) -> HeldOut:
    """The probes and the scores (trace,) at the last position of the contrast; its other positions teach as well."""
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
        folds=folds,
        seed=seed,
    )
    return replace(held, probes=held.probes[n - 1 :: n], scores=held.scores[n - 1 :: n])


def _cliffs(
    held: HeldOut, store: TraceStore, requests: _Requests, plateau: float, directions: int, seed: int
) -> CliffStudy:
    pairs = zip(requests.traces, held.probes, strict=True)
    scores = {trace.id: token_scores(probe, store, trace) for trace, probe in pairs}
    members: dict[RequestOutcome, list[Trace]] = {of: [] for of in sorted(set(requests.cells))}
    for trace, of in zip(requests.traces, requests.cells, strict=True):
        members[of].append(trace)
    several = {of: own for of, own in members.items() if len({trace.problem.group for trace in own}) > 1}
    cliffs = {of: cliff(scores, own, plateau=plateau, seed=seed) for of, own in several.items()}
    if HARMFUL_COMPLIED not in several:
        raise InputError("fewer than two harmful requests were complied with: nothing falls; record more of them")
    fell, stood = several[HARMFUL_COMPLIED], several.get(BENIGN_COMPLIED, [])
    drops = random_direction_drops(
        held.final, store, [*fell, *stood], n_controls=directions, plateau=plateau, seed=seed
    )
    random = drops[:, : len(fell)].mean(axis=1)
    return CliffStudy(
        cliffs=cliffs,
        scores=scores,
        random=random,
        excess=_excess(cliffs[HARMFUL_COMPLIED], cliffs[BENIGN_COMPLIED], [*fell, *stood], seed) if stood else None,
        random_excess=random - drops[:, len(fell) :].mean(axis=1) if stood else None,
    )


def _excess(fell: Cliff, stood: Cliff, traces: Sequence[Trace], seed: int) -> Estimate:
    drops = np.concatenate([fell.drops, stood.drops])
    n = len(fell.drops)

    def difference(rows: Rows) -> float:
        ours, theirs = drops[rows[rows < n]], drops[rows[rows >= n]]
        return float(ours.mean() - theirs.mean()) if len(ours) and len(theirs) else float("nan")

    return resample_groups(difference, [trace.problem.group for trace in traces], seed=seed)
