"""Where in its thinking a model is close to the answer: MI peaks (arXiv 2506.02867), their tokens, and their null."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import benjamini_hochberg, bootstrap_band, chance_above, null_band
from reasonscope.analysis.tokens.nocco import EPSILON, SIGMA, mutual_information, squared_correlation
from reasonscope.analysis.wording import PERMUTED
from reasonscope.data.arrays import Rows, Values
from reasonscope.data.errors import InputError
from reasonscope.data.grammars import grammar_of
from reasonscope.data.intervals import mean_estimate, permutation_p
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.align import token_strings
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Problem, Sentence, Trace
from reasonscope.data.variants import Gold, Region
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.generation.recording import as_numpy
from reasonscope.probes.models.model import Model

METHOD, QUANTITY = "mi", "dependence on the answer's representation (NOCCO)"
# The words at the peaks of R1-Distill-Llama-8B (the paper's figure 4).
LEAST_OTHERS = 5  # answers of other problems: with fewer the null is a weaker one
MOST_OTHERS = 39  # with as many, chance lies above the band in 1 of 40
_WEAKER_NULL = f"{PERMUTED} (a weaker null: the run has fewer than {LEAST_OTHERS} other problems)"
THINKING_WORDS = tuple("So Let Hmm I Okay First Wait But Now Then Since Therefore If Maybe To".split())


def gold_text(trace: Trace, gold: Gold = "reference") -> str:
    """The text whose last token stands for the answer: the problem's reference solution (the paper), or the model's own
    answer.

    A reference solution is `solution` or `gt_solution` of the problem's meta, or what the grammar of its problem set
    writes. Raises InputError if the problem or trace has none.
    """
    if gold == "own":
        if not trace.answer_text.strip():
            raise InputError(f"trace {trace.id!r} has no answer of its own (state {trace.state}); leave it out")
        return trace.answer_text.strip()
    return _reference_solution(trace.problem)


def _reference_solution(problem: Problem) -> str:
    """A written solution with its answer. Raises InputError if the problem has none."""
    for key in ("solution", "gt_solution"):
        if problem.meta.get(key):
            return str(problem.meta[key])
    if grammar := grammar_of(problem):
        return grammar.reference_solution(problem)
    raise InputError(
        f"problem {problem.id!r} has no reference solution in its meta (solution, gt_solution); give gold='own', "
        "which compares with the model's own answer"
    )


def representations(model: Model, texts: Sequence[str], sites: Sequence[Site]) -> list[dict[Site, Values]]:
    """The activations at `sites` at the last token of each text, fed alone: (d_model,) float64, the paper's h_y."""
    found = []
    for text in texts:
        _, seen = run_with_cache(model, text, sites)
        found.append({site: as_numpy(seen[site][0, -1]).astype(np.float64) for site in sites})
    return found


def emitting_rows(trace: Trace, region: Region = "thinking") -> NDArray[np.int64]:
    """The rows of a trace's activations that emit its thinking (or all generated tokens): row t emits token t + 1."""
    tokens = np.arange(trace.n_prompt_tokens, len(trace.token_ids))
    if region == "thinking":
        if trace.state not in ("closed", "truncated"):
            raise InputError(f"trace {trace.id!r} has no thinking ({trace.state}); look at region='generated'")
        tokens = trace.thinking_positions
    return tokens[tokens > 0] - 1


