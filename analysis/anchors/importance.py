"""Importance of a sentence from rollouts that begin before it and after it: accuracy and KL, resampled,
counterfactual, forced."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.intervals import shares_difference, wilson_interval
from reasonscope.data.progress import tracked
from reasonscope.data.variants import Variant, is_published

_PUBLISHED_SMOOTHING, SMOOTHING = 1e-9, 1.0
METRICS = (
    "accuracy",
    "resampling_accuracy",
    "resampling_kl",
    "counterfactual_accuracy",
    "counterfactual_kl",
    "different_fraction",
    "overdeterminedness",
)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One continuation: its `answer` ("" or None: none given), whether it is right (None: not judged), its first
    sentence, and that sentence's `similarity` to the one it replaces."""

    answer: str | None
    correct: bool | None
    resampled: str = ""
    similarity: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether it gave an answer."""
        return bool(self.answer)


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How the numbers are counted.

    Attributes:
        similarity_threshold: A resampled sentence below this cosine counts as different.
        variant: "published" keeps the published sign of counterfactual accuracy (dissimilar minus kept, the opposite of
            resampling's) and its zeros if a side is empty; otherwise both are kept minus without, and such a number is
            NaN.
        smoothing: Added to every count of an answer before a KL. With the published 1e-9, one rollout in a hundred with
            an answer unseen on the other side costs .2 nats; 1 (Laplace) is the default.
    """

    similarity_threshold: float = 0.8
    variant: Variant = "corrected"
    smoothing: float = float("nan")

    def __post_init__(self) -> None:
        if np.isnan(self.smoothing):
            object.__setattr__(self, "smoothing", _PUBLISHED_SMOOTHING if self.is_published else SMOOTHING)

    @property
    def is_published(self) -> bool:
        return is_published(self.variant)


def _answer_kl(p: Sequence[Rollout], q: Sequence[Rollout], *, smoothing: float, empty: float = 0.0) -> float:
    """KL in nats between the answers of two sets of rollouts, with `smoothing` added on the union of their answers;
    `empty` if a side is. Rollouts without an answer are ignored."""
    left, right = (Counter(r.answer for r in side if r.answered) for side in (p, q))
    if not left or not right:
        return empty
    support = list(dict.fromkeys([*left, *right]))
    counts = np.array([[side[answer] for answer in support] for side in (left, right)], dtype=np.float64)
    return _kl(counts + smoothing)


def _kl(counts: Values) -> float:
    left, right = counts / counts.sum(axis=1, keepdims=True)
    return float(max(0.0, (left * np.log(left / right)).sum()))


def _accuracy(rollouts: Sequence[Rollout], empty: float = 0.0) -> float:
    """Share of right ones among the rollouts that answered and were judged."""
    judged = _verdicts(rollouts)
    return float(np.mean(judged)) if judged else empty


def _importances(
    rollouts: Mapping[int, Sequence[Rollout]], convention: Convention | None = None
) -> dict[int, dict[str, float]]:
    """The numbers of `METRICS` for each sentence i, from `rollouts[i]`, which keep the sentences before i and rewrite i
    and everything after it.

    N = rollouts[i + 1] keep sentence i. With D the answered rollouts of i whose first sentence differs from sentence i
    and S the others: resampling = accuracy(N) − accuracy(i), KL(i ‖ N); counterfactual = accuracy(N) − accuracy(D),
    KL(D ‖ N ∪ S) (Thought Anchors, arXiv 2506.19143, section 3). The KLs use the next sentence that has rollouts; for
    the last sentence only its accuracy is known.
    """
    how = convention or Convention()
    nothing = 0.0 if how.is_published else float("nan")
    indices = sorted(rollouts)
    return {
        i: _of_sentence(rollouts[i], rollouts.get(i + 1), rollouts[following] if following is not None else None, how, nothing)
        for i, following in zip(indices, [*indices[1:], None], strict=True)
    }  # fmt: skip


