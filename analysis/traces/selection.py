"""Which of several samples to trust, and how many to draw: rules simulated offline on stored samples, with their
cost in tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.analysis.tokens.arm_results import estimates
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import permutation_p
from reasonscope.data.text.answers import equivalent
from reasonscope.data.trace import Trace

METHOD = "selection"
_N_EXCHANGES = 1000


@dataclass(frozen=True, kw_only=True)
class _SelectedTrace:
    """The outcome of a rule on the samples of one problem: whether its answer is right, and how many tokens were
    generated for it."""

    correct: bool
    tokens: float


Rule = Callable[[Sequence[Trace], np.random.Generator], _SelectedTrace]


def _single(samples: Sequence[Trace], rng: np.random.Generator) -> _SelectedTrace:
    """One sample at random: what every rule has to beat."""
    chosen = samples[int(rng.integers(len(samples)))]
    return _SelectedTrace(correct=bool(chosen.correct), tokens=_tokens(chosen))


def majority(samples: Sequence[Trace], rng: np.random.Generator) -> _SelectedTrace:
    """The answer that most samples give, ties by chance; all samples are generated."""
    return _vote(samples, sum(map(_tokens, samples)), rng)


def short_m(m: int) -> Rule:
    """short-m@k: all k run in parallel and stop once m have ended; the majority of these, ties to the shortest (arXiv
    2505.17813).

    The cost is the tokens that all k had written by then.
    """

    def rule(samples: Sequence[Trace], rng: np.random.Generator) -> _SelectedTrace:
        ended = sorted(samples, key=_tokens)[: min(m, len(samples))]
        longest = _tokens(ended[-1])
        return _vote(ended, sum(min(_tokens(sample), longest) for sample in samples), rng, shortest=True)

    return rule


def best_by(score: Callable[[Trace], float]) -> Rule:
    """The sample with the highest score (a latent-trajectory signal, a probe); all are generated. NaN is the lowest
    score."""

    def rule(samples: Sequence[Trace], rng: np.random.Generator) -> _SelectedTrace:
        scores = [float(score(sample)) for sample in samples]
        chosen = samples[int(np.argmax([-np.inf if np.isnan(value) else value for value in scores]))]
        return _SelectedTrace(correct=bool(chosen.correct), tokens=sum(map(_tokens, samples)))

    return rule


def early_stop(
    scores: Callable[[Trace], Values], threshold: float, answer_at: Callable[[Trace, int], str | None]
) -> Rule:
    """One sample, whose thinking ends where a probe's `scores` (checkpoint,) first exceed `threshold`, or the whole
    trace if they never do.

    `answer_at(trace, checkpoint)` is the answer forced there (see `forced_answers`). The cost is the share of the
    thinking up to the checkpoint (checkpoints are evenly spaced, the last at its end), as far as it was generated and
    not a prefill, plus everything that the trace wrote after its thinking, because an answer costs as much there.
    """

    def rule(samples: Sequence[Trace], rng: np.random.Generator) -> _SelectedTrace:
        chosen = samples[int(rng.integers(len(samples)))]
        values = scores(chosen)
        above = np.flatnonzero(values > threshold)
        if not len(above):
            return _SelectedTrace(correct=bool(chosen.correct), tokens=_tokens(chosen))
        at = int(above[0])
        unwritten = chosen.n_thinking_tokens * (1 - (at + 1) / len(values))
        spent = _tokens(chosen) - min(unwritten, len(chosen.written_thinking))
        return _SelectedTrace(correct=equivalent(answer_at(chosen, at), chosen.problem.answer or ""), tokens=spent)

    return rule


def simulate(traces: Sequence[Trace], rules: dict[str, Rule], *, k: int, repeats: int = 20, seed: int = 0) -> Result:
    """Accuracy and tokens of each rule on k stored samples of each problem: axes (rule, metric).

    `repeats` random choices of k samples per problem, the same for every rule; the interval is over problems. The null
    is a single sample, whose accuracy is the band of every rule's. `numbers` has the share of problems with any right
    sample (the ceiling), and `best`: the most accurate rule, its gain over a single sample, and how often the best of
    all rules gains as much if rules and single sample are exchanged problem by problem. Raises InputError for traces
    without a gold answer, or with fewer than k samples of a problem.
    """
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        if trace.correct is None and not trace.undecided:
            raise InputError(f"trace {trace.id!r} has no gold answer to be judged by")
        groups.setdefault(trace.problem.id, []).append(trace)
    short = [name for name, samples in groups.items() if len(samples) < k]
    if short or len(groups) < 2:
        raise InputError(
            f"{len(groups)} problems, {len(short)} of them with fewer than {k} samples; record at least 2 with {k} each"
        )
    every = {"single": _single, **rules}
    table = np.array(
        [_of_problem(samples, every, k, repeats, seed) for samples in groups.values()]
    )  # problem rule metric
    of = [samples[0].problem.group for samples in groups.values()]
    values, ends = estimates(dict(zip(every, table.swapaxes(0, 1), strict=True)), of)
    low, high = (np.broadcast_to(end[:1], values.shape) for end in ends)
    return Result(
        method=METHOD,
        quantity="accuracy and generated tokens of a selection rule",
        unit="1 (accuracy), tokens",
        axes=(Axis.of("rule", every), Axis.of("metric", ("accuracy", "tokens"))),
        values=values,
        null=Band.of(low, high, values.shape, "a single sample, 95% over problems"),
        interval=Band.of(ends[0], ends[1], values.shape, f"over {len(groups)} problems, 95%"),
        numbers={
            "k": k,
            "any_right": float(np.mean([any(t.correct for t in g) for g in groups.values()])),
            "best": _best_rule(list(every), table, of, seed),
        },
        provenance={"traces": len(traces), "repeats": repeats, "seed": seed},
    )


def _best_rule(names: Sequence[str], table: Values, of: Sequence[str], seed: int) -> dict[str, Any]:
    """The most accurate rule of `table` (problem, rule, metric), of equal ones the cheapest, and its gain over the first rule.

    The p-value is that of the best gain of all rules: every exchange of the rules with the single sample, of all
    problems of a group at once, has a best rule of its own.
    """
    _, place = np.unique(list(of), return_inverse=True)
    right, tokens = table[:, :, 0], table[:, 1:, 1].mean(axis=0)
    gains = np.zeros((place.max() + 1, len(tokens)))
    np.add.at(gains, place, right[:, 1:] - right[:, :1])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(_N_EXCHANGES, len(gains)))
    observed, chance = gains.sum(axis=0) / len(right), (signs @ gains).max(axis=1) / len(right)
    best = max(range(len(tokens)), key=lambda rule: (observed[rule], -tokens[rule]))
    # Sums of the same gains in another order may differ in their last bits.
    p = permutation_p(observed[best] - 1e-9, chance)
    return {"rule": names[1 + best], "gain": float(observed[best]), "p_value": float(p)}


def _of_problem(samples: Sequence[Trace], rules: dict[str, Rule], k: int, repeats: int, seed: int) -> Values:
    """(rule, metric): means over random choices of k samples."""
    rng = np.random.default_rng(seed)
    total = np.zeros((len(rules), 2))
    for _ in range(repeats):
        chosen = [samples[int(i)] for i in rng.choice(len(samples), size=k, replace=False)]
        for row, rule in enumerate(rules.values()):
            done = rule(chosen, rng)
            total[row] += done.correct, done.tokens
    return total / repeats


def _vote(
    samples: Sequence[Trace], tokens: float, rng: np.random.Generator, *, shortest: bool = False
) -> _SelectedTrace:
    """The largest set of samples with equal answers; a sample without an answer does not vote."""
    parties: list[list[Trace]] = []
    for sample in samples:
        if sample.final_answer is None:
            continue
        for party in parties:
            if equivalent(sample.final_answer, party[0].final_answer or ""):
                party.append(sample)
                break
        else:
            parties.append([sample])
    if not parties:
        return _SelectedTrace(correct=False, tokens=tokens)
    most = max(map(len, parties))
    tied = [party for party in parties if len(party) == most]
    chosen = min(tied, key=lambda party: min(map(_tokens, party))) if shortest else tied[int(rng.integers(len(tied)))]
    return _SelectedTrace(correct=bool(chosen[0].correct), tokens=tokens)


def _tokens(trace: Trace) -> float:
    return float(len(trace.token_ids) - trace.n_prompt_tokens)
