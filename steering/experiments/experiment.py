"""The same problems with the same seeds, answered in many ways side by side: what each way changes, paired by problem."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import LogitsProcessor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, Resamples, difference_estimate, mean_estimate
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.batch_size import max_rows_that_fit
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.conditions import BatchedConditions, Condition
from reasonscope.steering.experiments.side_effects import (
    compression_ratio,
    divergences,
    generated,
    is_well_formed_answer,
    logits_function,
    repeated_ngrams,
)
from reasonscope.steering.vectors.intervention import Intervention, mean_distances, require_edits

# What is measured of each trace, NaN where it says nothing; an arm gives the mean (perplexity: the exponential of the mean).
MEASURES = (
    "tokens", "accuracy", "refused", "refused_harmful", "refused_benign", "well_formed", "repeated_ngrams", "compression",
    "perplexity", "kl",
)  # fmt: skip
# Those that are 0 or 1 for each trace.
VERDICTS = frozenset(("accuracy", "refused", "refused_harmful", "refused_benign", "well_formed"))
# Rows of one pass, at most: a small model takes hardly longer for them than for a few.
MOST_ROWS = 256
_UNKNOWN = Estimate(value=float("nan"), low=float("nan"), high=float("nan"))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run the same problems with the same seeds.

    `tokens` and `accuracy` are means with intervals over problems; `change` is the mean change of thinking tokens against the
    unsteered arm as a share of its mean, paired by problem (0 for that arm itself). `n_edited` counts the tokens edited.

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
    n_edited: int
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    distances: Mapping[Site, float] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        """How far the states of an edited token were moved, summed over sites, in units of the residual stream."""
        return sum(self.distances.values())


@dataclass(frozen=True, kw_only=True)
class ArmMeasurements:
    """The measures (trace,) of one run of all problems; `perplexity` is the mean negative log-likelihood of the trace's tokens."""

    values: Mapping[str, Values]
    n_edited: int
    distances: Mapping[Site, float] = field(default_factory=dict)


