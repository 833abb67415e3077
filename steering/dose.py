"""What steering does at each strength, beside what it is for and beside what random directions of the same norm do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t
from transformers import LogitsProcessor

from reasonscope.data.behaviour import behaviour
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.evaluate import Estimate, Resamples, Values
from reasonscope.probes.model import Model
from reasonscope.probes.rollout import rollouts
from reasonscope.probes.sites import Site
from reasonscope.steering.apply import Intervention, Steering, check_touched
from reasonscope.steering.operators import Operator, add
from reasonscope.steering.scope import Scope
from reasonscope.steering.side_effects import (
    compression_ratio,
    divergence,
    generated,
    reading,
    repeated_ngrams,
    well_formed,
)
from reasonscope.steering.vector import SteeringVector

# What is measured of each trace, NaN where it says nothing; an arm gives the mean (perplexity: the exponential of the mean).
MEASURES = (
    "tokens", "accuracy", "refused", "refused_harmful", "refused_benign", "well_formed", "repeated_ngrams", "compression",
    "perplexity", "kl",
)  # fmt: skip
_UNKNOWN = Estimate(value=float("nan"), low=float("nan"), high=float("nan"))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run the same problems with the same seeds.

    `tokens` and `accuracy` are means with intervals over problems; `change` is the mean change of thinking tokens against the
    unsteered arm as a share of its mean, paired by problem (0 for that arm itself). `touched` counts the tokens edited.

    `measures` holds all of them by the names of MEASURES: `tokens` of thinking, `accuracy` (of problems with a gold answer), `refused`
    (and of the harmful and the benign requests apart), `well_formed` answers, `repeated_ngrams` (share of 4-grams), `compression` (ratio),
    and on the text that the unsteered model wrote `perplexity` under the steered model and `kl` from the unsteered one (nats a token).
    `differences` are those to the unsteered arm, paired by problem and seed. What says nothing (accuracy without gold answers) is absent.
    """

    name: str
    multiplier: float
    n_problems: int
    tokens: Estimate
    accuracy: Estimate
    change: Estimate
    touched: int
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    differences: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Dose:
    """One strength: the vector, its reverse, and random vectors of its norm, each at that multiplier.

    `excess`: the arm `steered` less the mean of the arms `random`, paired by problem and seed.
    """

    strength: float
    steered: Arm
    reversed: Arm
    random: tuple[Arm, ...]
    excess: Mapping[str, Estimate]

    @property
    def beyond_random(self) -> bool:
        """Whether the change of thinking tokens is one that a random direction makes in at most 5 % of cases, and its excess over the
        random ones is not 0 on other problems.

        The first is Student's prediction interval for one more draw of k random changes, mean ± t √(1 + 1/k) sd: to lie outside of all
        of five happens to a random direction one time in three.
        """
        changes = np.array([arm.change.value for arm in self.random])
        k, excess = len(changes), self.excess["tokens"]
        reach = float(t.ppf(0.975, k - 1)) * np.sqrt(1 + 1 / k) * changes.std(ddof=1)
        outside = bool(abs(self.steered.change.value - changes.mean()) > reach)
        return outside and (excess.low > 0 or excess.high < 0)


@dataclass(frozen=True, kw_only=True)
class DoseResponse:
    """`doses` in ascending order of strength; strength 0 is `base`. `held_out`: whether the vector says which problems it was made from
    (none of which is here), or does not say."""

    name: str
    sites: tuple[Site, ...]
    base: Arm
    doses: tuple[Dose, ...]
    held_out: bool

    @property
    def arms(self) -> list[Arm]:
        """All arms, the unsteered first."""
        return [self.base, *(arm for dose in self.doses for arm in (dose.steered, dose.reversed, *dose.random))]


def compare(
    model: Model,
    problems: Sequence[Problem],
    sampling: Sampling,
    vectors: Mapping[str, tuple[SteeringVector, float]],
    *,
    scope: Scope,
    batch_size: int = 32,
) -> list[Arm]:
    """Run `problems` unsteered (arm `base`, first) and with each vector at its multiplier; same seeds in every arm.

    Use problems that the vectors were not made from. Raises InputError where a vector does not fit or touched no token.
    """
    bench = Bench(model, problems, sampling, batch_size=batch_size, on_given_text=False)
    arms = [bench.arm("base", 0.0, bench.base)]
    for name, (vector, multiplier) in vectors.items():
        vector.check(model)
        arms.append(bench.arm(name, multiplier, bench.run(name, Steering(vector, multiplier, scope))))
    return arms


