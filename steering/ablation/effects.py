"""Ablation experiments: how much less likely an ablation makes the answers that a model gave, beside its controls."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np

from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, Resamples, permutation_p
from reasonscope.data.progress import Work, working
from reasonscope.data.random_sets import n_disjoint, smallest_p
from reasonscope.data.summary import Summary
from reasonscope.data.trace import Trace
from reasonscope.probes.generation.rollout import trace_seed
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.controls import control_words, random_ablations
from reasonscope.steering.ablation.interventions import (
    AblationIntervention,
    MatchedMove,
    ReferenceStates,
    reference_states,
)
from reasonscope.steering.ablation.knockout import reading_without
from reasonscope.steering.ablation.summaries import ablation_summary
from reasonscope.steering.ablation.targets import Ablation
from reasonscope.steering.experiments.experiment import estimates_to_dict
from reasonscope.steering.experiments.side_effects import LogitsFunction, batches, divergences, logits_function

_SPANS = {"answer": lambda trace: trace.tokens.answer, "thinking": lambda trace: trace.thinking_positions}
_AT_ONCE = 8  # passes that one unchanged pass is compared with, and that are lost if a process is killed
_MATCHED = "random directions that move each state as far"


class Cells(Protocol):
    """What was measured before, by key; see `ResponseCache`."""

    def get(self, key: str) -> Any: ...

    def put(self, key: str, value: Any) -> None: ...


class Forgetful(dict[str, Any]):
    """Cells that last as long as the process."""

    put = dict.__setitem__


@dataclass(frozen=True, kw_only=True)
class _Split:
    """The effect on some of the traces.

    Attributes:
        n_traces: How many traces these are.
        effect: As in `AblationEffect`.
        null: The effect of each control on the same traces.
        matched: The effect of each move as far.
        p_value: As in `AblationEffect`.
    """

    n_traces: int
    effect: Estimate
    null: tuple[float, ...]
    matched: tuple[float, ...]
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        told = {"n_traces": self.n_traces, "effect": self.effect.to_dict(), "p_value": self.p_value}
        return {**told, "controls": _range(self.null), "matched": _range(self.matched)}


@dataclass(frozen=True, kw_only=True)
class AblationEffect:
    """How much less likely an ablation makes the answers that the model gave, beside different random ablations.

    Attributes:
        ablation: What was removed.
        effect: Loss of log-likelihood, in nats per answer token.
        null: The effect of each control (control,), all controls different.
        n_disjoint: How many of the controls, the first ones, share no head, MLP, layer, neuron, expert or latent with one another.
        p_value: Share of these with at least this effect, the ablation itself counted among them. It is exact, which it would not
            be over controls that overlap.
        side_effects: `kl_thinking` and `kl_answer`, in nats per token, and `nll_thinking`, the loss on the thinking itself; what concerns
            the thinking is absent if no trace has any.
        n_edited: Tokens (or edges) removed from all traces together.
        control: In words, what the controls are.
        matched: The effect of random directions that move each state exactly as far (draw,); empty if no state is moved.
        distance: How far an edited token is moved on average, summed over sites, in units of the residual stream; None if no state is.
        splits: The same on parts of the traces: by difficulty, and with thinking on and off, if the traces differ in these.
        losses: Loss of log-likelihood of each trace, in nats per answer token (trace,).
    """

    ablation: Ablation
    effect: Estimate
    null: tuple[float, ...]
    n_disjoint: int
    p_value: float
    side_effects: Mapping[str, Estimate]
    n_edited: int
    control: str
    matched: tuple[float, ...] = ()
    distance: float | None = None
    splits: Mapping[str, _Split] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that so few disjoint controls can give; above .05 if there are fewer than 19."""
        return smallest_p(self.n_disjoint)

    @property
    def p_matched(self) -> float | None:
        """The share of `matched` with at least this effect, the ablation itself counted among them; None without any."""
        return float(permutation_p(self.effect.value, self.matched)) if self.matched else None

    def to_dict(self) -> dict[str, Any]:
        """The effect with its interval, the random controls, and the side effects, for JSON."""
        matched = {"what": _MATCHED, **_range(self.matched), "p_value": self.p_matched} if self.matched else None
        return {
            "effect_nats_per_answer_token": self.effect.to_dict(),
            "controls": {"what": self.control, "n_disjoint": self.n_disjoint, **_range(self.null)},
            "p_value": self.p_value,
            "smallest_p": self.smallest_p,
            "matched": matched,
            "distance": self.distance,
            "side_effects": estimates_to_dict(self.side_effects),
            "splits": {name: split.to_dict() for name, split in self.splits.items()},
            "n_edited": self.n_edited,
            "n_traces": len(self.losses),
            "how": self.ablation.how,
            "strength": self.ablation.strength,
            "target": self.ablation.describe()[self.ablation.kind],
            "kind": self.ablation.kind,
        }

    def summary(self) -> Summary:
        """By how much the ablation makes the given answers less likely, beside random ablations of the same size."""
        return ablation_summary({self.ablation.name: self})