class SteeringExperiment:
    """The same problems with the same seeds, answered in as many ways as are asked for, each measured beside the unsteered run.

    Ways that are asked for together run in one batch, the unsteered run with the first of them, at most `batch_size` rows (a way and a
    problem each) at a time, where none is given as many as there is room for (`max_rows_that_fit`) up to 256; each row writes what it would
    write alone. `on_given_text=False` leaves out perplexity and KL.
    """

    def __init__(
        self,
        model: Model,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        samples: int = 1,
        batch_size: int | None = None,
        on_given_text: bool = True,
    ) -> None:
        if not problems:
            raise InputError("no problem to steer on; give at least two")
        self.model, self.problems, self._sampling = model, tuple(problems), sampling
        self._samples, self._batch_size, self._on_given_text = samples, batch_size, on_given_text
        self._groups = [problem.group for problem in problems for _ in range(samples)]
        self._n_problems, self._resamples = len(set(self._groups)), Resamples(self._groups)
        self._base: tuple[list[Trace], ArmMeasurements] | None = None

    @property
    def traces(self) -> list[Trace]:
        """What the unsteered model wrote."""
        return self._unsteered()[0]

    @property
    def base(self) -> ArmMeasurements:
        return self._unsteered()[1]

    @property
    def base_arm(self) -> Arm:
        return self.arm("base", 0.0, self.base)

    def run(
        self,
        name: str,
        intervention: Intervention | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        prefill: str = "",
    ) -> ArmMeasurements:
        """One way alone; see `run_all`."""
        condition = Condition(name=name, intervention=intervention, processors=tuple(processors), prefill=prefill)
        return self.run_all([condition])[0]

    def run_all(
        self, conditions: Sequence[Condition], *, say: Callable[[str], None] = lambda _: None
    ) -> list[ArmMeasurements]:
        """All are arms of one plane: interventions, controls of the decoding, or both.

        Perplexity and KL are those of the states, so that a run with processors, which act behind them, or with a prefill has none.
        Raises InputError where an intervention touched no token of what it made the model write, or is given twice.
        """
        interventions = [one.intervention for one in conditions if one.intervention is not None]
        if len({id(one) for one in interventions}) < len(interventions):
            raise InputError("one intervention in two treatments; it counts what it touches, so make one for each")
        together = [*conditions] if self._base else [Condition(name="base"), *conditions]
        written = self._write(together, say)
        runs = self._measured(together, written, self._base[0] if self._base else written[0])
        if self._base is None:
            self._base = written[0], runs.pop(0)
        return runs

    def arms(self, conditions: Sequence[Condition], *, say: Callable[[str], None] = lambda _: None) -> list[Arm]:
        """As `run_all`, of each treatment its arm."""
        runs = self.run_all(conditions, say=say)
        return [self.arm(one.name, one.multiplier, run) for one, run in zip(conditions, runs, strict=True)]

    def arm(self, name: str, multiplier: float, run: ArmMeasurements) -> Arm:
        change = self._means("tokens", run) / self._means("tokens", self.base) - 1
        measures = _known({name: self._estimate(name, run) for name in run.values})
        return Arm(
            name=name,
            multiplier=multiplier,
            n_problems=self._n_problems,
            tokens=measures["tokens"],
            accuracy=measures.get("accuracy", _UNKNOWN),
            change=self._resamples.estimate(change) or _UNKNOWN,
            n_edited=run.n_edited,
            distances=run.distances,
            measures=measures,
            differences=self.differences(run, [self.base]),
        )

    def differences(self, run: ArmMeasurements, others: Sequence[ArmMeasurements]) -> dict[str, Estimate]:
        """Each measure of `run` less its mean over `others`, on the same resamples of problems."""
        return _known({name: self._difference(name, run, others) for name in run.values})

    def _unsteered(self) -> tuple[list[Trace], ArmMeasurements]:
        if self._base is None:
            self.run_all([])
        assert self._base is not None
        return self._base

    def _write(self, conditions: Sequence[Condition], say: Callable[[str], None]) -> list[list[Trace]]:
        """What each of the treatments makes the model write: as many lists of traces."""
        written: list[list[Trace]] = []
        rows = self._batch_size or self._fitting([one.prefill for one in conditions])
        for start in range(0, len(conditions), rows):
            together = conditions[start : start + rows]
            say(", ".join(one.name for one in together))
            side_by_side = BatchedConditions(together)
            traces = rollouts(
                self.model,
                self.problems,
                self._sampling,
                samples=self._samples,
                batch_size=rows,
                write=side_by_side.edits,
                on_step=side_by_side.on_step,
                processors=[side_by_side] if any(one.processors for one in together) else (),
                prefill=[one.prefill for one in together],
            )
            n = len(self.problems) * self._samples
            written += [traces[i * n : (i + 1) * n] for i in range(len(together))]
        return written

    def _fitting(self, prefills: Sequence[str]) -> int:
        """Rows of the longest prompt and all that may be written behind it, up to the whole context."""
        longest = max(
            len(self.model.encode_prompt(problem, prefill=prefill))
            for prefill in set(prefills)
            for problem in self.problems
        )
        tokens = min(longest + self._sampling.max_new_tokens, self.model.context_length)
        return max_rows_that_fit(self.model, tokens, most=MOST_ROWS)

    def _measured(
        self, conditions: Sequence[Condition], written: Sequence[list[Trace]], base: Sequence[Trace]
    ) -> list[ArmMeasurements]:
        runs = []
        for condition, traces in zip(conditions, written, strict=True):
            rows = [_of_trace(trace) for trace in traces]
            values = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
            n_edited, distances = 0, {}
            if condition.intervention is not None:
                require_edits(condition.intervention, condition.name)
                n_edited = condition.intervention.n_edited
                distances = mean_distances(condition.intervention)
            runs.append(ArmMeasurements(values=values, n_edited=n_edited, distances=distances))
        of_states = [
            i for i, one in enumerate(conditions) if self._on_given_text and not one.processors and not one.prefill
        ]
        readers = [logits_function(self.model, one) if (one := conditions[i].intervention) else None for i in of_states]
        moved = divergences(self.model, base, readers, {"written": generated}) if readers else []
        for i, found in zip(of_states, moved, strict=True):
            on_base = found["written"]
            nats = {"perplexity": on_base.nll / on_base.n_tokens, "kl": on_base.kl / on_base.n_tokens}
            runs[i] = replace(runs[i], values={**runs[i].values, **nats})
        return runs

    def _estimate(self, name: str, run: ArmMeasurements) -> Estimate | None:
        if name not in VERDICTS:
            return self._resamples.estimate(self._means(name, run))
        return self._verdicts(run.values[name])

    def _difference(self, name: str, run: ArmMeasurements, others: Sequence[ArmMeasurements]) -> Estimate | None:
        if name not in VERDICTS or others[0] is run:  # less itself it is 0, and known to be
            means = np.mean([self._means(name, other) for other in others], axis=0)
            return self._resamples.estimate(self._means(name, run) - means)
        return self._verdicts(run.values[name], np.mean([other.values[name] for other in others], axis=0))

    def _verdicts(self, ours: Values, theirs: Values | None = None) -> Estimate | None:
        """The mean of verdicts, less that of others where there are any; without an interval where they are of one problem."""
        told = ours if theirs is None else ours - theirs
        known = np.isfinite(told)
        groups = [group for group, there in zip(self._groups, known, strict=True) if there]
        if not groups:
            return None
        if len(set(groups)) < 2:
            return replace(_UNKNOWN, value=float(told[known].mean()))
        if theirs is None:
            return mean_estimate(ours[known], groups=groups)
        return difference_estimate(ours[known], theirs[known], verdicts=True, groups=groups)

    def _means(self, name: str, run: ArmMeasurements) -> Values:
        """A measure of a run on every resample of problems (1 + draw,)."""
        if name not in ("perplexity", "kl"):
            return self._resamples.means(run.values[name])
        lengths = np.array([len(generated(trace)) for trace in self.traces], dtype=np.float64)
        means = self._resamples.means(run.values[name], lengths)
        return np.exp(means) if name == "perplexity" else means


def _known(estimates: Mapping[str, Estimate | None]) -> dict[str, Estimate]:
    """Those that say something: a measure that is defined on too few problems is left out."""
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _of_trace(trace: Trace) -> dict[str, float]:
    refused, harmful = float(behaviour(trace) == "refused"), trace.problem.meta.get("harmful")
    written = trace.token_ids[trace.n_prompt_tokens :].tolist()
    return {
        "tokens": float(trace.n_thinking_tokens),
        "accuracy": np.nan if trace.correct is None else float(trace.correct),
        "refused": refused,
        "refused_harmful": refused if harmful is True else np.nan,
        "refused_benign": refused if harmful is False else np.nan,
        "well_formed": float(is_well_formed_answer(trace)),
        "repeated_ngrams": repeated_ngrams(written),
        "compression": compression_ratio(trace.text[trace.chars.open.start :]),
    }