def dose_response(
    model: Model,
    problems: Sequence[Problem],
    sampling: Sampling,
    vector: SteeringVector,
    strengths: Sequence[float],
    *,
    scope: Scope,
    name: str = "",
    operator: Operator = add,
    nulls: int = 5,
    states: Mapping[Site, NDArray[np.float32]] | None = None,
    samples: int = 1,
    batch_size: int = 32,
    say: Callable[[str], None] = lambda _: None,
) -> DoseResponse:
    """Steer `problems` at each of `strengths`, in reverse too, and with `nulls` random vectors of the same norm; same seeds throughout.

    With `states` (row, d_model) by site the random vectors have their covariance. Raises InputError for a strength of 0 (it is there),
    for fewer than 5 nulls, for problems that the vector was made from, for a vector that does not fit, and where it touched no token.
    """
    chosen = sorted(set(strengths))
    if not chosen or 0 in chosen or not np.isfinite(chosen).all():
        raise InputError(
            f"strengths {list(strengths)}: give finite ones other than 0, which is always there as the base"
        )
    if nulls < 5:
        raise InputError(f"{nulls} random vectors; at least 5 are needed to say what chance does")
    vector.check(model)
    held_out = _check_held_out(vector, problems)
    name = name or vector.method
    bench = Bench(model, problems, sampling, samples=samples, batch_size=batch_size)
    random = [vector.random_like(seed, states=states) for seed in range(nulls)]
    runs: dict[tuple[int, float], Run] = {}  # by the random vector (-1: the vector itself) and the multiplier

    def run(which: int, multiplier: float) -> Run:
        if (which, multiplier) not in runs:
            label = f"{name if which < 0 else f'random {which + 1}'} at {multiplier:g}"
            say(label)
            steering = Steering(vector if which < 0 else random[which], multiplier, scope, operator=operator)
            runs[which, multiplier] = bench.run(label, steering)
        return runs[which, multiplier]

    doses = []
    for strength in chosen:
        steered, reverse = run(-1, strength), run(-1, -strength)
        drawn = [run(i, strength) for i in range(nulls)]
        doses.append(
            Dose(
                strength=strength,
                steered=bench.arm(name, strength, steered),
                reversed=bench.arm(f"{name} reversed", -strength, reverse),
                random=tuple(bench.arm(f"random {i + 1}", strength, one) for i, one in enumerate(drawn)),
                excess=bench.differences(steered, drawn),
            )
        )
    base = bench.arm("base", 0.0, bench.base)
    return DoseResponse(name=name, sites=tuple(vector.directions), base=base, doses=tuple(doses), held_out=held_out)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The measures (trace,) of one run of all problems; `perplexity` is the mean negative log-likelihood of the trace's tokens."""

    values: Mapping[str, Values]
    touched: int