def mi_of_trace(
    trace: Trace,
    hidden: Mapping[Site, NDArray[np.generic]],
    gold: Mapping[Site, Values],
    others: Sequence[Mapping[Site, Values]] = (),
    *,
    sentences: Sequence[Sentence] = (),
    region: Region = "thinking",
    tau: float = 1.5,
    top: int = 20,
    n_permutations: int = MOST_OTHERS,
    sigma: float = SIGMA,
    epsilon: float = EPSILON,
    seed: int = 0,
) -> Result:
    """How much the state at each token depends on the representation of the answer: MI peaks (arXiv 2506.02867).

    The statistic is NOCCO (`mutual_information`), which is not mutual information in nats. The row that EMITS a token
    is that token's.

    Args:
        trace: The trace.
        hidden: Activations (row, d_model) by site, as stored.
        gold: By site, (d_model,): h_y, the state at the last token of the answer's text (see `gold_text`,
            `representations`).
        others: The same of other problems, at least 5, for the null.
        sentences: Its sentences, over which intervals are resampled (at least two).
        region: The thinking, or all generated tokens.
        tau: A peak lies above Q3 + tau · IQR of the trace (definition 2).
        top: The published figures use so many highest tokens instead.
        n_permutations: Permutations for the weaker null.
        sigma: Width of the Gaussian kernel.
        epsilon: Regularisation.
        seed: Random seed.

    Returns:
        Axes (site, token); a token is labelled by its index in the trace. The null pairs the same tokens with the
        answers of other problems, or else with this answer after permuting its coordinates. The second null is weaker,
        because it also breaks the few coordinates of huge scale. `arrays`, all (site, token): `r2` of the coordinates,
        `peaks`, and `top`. `numbers` by site: mean, median, share of peaks, AOM (mean over peaks of |m − median| / IQR)
        and the share of tokens above their null, each with its 95 % interval over sentences (tokens of a sentence are
        not independent).

    Raises:
        InputError: For activations that do not fit. Fewer than 4 tokens give an undefined result.

    Departures: all tokens of the thinking, not the first 512 generated ones; both definitions of a peak.

    Example:
        results = rs.analyse("mi", "runs/mine")
        peaks = results[0].arrays["peaks"]  # (site, token)
        results[0].numbers
    """
    rows, provenance = emitting_rows(trace, region), {"trace": trace.id, **cut_provenance(sentences)}
    if len(rows) < 4:
        reason = f"{len(rows)} tokens; quartiles need at least 4"
        return undefined(method=METHOD, quantity=QUANTITY, unit="1", reason=reason, provenance=provenance)
    sites = list(hidden)
    rng = np.random.default_rng(seed)
    values, r2 = np.empty((len(sites), len(rows))), np.empty((len(sites), len(rows)))
    enough = len(others) >= LEAST_OTHERS
    drawn = np.empty((len(others) if enough else n_permutations, len(sites), len(rows)))
    for i, site in enumerate(sites):
        states = np.asarray(hidden[site][rows], dtype=np.float64)
        foreign = [other[site] for other in others] if enough else []
        foreign = foreign or [rng.permutation(gold[site]) for _ in range(n_permutations)]
        found = mutual_information(states, np.stack([gold[site], *foreign]), sigma=sigma, epsilon=epsilon)
        values[i], drawn[:, i] = found[:, 0], found[:, 1:].T
        r2[i] = squared_correlation(states, gold[site])
    above = np.stack([find_peaks(line, tau=tau) for line in values])
    what = "answers of other problems" if enough else _WEAKER_NULL
    null = null_band(drawn, what)
    # A row belongs to the token that it emits, the next one.
    units = sentence_of_each(sentences, int(rows[-1]) + 2)[rows + 1]
    return Result(
        method=METHOD,
        quantity=QUANTITY,
        unit="1",
        axes=(Axis.of("site", sites), Axis.of("token", [str(row + 1) for row in rows])),
        values=values,
        null=null,
        arrays={"r2": r2, "peaks": above, "top": np.stack([top_k(line, top) for line in values])},
        numbers={
            str(site): {
                **_estimated(line, edge, units, tau=tau, seed=seed),
                "share_above_by_chance": {"value": chance_above(len(drawn))},
            }
            for site, line, edge in zip(sites, values, null.high, strict=True)
        },
        provenance={**provenance, "region": region, "sigma": sigma, "epsilon": epsilon, "tau": tau, "seed": seed},
    )