def ablation_effect(
    model: Model,
    traces: Sequence[Trace],
    ablation: Ablation,
    *,
    n_controls: int = 20,
    n_matched: int = 20,
    seed: int = 0,
    cells: Cells | None = None,
) -> AblationEffect:
    """Read finished traces with the ablation and without: how likely are the given answers, and how much does the thinking change?

    Controls are different random sets of the same size: of heads, neurons or experts of the same layers, of other MLPs or layers, of
    latents that are active, of tokens of the same region of each trace. The ablation itself is never drawn. A small model has few such
    sets, and then all of them are used: a block of four heads has three others, so the p-value of one head is at least 1/4
    (`smallest_p`). If several are removed together, the p-value counts only controls that share none of them: a block of 16 heads leaves
    three such sets of four. What moves states is also compared with moves as far in random directions (`matched`); a direction has these
    as its only controls.

    Args:
        model: The model.
        traces: Finished traces; those without an answer are left out. Means and drawn states come from them too.
        ablation: What to remove.
        n_controls: How many random ablations to compare with, at least 20.
        n_matched: How many random directions that move states as far.
        seed: Seed of the controls and of drawn states.
        cells: Keeps what was measured of each trace, so that an interrupted run goes on; by default nothing is kept.

    Returns:
        The effect on the given answers and on the thinking, with the random ablations and a p-value.

    Raises:
        InputError: For fewer than 20 controls, traces without an answer, an ablation that edits nothing, or one that leaves nothing
            to compare with.

    Example:
        effect = ablation_effect(model, traces, Ablation(name="head", heads=(Head(layer=2, index=1),)))
        print(effect.effect.value, effect.p_value, effect.smallest_p)
    """
    if n_controls < 20:
        raise InputError(f"n_controls={n_controls}; at least 20 random ablations are needed")
    read = _answered(traces)
    readings, bank = _readings(model, ablation, read, n_controls=n_controls, n_matched=n_matched, seed=seed)
    measured, *chance = _measure(model, read, readings, bank, cells or Forgetful())
    if not measured.n_edited:
        raise InputError(f"ablation {ablation.name!r} edited nothing: no token of the traces lies in its scope")
    drawn = [one for one in readings[1:] if one.draw is None]
    sets, moves = chance[: len(drawn)], chance[len(drawn) :]
    if not chance or any(not one.n_edited for one in sets):
        raise InputError(f"ablation {ablation.name!r} leaves no other token to compare with; name fewer tokens")
    null, matched = (tuple(one.effect.value for one in part) for part in (sets or moves, moves))
    counted = n_disjoint([one.ablation.members or (id(one),) for one in drawn]) if drawn else len(moves)
    return AblationEffect(
        ablation=ablation,
        effect=measured.effect,
        null=null,
        n_disjoint=counted,
        p_value=float(permutation_p(measured.effect.value, null[:counted])),
        side_effects=measured.side_effects,
        n_edited=measured.n_edited,
        control=control_words(ablation, [one.ablation for one in drawn], read),
        matched=matched if drawn else (),
        distance=measured.distance,
        splits=_splits(read, measured, sets or moves, moves if drawn else [], counted),
        losses=measured.losses,
    )


