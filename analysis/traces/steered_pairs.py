"""A plain run beside a steered one, trace by trace: where the two part, and what changes in length, accuracy and what is read from them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.results import Result, result_path
from reasonscope.analysis.traces.run_difference import PairedDifference, paired_difference
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths, in_percent, in_words, plural
from reasonscope.data.text.align import first_difference, token_strings
from reasonscope.data.trace import Trace
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.properties.refusal_cliff import token_scores
from reasonscope.steering.recipes.recipe import Recipe

_SHOWN = 3  # pairs whose first different words the summary quotes
_BEFORE, _AFTER = 12, 8  # tokens around that place


@dataclass(frozen=True, kw_only=True)
class _Parting:
    """Where the steered trace leaves the plain one.

    Attributes:
        id: The trace, in both runs.
        token: The first generated token that differs; None if none does.
        before: The last words that both wrote.
        plain: What the plain model went on with.
        steered: What the steered model went on with.
    """

    id: str
    token: int | None
    before: str = ""
    plain: str = ""
    steered: str = ""


@dataclass(frozen=True, kw_only=True)
class _RunComparison:
    """Two runs of the same problems, paired by trace.

    Attributes:
        names: Of the plain and of the steered run.
        steered_by: Name and hash of the recipe; empty if the second run does not name one.
        partings: One per pair.
        lengths: Thinking tokens of each pair (pair, 2), the plain one first.
        outcomes: For each pair whether each answer is right; None if that is not known.
        measures: The difference in each measure, steered minus plain, over the pairs that have it.
        missing: Why a measure is missing, by name.
        notes: What a reader has to know, such as settings that differ.
    """

    names: tuple[str, str]
    steered_by: str
    partings: tuple[_Parting, ...]
    lengths: Values
    outcomes: tuple[tuple[bool | None, bool | None], ...]
    measures: Mapping[str, PairedDifference]
    missing: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {
            "runs": dict(zip(("plain", "steered"), self.names, strict=True)),
            "steered_by": self.steered_by,
            "n_pairs": len(self.partings),
            "measures": {name: asdict(one) for name, one in self.measures.items()},
            "missing": dict(self.missing),
            "pairs": [
                {**asdict(one), "thinking_tokens": self.lengths[i].tolist(), "correct": list(self.outcomes[i])}
                for i, one in enumerate(self.partings)
            ],
        }

    def summary(self) -> Summary:
        """What steering changed, measure by measure, and the words at which traces part."""
        apart = [one for one in self.partings if one.token is not None]
        thinking = self.measures["thinking tokens"]
        what, tokens = ("thinking", thinking) if thinking.theirs else ("completions", self.measures["generated tokens"])
        parted = f"{len(apart)} of {len(self.partings)} traces part"
        first = f", the median at token {np.median([one.token for one in apart]):.0f}" if apart else ""
        changes = (
            "Steering by {2} changes the tokens of the {3} by"
            if self.steered_by
            else "From {0} to {1} the tokens of the {3} change by"
        )
        changed = changes.format(*self.names, self.steered_by, what)
        change = Estimate(value=tokens.difference, low=tokens.interval[0], high=tokens.interval[1])
        relative = in_percent(_times(change, 1 / tokens.theirs)) if tokens.theirs else "–"
        return Summary(
            finding=f"{changed} {relative}; {parted}{first}.",
            columns=("measure", "plain", "steered", "difference", "by chance", "n"),
            rows=[_row(name, one) for name, one in self.measures.items()],
            quotes=[
                (f"{one.before} ⟨{one.plain} | {one.steered}⟩".strip(), f"{one.id}, token {one.token}")
                for one in apart[:_SHOWN]
            ],
            notes=[*self.notes, *(f"{name}: {why}." for name, why in self.missing.items())],
        )


def compare_runs(
    plain: TraceStore,
    steered: TraceStore,
    *,
    results: tuple[Path, Path],
    probe: LinearProbe | None = None,
    seed: int = 0,
) -> _RunComparison:
    """Pair the traces of two runs by problem and sample, and compare them.

    Args:
        plain: The run of the plain model.
        steered: The run of the steered one.
        results: The folders of the saved analyses of both, for their MI.
        probe: A probe whose mean score over the thinking is compared, on problems that it did not learn from.
        seed: Random seed of the exchanges.

    Returns:
        Partings and lengths of all pairs; and differences, each with its interval over problems and what exchanging the runs gives, on the
        problems that the recipe of the steered run did not learn from.

    Raises:
        InputError: If the runs share no trace, ask different problems under one id, or the recipe learned from all of the problems.
        SiteError: If a run has no states at the probe's site.
    """
    pairs = _pairs(plain, steered)
    groups = [ours.problem.group for ours, _ in pairs]
    learned = _learned(steered)
    unseen = _unseen(groups, learned.get("groups", ()))
    if not unseen.any():
        raise InputError(
            f"the recipe of {steered.path} learned from all {len(set(groups))} problems of both runs, so what it does cannot be judged "
            "on them; record other problems with it and without"
        )
    columns: dict[str, tuple[Values, bool]] = {
        "thinking tokens": (_both(pairs, lambda trace: trace.n_thinking_tokens), False),
        "generated tokens": (_both(pairs, lambda trace: len(trace.token_ids) - trace.n_prompt_tokens), False),
        "accuracy": (_both(pairs, lambda trace: np.nan if trace.correct is None else float(trace.correct)), True),
    }
    missing = {}
    if probe is not None:
        stores = (plain, steered)
        scores = [
            [_mean_score(probe, store, trace) for store, trace in zip(stores, pair, strict=True)] for pair in pairs
        ]
        read = np.array(scores, dtype=np.float64)
        read[~_unseen(groups, probe.provenance.get("learned_from", ()))] = np.nan
        columns["mean probe score"] = read, False
    mi = np.array([[_mean_mi(folder, t.id) for folder, t in zip(results, pair, strict=True)] for pair in pairs])
    columns["mean MI"] = mi, False
    measures = {}
    for name, (values, verdicts) in columns.items():
        known: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1) & unseen)
        if not known.any():
            missing[name] = _WHY[name]
            continue
        of = [group for group, there in zip(groups, known, strict=True) if there]
        measures[name] = paired_difference(values[known, 1], values[known, 0], of, verdicts=verdicts, seed=seed)
    about = steered.meta.get("steered")
    return _RunComparison(
        names=(_name(plain), _name(steered)),
        steered_by=f"{about['name']} ({about['hash']})" if about else "",
        partings=tuple(_parting(*pair) for pair in pairs),
        lengths=columns["thinking tokens"][0],
        outcomes=tuple((ours.correct, theirs.correct) for ours, theirs in pairs),
        measures=measures,
        missing=missing,
        notes=(*_notes(plain, steered, pairs), *_unseen_notes(learned, probe, groups, "steered" in steered.meta)),
    )


_WHY = {
    "accuracy": "no pair has a gold answer and two answers that could be judged",
    "mean probe score": "no trace has thinking to score, of a problem that the probe did not learn from",
    "mean MI": "run `reasonscope analyse mi` on both runs first",
}


def _name(store: TraceStore) -> str:
    """The name of the run of a store."""
    return store.path.resolve().parent.name if store.path.name == "store" else store.path.name


def _pairs(plain: TraceStore, steered: TraceStore) -> list[tuple[Trace, Trace]]:
    shared = [id for id in plain.ids if id in steered]
    if not shared:
        raise InputError(f"{plain.path} and {steered.path} share no trace; record the same problems with both")
    pairs = [(plain.trace(id), steered.trace(id)) for id in shared]
    for ours, theirs in pairs:
        if (ours.problem.messages, ours.problem.prompt) != (theirs.problem.messages, theirs.problem.prompt):
            raise InputError(
                f"{ours.id!r} asks different problems in {plain.path} and {steered.path}; compare runs of the same problems"
            )
    return pairs


def _both(pairs: Sequence[tuple[Trace, Trace]], value: Any) -> Values:
    return np.array([[value(ours), value(theirs)] for ours, theirs in pairs], dtype=np.float64)


def _mean_score(probe: LinearProbe, store: TraceStore, trace: Trace) -> float:
    """The mean of what the probe says along the thinking; NaN without thinking."""
    if not trace.n_thinking_tokens:
        return float("nan")
    scores = token_scores(probe, store, trace)
    return float(scores[trace.thinking_positions[trace.thinking_positions < len(scores)]].mean())


def _mean_mi(folder: Path, id: str) -> float:
    """The mean MI of a trace at the last site that was analysed; NaN if no analysis was saved."""
    path = result_path(folder, "mi", id)
    if not path.exists():
        return float("nan")
    found = Result.load(path)
    return float(np.nanmean(found.values[-1])) if found.measured else float("nan")


def _parting(plain: Trace, steered: Trace) -> _Parting:
    ids = [trace.token_ids[trace.n_prompt_tokens :].tolist() for trace in (plain, steered)]
    at = first_difference(*ids)
    if at is None:
        return _Parting(id=plain.id, token=None)
    pieces = [token_strings(trace.text, trace.offsets)[trace.n_prompt_tokens :] for trace in (plain, steered)]
    before = "".join(pieces[0][max(0, at - _BEFORE) : at])
    after = ["".join(of[at : at + _AFTER]).strip() or "(ends)" for of in pieces]
    return _Parting(id=plain.id, token=at, before=before.strip(), plain=after[0], steered=after[1])


def _learned(steered: TraceStore) -> Mapping[str, Any]:
    """The groups of problems that the recipe of a run was learned from (`Recipe.learned`); empty if the run holds none."""
    if steered.recipe is None or not steered.recipe.exists():
        return {}
    return Recipe.load(steered.recipe).learned


def _unseen(groups: Sequence[str], learned: Iterable[str]) -> NDArray[np.bool_]:
    seen = set(learned)
    return np.array([group not in seen for group in groups])


def _unseen_notes(
    learned: Mapping[str, Any], probe: LinearProbe | None, groups: Sequence[str], steered: bool
) -> Iterator[str]:
    """Which problems are left out since something learned from them, and whether that is known."""
    if seen := {*groups} & {*learned.get("groups", ())}:
        yield f"The recipe learned from {len(seen)} of these problems; the differences are of the others."
    if steered and ("groups" not in learned or learned.get("groups_incomplete")):
        yield "The recipe does not say which problems it learned from: these may be among them."
    if probe is not None and (seen := {*probe.provenance.get("learned_from", ())} & {*groups}):
        yield f"The probe learned from {len(seen)} of these problems; its mean score is of the others."


def _notes(plain: TraceStore, steered: TraceStore, pairs: Sequence[tuple[Trace, Trace]]) -> tuple[str, ...]:
    n = len(pairs)
    notes = ["Intervals are over problems; by chance: the runs exchanged problem by problem."]
    ours, theirs = (dict(store.meta.get("sampling", {})) for store in (plain, steered))
    if different := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        notes.append(f"The runs differ in {', '.join(different)}, so that pairs do not share their draws.")
    cut = [sum(trace.finish_reason == "length" for trace in traces) for traces in zip(*pairs, strict=True)]
    if any(cut):
        notes.append(
            f"Cut off at the token limit: {cut[0]} of {plural(n, 'plain trace')} and {cut[1]} steered; they would have been longer."
        )
    if n < max(len(plain), len(steered)):
        notes.append(f"In both runs: {plural(n, 'trace')} (of {len(plain)} and {len(steered)}).")
    if "steered" not in steered.meta:
        notes.append(f"{_name(steered)} names no recipe: it was not recorded with --steer.")
    return tuple(notes)


def _row(name: str, found: PairedDifference) -> tuple[str, ...]:
    difference = Estimate(value=found.difference, low=found.interval[0], high=found.interval[1])
    chance = f"{in_words(found.chance[0])} to {in_words(found.chance[1])}"
    shown = in_hundredths(difference, signed=True) if name == "accuracy" else in_words(difference)
    return name, in_words(found.theirs), in_words(found.ours), shown, chance, f"{found.n} of {found.n_groups} problems"


def _times(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(value=estimate.value * factor, low=estimate.low * factor, high=estimate.high * factor)