def _estimated(line: Values, edge: Values, units: NDArray[np.int64], *, tau: float, seed: int) -> dict[str, Any]:
    """The numbers of one site's line (token,), each with its interval over `units` (token,), the sentences; `edge`
    is the null's end."""

    def told(at: Rows) -> dict[str, float]:
        drawn = line[at]
        return {**_summary(drawn, find_peaks(drawn, tau=tau)), "share_above_null": float((drawn > edge[at]).mean())}

    seen = told(np.arange(len(line)))
    band = bootstrap_band(
        lambda at: np.array(list(told(at).values())), len(line), groups=units, unit="sentences", seed=seed
    )
    ends = zip(band.low.tolist(), band.high.tolist(), strict=True)
    found = {name: {"value": value, "ci": list(ci)} for (name, value), ci in zip(seen.items(), ends, strict=True)}
    del found["peak_gap_tokens"]["ci"]  # resampled sentences are not consecutive
    del found["std"]["ci"]  # for heavy tails, bootstrap intervals of a standard deviation are too narrow
    return found


def find_peaks(values: Values, *, tau: float = 1.5) -> NDArray[np.bool_]:
    """Which of `values` (token,) lie above Q3 + tau · IQR (definition 2 of the paper)."""
    q1, q3 = np.quantile(values, [0.25, 0.75])
    return np.asarray(values > q3 + tau * (q3 - q1))


def top_k(values: Values, k: int) -> NDArray[np.bool_]:
    """Which of `values` (token,) are the k highest (the published code takes 20 of every trace)."""
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[:k]] = True
    return chosen


def _summary(values: Values, peaks: NDArray[np.bool_]) -> dict[str, float]:
    """Mean, median, share of peaks, mean distance between peaks in tokens, and AOM; NaN without a peak (or with only
    one)."""
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    at = np.flatnonzero(peaks)
    distance = np.abs(values[peaks] - median).mean() / (q3 - q1) if len(at) and q3 > q1 else np.nan
    return {
        "mean": float(values.mean()),
        "median": float(median),
        "std": float(values.std()),
        "share_peaks": float(peaks.mean()),
        "peak_gap_tokens": float(np.diff(at).mean()) if len(at) > 1 else float("nan"),
        "aom": float(distance),
    }


@dataclass(frozen=True, kw_only=True)
class _TokenRow:
    """How often a word is a peak: `at_peaks` of its `count` occurrences; `enrichment` relative to the share of all
    tokens that are peaks.

    `p_value`: from peaks at random places of the same traces; `q_value`: the same corrected over all words
    (Benjamini–Hochberg).
    """

    word: str
    count: int
    at_peaks: int
    enrichment: float
    p_value: float
    q_value: float
    listed: bool


def thinking_token_table(
    words: Sequence[Sequence[str]],
    peaks: Sequence[NDArray[np.bool_]],
    *,
    least: int = 3,
    n_permutations: int = 2000,
    seed: int = 0,
) -> list[_TokenRow]:
    """The words at peaks, most frequent first; `words` and `peaks` (token,), one of each per trace. Only words of
    letters count.

    Words that occur less than `least` times are left out. Raises InputError if nothing is a peak.
    """
    if not any(mask.any() for mask in peaks):
        raise InputError("no token of these traces is a peak; lower tau, or use the top k")
    vocabulary = sorted({word for line in words for word in line if word.isalpha()})
    index = {word: i for i, word in enumerate(vocabulary)}
    rng = np.random.default_rng(seed)
    counts = np.zeros((len(words), len(vocabulary)), dtype=np.int64)
    hits = np.zeros(len(vocabulary), dtype=np.int64)
    for row, (line, mask) in enumerate(zip(words, peaks, strict=True)):
        for word, peak in zip(line, mask, strict=True):
            if word in index:
                counts[row, index[word]] += 1
                hits[index[word]] += bool(peak)
    kept = np.flatnonzero(counts.sum(axis=0) >= least)
    null = np.zeros((n_permutations, len(kept)))
    for row, mask in enumerate(peaks):  # how many occurrences of a word are hit by random peaks of this trace
        good = counts[row, kept]
        null += rng.hypergeometric(good, len(mask) - good, int(mask.sum()), size=(n_permutations, len(kept)))
    share = sum(int(mask.sum()) for mask in peaks) / sum(map(len, peaks))
    p_values = permutation_p(hits[kept], null)
    q_values = benjamini_hochberg(p_values)
    listed = {word.lower() for word in THINKING_WORDS}
    rows = [
        _TokenRow(
            word=vocabulary[i],
            count=int(counts[:, i].sum()),
            at_peaks=int(hits[i]),
            enrichment=float(hits[i] / counts[:, i].sum() / share),
            p_value=float(p_values[k]),
            q_value=float(q_values[k]),
            listed=vocabulary[i].lower() in listed,
        )
        for k, i in enumerate(kept)
    ]
    return sorted(rows, key=lambda row: (-row.at_peaks, row.p_value, row.word))