class Bench:
    """The same problems with the same seeds, run as often as is asked, each time measured beside the unsteered run.

    `on_given_text=False` leaves out perplexity and KL. An `Intervention` of any kind may be run.
    """

    def __init__(
        self,
        model: Model,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        samples: int = 1,
        batch_size: int = 32,
        on_given_text: bool = True,
    ) -> None:
        if not problems:
            raise InputError("no problem to steer on; give at least two")
        self._model, self._problems, self._sampling = model, problems, sampling
        self._samples, self._batch_size, self._on_given_text = samples, batch_size, on_given_text
        self.traces = self._write(None)
        groups = [trace.problem.group for trace in self.traces]
        self._n_problems, self._resamples = len(set(groups)), Resamples(groups)
        self.base = Run(values=self._measured(self.traces, None, on_given_text), touched=0)

    def run(
        self,
        name: str,
        intervention: Intervention | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        prefill: str = "",
    ) -> Run:
        """With an intervention, with controls of the decoding, or with both: all are arms of one plane.

        Perplexity and KL are those of the states, so that a run with `processors`, which act behind them, or with a `prefill` has none.
        Raises InputError where the intervention touched no token of what it made the model write.
        """
        traces = self._write(intervention, processors, prefill)
        touched = 0
        if intervention is not None:
            check_touched(intervention, name)
            touched = intervention.touched
        on_given_text = self._on_given_text and not processors and not prefill
        return Run(values=self._measured(traces, intervention, on_given_text), touched=touched)

    def arm(self, name: str, multiplier: float, run: Run) -> Arm:
        change = self._means("tokens", run) / self._means("tokens", self.base) - 1
        measures = self._estimates({name: self._means(name, run) for name in run.values})
        return Arm(
            name=name,
            multiplier=multiplier,
            n_problems=self._n_problems,
            tokens=measures["tokens"],
            accuracy=measures.get("accuracy", _UNKNOWN),
            change=self._resamples.estimate(change) or _UNKNOWN,
            touched=run.touched,
            measures=measures,
            differences=self.differences(run, [self.base]),
        )

    def differences(self, run: Run, others: Sequence[Run]) -> dict[str, Estimate]:
        """Each measure of `run` less its mean over `others`, on the same resamples of problems."""
        return self._estimates(
            {
                name: self._means(name, run) - np.mean([self._means(name, other) for other in others], axis=0)
                for name in run.values
            }
        )

    def _write(
        self, intervention: Intervention | None, processors: Sequence[LogitsProcessor] = (), prefill: str = ""
    ) -> list[Trace]:
        return rollouts(
            self._model,
            self._problems,
            self._sampling,
            samples=self._samples,
            batch_size=self._batch_size,
            write=intervention.edits if intervention else None,
            on_step=intervention.on_step if intervention else None,
            processors=processors,
            prefill=prefill,
        )

    def _measured(
        self, traces: Sequence[Trace], intervention: Intervention | None, on_given_text: bool
    ) -> dict[str, Values]:
        rows: dict[str, list[float]] = {}
        for trace in traces:
            for name, value in _of_trace(trace).items():
                rows.setdefault(name, []).append(value)
        values = {name: np.array(row, dtype=np.float64) for name, row in rows.items()}
        if on_given_text:
            read = reading(self._model, intervention) if intervention else None
            moved = divergence(self._model, self.traces, read, {"written": generated})["written"]
            values |= {"perplexity": moved.nll / moved.n_tokens, "kl": moved.kl / moved.n_tokens}
        return values

    def _estimates(self, statistics: Mapping[str, Values]) -> dict[str, Estimate]:
        """Those that say something: a measure that is defined on too few problems is left out."""
        found = {name: self._resamples.estimate(values) for name, values in statistics.items()}
        return {name: estimate for name, estimate in found.items() if estimate is not None}

    def _means(self, name: str, run: Run) -> Values:
        """A measure of a run on every resample of problems (1 + draw,)."""
        if name not in ("perplexity", "kl"):
            return self._resamples.means(run.values[name])
        lengths = np.array([len(generated(trace)) for trace in self.traces], dtype=np.float64)
        means = self._resamples.means(run.values[name], lengths)
        return np.exp(means) if name == "perplexity" else means


def _of_trace(trace: Trace) -> dict[str, float]:
    refused, harmful = float(behaviour(trace) == "refused"), trace.problem.meta.get("harmful")
    written = trace.token_ids[trace.n_prompt_tokens :].tolist()
    return {
        "tokens": float(trace.n_thinking_tokens),
        "accuracy": np.nan if trace.correct is None else float(trace.correct),
        "refused": refused,
        "refused_harmful": refused if harmful is True else np.nan,
        "refused_benign": refused if harmful is False else np.nan,
        "well_formed": float(well_formed(trace)),
        "repeated_ngrams": repeated_ngrams(written),
        "compression": compression_ratio(trace.text[trace.chars.open.start :]),
    }


def _check_held_out(vector: SteeringVector, problems: Sequence[Problem]) -> bool:
    if "groups" not in vector.provenance:
        return False
    if seen := sorted({problem.group for problem in problems} & set(vector.provenance["groups"])):
        raise InputError(
            f"the vector was made from {len(seen)} of these problems ({seen[0]!r} …); judge it on problems that it was not made from"
        )
    return True