def _of_sentence(
    here: Sequence[Rollout],
    exact: Sequence[Rollout] | None,
    following: Sequence[Rollout] | None,
    how: Convention,
    nothing: float,
) -> dict[str, float]:
    found = dict.fromkeys(METRICS, nothing)
    found["accuracy"] = _accuracy(here, nothing)
    if following is None:
        return found
    answered = [r for r in here if r.answered]
    unlike = [r for r in answered if r.similarity < how.similarity_threshold]
    alike = [r for r in answered if r.similarity >= how.similarity_threshold]
    kept = [r for r in following if r.answered]
    if exact is not None:
        found["resampling_accuracy"] = _accuracy(exact, nothing) - found["accuracy"]
    found["resampling_kl"] = _answer_kl(here, following, smoothing=how.smoothing, empty=nothing)
    if unlike and kept:
        change = _accuracy(kept, nothing) - _accuracy(unlike, nothing)
        found["counterfactual_accuracy"] = -change if how.is_published else change
        found["counterfactual_kl"] = _answer_kl(unlike, [*kept, *alike], smoothing=how.smoothing, empty=nothing)
    if answered:
        found["different_fraction"] = len(unlike) / len(answered)
        found["overdeterminedness"] = 1 - len({r.resampled for r in answered}) / len(answered)
    return found


def importance_ends(rollouts: Mapping[int, Sequence[Rollout]], convention: Convention) -> tuple[Values, Values]:
    """The ends (metric, sentence) of 95 % intervals over rollouts: Wilson's for shares, Agresti and Caffo's for their
    differences.

    The KLs and `overdeterminedness` have none (NaN): a few answers always differ by some nats from a few others, and
    resamples of them by more, so that a bootstrap interval lies above the truth.
    """
    indices = sorted(rollouts)
    found = [
        _ends_of_sentence(
            rollouts[i], rollouts.get(i + 1), rollouts[following] if following is not None else (), convention
        )
        for i, following in zip(indices, [*indices[1:], None], strict=True)
    ]
    ends = np.array([[one.get(metric, (np.nan, np.nan)) for one in found] for metric in METRICS], dtype=np.float64)
    return ends[..., 0], ends[..., 1]


def _ends_of_sentence(
    here: Sequence[Rollout], exact: Sequence[Rollout] | None, following: Sequence[Rollout], how: Convention
) -> dict[str, tuple[float, float]]:
    answered = [r for r in here if r.answered]
    unlike = [r for r in answered if r.similarity < how.similarity_threshold]
    before, kept, other = _verdicts(here), _verdicts(following), _verdicts(unlike)
    found = {}
    if before:
        found["accuracy"] = wilson_interval(sum(before), len(before))
    if exact is not None and before and (after := _verdicts(exact)):
        found["resampling_accuracy"] = shares_difference(sum(after), len(after), sum(before), len(before))
    if kept and other:
        low, high = shares_difference(sum(kept), len(kept), sum(other), len(other))
        found["counterfactual_accuracy"] = (-high, -low) if how.is_published else (low, high)
    if answered and following:
        found["different_fraction"] = wilson_interval(len(unlike), len(answered))
    return found


def _verdicts(rollouts: Sequence[Rollout]) -> list[bool]:
    """Whether those that answered and were judged are right."""
    return [r.correct for r in rollouts if r.answered and r.correct is not None]


def resampled_sentences(own: str, rollouts: Sequence[Rollout], most: int = 3) -> list[dict[str, Any]]:
    """What rollouts wrote first instead of a sentence, the `most` frequent others.

    Each has its `text`, `n` of how many (`of`), and, of those that were judged, the share that was `right`, with
    Wilson's 95 % interval `ci` and their number `judged`. A text that differs from `own` only in white space is the
    same. `right` and `ci` stay None if no rollout was judged.
    """
    written: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        if text := " ".join(rollout.resampled.split()):
            written.setdefault(text, []).append(rollout)
    others = [(text, rows) for text, rows in written.items() if text != " ".join(own.split())]
    others.sort(key=lambda pair: (-len(pair[1]), pair[0]))
    return [{"text": text, "n": len(rows), "of": len(rollouts), **_judged(rows)} for text, rows in others[:most]]