def _answered(traces: Sequence[Trace]) -> list[Trace]:
    """The traces with an answer. Raises InputError unless they are of two groups of problems or more, as an interval needs."""
    found = [trace for trace in traces if len(trace.tokens.answer)]
    if not found:
        raise InputError(f"none of {len(traces)} traces has an answer; record with more tokens")
    if len({trace.problem.group for trace in found}) < 2:
        raise InputError(
            f"of {len(traces)} traces only {len(found)} have an answer, of one group of problems, which gives no interval; read more "
            "traces, or record with more tokens"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A pass over the traces with an ablation, a random one in its place, or (with `draw`) a move as far in a random direction."""

    ablation: Ablation
    seed: int
    draw: int | None = None

    @cached_property
    def key(self) -> str:
        """A hash of everything that changes what is read, but the model and the traces."""
        drawn = self.seed if self.ablation.how == "resample" else None
        return hashlib.sha256(json.dumps([self.ablation.describe(), drawn, self.draw]).encode()).hexdigest()[:24]

    def intervention(
        self, model: Model, bank: ReferenceStates, first: str, like: AblationIntervention | None
    ) -> AblationIntervention:
        """The edit of a batch whose first trace is `first`: draws do not depend on what was read before it."""
        seed = trace_seed(self.seed, first)
        if self.draw is None:
            return AblationIntervention(model, self.ablation, bank, seed=seed)
        return MatchedMove(model, self.ablation, bank, seed=seed, draw=self.draw, like=like)


def _readings(
    model: Model, ablation: Ablation, traces: Sequence[Trace], *, n_controls: int, n_matched: int, seed: int
) -> tuple[list[_Reading], ReferenceStates]:
    """The ablation, its random sets, its moves as far, and the states that they need."""
    bank = reference_states(model, traces, [ablation.latents.site]) if ablation.latents else {}
    drawn = random_ablations(model, ablation, traces, bank=bank, n_controls=n_controls, seed=seed)
    sites = {site: None for one in (ablation, *drawn) for site in one.parts}
    if ablation.how != "zero" and not ablation.latents:
        bank = reference_states(model, traces, list(sites))
    n_moves = 0 if not ablation.moves_states else n_matched if drawn else max(n_matched, n_controls)
    return [
        _Reading(ablation=ablation, seed=seed),
        *(_Reading(ablation=one, seed=seed + i) for i, one in enumerate(drawn)),
        *(_Reading(ablation=ablation, seed=seed, draw=seed + i) for i in range(n_moves)),
    ], bank


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What a reading measured: its estimates, and the loss and the answer tokens of each trace (trace,)."""

    effect: Estimate
    side_effects: Mapping[str, Estimate]
    n_edited: int
    distance: float | None
    loss: Values
    n_tokens: Values
    losses: Mapping[str, float]

    def on(self, rows: Rows) -> float:
        """The effect on some traces, in nats per answer token."""
        return float(self.loss[rows].sum() / self.n_tokens[rows].sum())


def _measure(
    model: Model, traces: Sequence[Trace], readings: Sequence[_Reading], bank: ReferenceStates, cells: Cells
) -> list[_Measured]:
    _read(model, traces, readings, bank, cells)
    resamples = Resamples([trace.problem.group for trace in traces])
    measured = []
    for reading in readings:
        rows = [cells.get(f"{reading.key}/{trace.id}") for trace in traces]
        answer, thinking = (np.array([row[span] for row in rows]).T for span in _SPANS)
        effect = _per_token(resamples, answer[0] - answer[1], answer[3])
        assert effect is not None  # because every trace has an answer
        beside = {
            "kl_thinking": _per_token(resamples, thinking[2], thinking[3]),
            "nll_thinking": _per_token(resamples, thinking[0] - thinking[1], thinking[3]),
            "kl_answer": _per_token(resamples, answer[2], answer[3]),
        }
        loss = answer[0] - answer[1]
        measured.append(
            _Measured(
                effect=effect,
                side_effects={name: one for name, one in beside.items() if one is not None},
                n_edited=sum(row["edited"] for row in rows),
                distance=_distance([row["moved"] for row in rows]),
                loss=loss,
                n_tokens=answer[3],
                losses={trace.id: float(x) for trace, x in zip(traces, loss / answer[3], strict=True)},
            )
        )
    return measured


def _per_token(resamples: Resamples, sums: Values, n_tokens: Values) -> Estimate | None:
    with np.errstate(invalid="ignore", divide="ignore"):
        return resamples.estimate(resamples.means(sums / n_tokens, n_tokens))


def _distance(moved: Sequence[Mapping[str, Sequence[float]]]) -> float | None:
    """The mean distance of an edited token, summed over sites, from the sum of distances and the tokens of each batch."""
    sites = {site: None for one in moved for site in one}
    if not sites:
        return None
    sums = {site: np.sum([one[site] for one in moved if site in one], axis=0) for site in sites}
    return float(sum(total / n for total, n in sums.values() if n))


def _read(
    model: Model, traces: Sequence[Trace], readings: Sequence[_Reading], bank: ReferenceStates, cells: Cells
) -> None:
    """Read the traces with each reading, and put what each trace gave into `cells`; what is there is not read again."""
    together = [[traces[i] for i in batch] for batch in batches(model, traces)]
    left = [[one for one in readings if _lacks(cells, one, group)] for group in together]
    total = len(readings) * len(traces)
    done = total - sum(len(group) * len(own) for group, own in zip(together, left, strict=True))
    with working("ablating", total=total, done=done, unit="readings") as work:
        for group, own in zip(together, left, strict=True):
            _read_batch(model, group, own, readings[0], bank, cells, work)


def _lacks(cells: Cells, reading: _Reading, group: Sequence[Trace]) -> bool:
    return any(cells.get(f"{reading.key}/{trace.id}") is None for trace in group)


def _read_batch(
    model: Model,
    group: Sequence[Trace],
    left: Sequence[_Reading],
    true: _Reading,
    bank: ReferenceStates,
    cells: Cells,
    work: Work,
) -> None:
    """What `left` gives on a batch; if a move as far is among them, the ablation itself runs first, to say how far that is."""
    like: AblationIntervention | None = None
    for start in range(0, len(left), _AT_ONCE):
        some = left[start : start + _AT_ONCE]
        if like is None and any(one.draw is not None for one in some) and true not in some:
            some = [true, *some]
        readers: list[tuple[LogitsFunction, Callable[[], tuple[int, dict[str, list[float]]]]]] = []
        for reading in some:
            if reading.ablation.edges is not None:
                readers.append(_cutting(model, reading.ablation))
                continue
            replacing = reading.intervention(model, bank, group[0].id, like)
            like = replacing if reading is true else like
            readers.append((logits_function(model, replacing), partial(_edits, replacing)))
        moved = divergences(model, group, [read for read, _ in readers], _SPANS)
        for reading, of_spans, (_, edits) in zip(some, moved, readers, strict=True):
            n_edited, distances = edits()
            for row, trace in enumerate(group):
                sums = {
                    name: [
                        float(one.nll[row]),
                        float(one.nll_unchanged[row]),
                        float(one.kl[row]),
                        float(one.n_tokens[row]),
                    ]
                    for name, one in of_spans.items()
                }
                whole = {"edited": n_edited, "moved": distances} if row == 0 else {"edited": 0, "moved": {}}
                cells.put(
                    f"{reading.key}/{trace.id}", {**sums, **whole}
                )  # the counts of a batch stand with its first trace
        work.advance(len(group) * sum(one in left for one in some))


def _cutting(
    model: Model, ablation: Ablation
) -> tuple[LogitsFunction, Callable[[], tuple[int, dict[str, list[float]]]]]:
    assert ablation.edges is not None
    counts: list[int] = []
    return reading_without(model, ablation.edges, counts.append), lambda: (sum(counts), {})


def _edits(replacing: AblationIntervention) -> tuple[int, dict[str, list[float]]]:
    """How many tokens were edited, and by site the sum of the distances with the number of tokens."""
    moved = {str(site): [float(lengths.sum()), float(len(lengths))] for site, lengths in replacing.moved.items()}
    return replacing.n_edited, moved


def _splits(
    traces: Sequence[Trace],
    true: _Measured,
    sets: Sequence[_Measured],
    moves: Sequence[_Measured],
    n_counted: int,
) -> dict[str, _Split]:
    """The effect on each part of the traces that holds two groups of problems or more."""
    found = {}
    for name, rows in _parts_of(traces):
        groups = [traces[i].problem.group for i in rows]
        if len(set(groups)) < 2:
            continue
        effect = _per_token(Resamples(groups), true.loss[rows], true.n_tokens[rows])
        assert effect is not None
        null = tuple(one.on(rows) for one in sets)
        found[name] = _Split(
            n_traces=len(rows),
            effect=effect,
            null=null,
            matched=tuple(one.on(rows) for one in moves),
            p_value=float(permutation_p(effect.value, null[:n_counted])),
        )
    return found


def _parts_of(traces: Sequence[Trace]) -> Iterator[tuple[str, Rows]]:
    """The rows of each part of the traces: up to or above the median difficulty, with thinking on or off, if they differ."""
    level = np.array(
        [trace.problem.difficulty for trace in traces], dtype=np.float64
    )  # NaN for None, which is on neither side
    known = level[~np.isnan(level)]
    if len(set(known.tolist())) > 1:
        cut = float(np.median(known))
        cut = cut if cut < known.max() else float(known[known < known.max()].max())
        yield f"difficulty up to {cut:g}", np.flatnonzero(level <= cut)
        yield f"difficulty above {cut:g}", np.flatnonzero(level > cut)
    thinks = np.array([trace.n_thinking_tokens > 0 for trace in traces])
    if thinks.any() and not thinks.all():
        yield "thinking on", np.flatnonzero(thinks)
        yield "thinking off", np.flatnonzero(~thinks)


def _range(null: Sequence[float]) -> dict[str, Any]:
    """The mean of the controls, the lowest and the highest."""
    if not len(null):
        return {"n": 0}
    return {"n": len(null), "mean": float(np.mean(null)), "low": min(null), "high": max(null)}