def peak_words(trace: Trace, result: Result) -> list[str]:
    """The token at each place of a result's token axis, stripped: the one that the row emits."""
    pieces = token_strings(trace.text, trace.offsets)
    return [pieces[int(label)].strip() for label in result.axis("token").labels]


def _changes(base: Sequence[Result], reasoning: Sequence[Result], site: str | None) -> dict[str, Values]:
    """Reasoning minus base (trace,) of each number, for the traces that have both."""
    pairs = {str(r.provenance["trace"]): r for r in base if r.measured}
    matched = [
        (pairs[str(r.provenance["trace"])], r) for r in reasoning if r.measured and r.provenance["trace"] in pairs
    ]
    found = {}
    for name in ("mean", "aom", "share_peaks"):
        change = np.array([_number(r, site, name) - _number(b, site, name) for b, r in matched], dtype=np.float64)
        found[name] = change[np.isfinite(change)]
    return found


def comparison(
    base: Sequence[Result],
    reasoning: Sequence[Result],
    *,
    site: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """How much the reasoning model's MI numbers exceed its base model's on the same traces: axes (number,).

    Results are paired by trace; a trace that one of them lacks, or whose AOM is undefined, is left out of that number,
    which is NaN if fewer than 2 traces have it. Values of two models also differ in scale because their activations do
    (see `mutual_information`).

    Null: the two models exchanged trace by trace at random, 95 % of `n_resamples`. `numbers`: how many traces have each
    number.
    """
    changes = _changes(base, reasoning, site)
    known = {name: change for name, change in changes.items() if len(change) > 1}
    common: dict[str, Any] = {"method": "mi_compare", "quantity": "reasoning model minus base model", "unit": "1"}
    provenance = {"trace": "all", "site": site, "seed": seed}
    few = f"fewer than 2 traces have {', '.join(name for name in changes if name not in known)} under both models"
    if not known:
        return undefined(**common, reason=few, provenance=provenance)
    rng = np.random.default_rng(seed)
    rows = np.full((5, len(changes)), np.nan)  # value, interval, null
    for column, name in enumerate(changes):
        if name in known:
            change, estimate = known[name], mean_estimate(known[name], shares=False)
            exchanged = (rng.choice([-1.0, 1.0], size=(n_resamples, len(change))) * change).mean(axis=1)
            rows[:, column] = estimate.value, *estimate.interval, *np.quantile(exchanged, [0.025, 0.975])
    shape = (len(changes),)
    return Result(
        **common,
        axes=(Axis.of("number", changes),),
        values=rows[0],
        interval=Band.of(rows[1], rows[2], shape, "over traces, 95%"),
        null=Band.of(rows[3], rows[4], shape, f"models exchanged trace by trace, 95% of {n_resamples}"),
        reason=few if len(known) < len(changes) else "",
        numbers={"traces": {name: len(change) for name, change in changes.items()}},
        provenance=provenance,
    )


def _number(result: Result, site: str | None, name: str) -> float:
    key = site or result.axis("site").labels[-1]
    value = result.numbers[key][name]["value"]
    return float("nan") if value is None else float(value)