def _judged(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    known = _verdicts(rollouts)
    if not known:
        return {"right": None, "ci": None, "judged": 0}
    return {
        "right": float(np.mean(known)),
        "ci": list(wilson_interval(sum(known), len(known))),
        "judged": len(known),
    }


def null_values(
    rollouts: Mapping[int, Sequence[Rollout]], convention: Convention, *, n_permutations: int, seed: int
) -> Values:
    """(draw, metric, sentence) with the rollouts of i and i + 1 mixed, so that sentence i changes nothing."""
    rng = np.random.default_rng(seed)
    drawn = tracked(range(n_permutations), "mixing answers", "draws")
    return np.stack([_mixed_table(rollouts, convention, rng) for _ in drawn])


def _mixed_table(rollouts: Mapping[int, Sequence[Rollout]], convention: Convention, rng: np.random.Generator) -> Values:
    """Each sentence against its successor, with the answers of both exchanged at random; similarities stay with the
    sentence."""
    indices = sorted(rollouts)
    columns = []
    for i, following in zip(indices, [*indices[1:], None], strict=True):
        if following is None:
            columns.append(_table(_importances({i: rollouts[i]}, convention))[:, 0])
            continue
        pool = [*rollouts[i], *rollouts[following]]
        places = rng.permutation(len(pool))
        dealt = [
            Rollout(answer=pool[j].answer, correct=pool[j].correct, resampled=own.resampled, similarity=own.similarity)
            for own, j in zip(pool, places, strict=True)
        ]
        n = len(rollouts[i])
        columns.append(_table(_importances({i: dealt[:n], i + 1: dealt[n:]}, convention))[:, 0])
    return np.stack(columns, axis=1)


def _table(found: Mapping[int, Mapping[str, float]]) -> Values:
    return np.array([[found[i][metric] for i in sorted(found)] for metric in METRICS], dtype=np.float64)


def importance_table(rollouts: Mapping[int, Sequence[Rollout]], convention: Convention) -> Values:
    """`_importances` as an array (metric, sentence)."""
    return _table(_importances(rollouts, convention))


def sentence_effects(
    sentences: Values,
    rollouts: Mapping[int, Sequence[Values]],
    threshold: float,
    *,
    without: Mapping[int, Sequence[Values]] | None = None,
) -> Values:
    """How much keeping sentence j makes sentence i appear later: (target, source), NaN if source ≥ target or without rollouts.

    M = match(i | rollouts after j) − match(i | rollouts that rewrite j), as `step_attribution` of the published code. `without` has the
    rollouts that stand for sentence j rewritten; by default `rollouts`.
    """
    rates = {i: _match_rates(sentences, rows, threshold) for i, rows in rollouts.items() if len(rows)}
    other = (
        rates if without is None else {i: _match_rates(sentences, r, threshold) for i, r in without.items() if len(r)}
    )
    n = len(sentences)
    effects = np.full((n, n), np.nan)
    for source in range(n - 1):
        if source in other and source + 1 in rates:
            effects[source + 1 :, source] = (rates[source + 1] - other[source])[source + 1 :]
    return effects


def _match_rates(sentences: Values, rollouts: Sequence[Values], threshold: float) -> Values:
    """Share of the rollouts in which each sentence appears: (sentence,)."""
    hits: NDArray[np.float64] = np.zeros(len(sentences))
    for rows in rollouts:
        if len(rows):
            hits += (sentences @ rows.T).max(axis=1) >= threshold
    return hits / len(rollouts)
