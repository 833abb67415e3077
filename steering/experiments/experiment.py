"""The same problems with the same seeds under several conditions: what each condition changes, paired by problem."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from transformers import LogitsProcessor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate, Resamples, difference_estimate, mean_estimate
from reasonscope.data.progress import working
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.cache import max_rows_that_fit
from reasonscope.probes.generation.rollout import Decode, rollouts
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.conditions import BatchedConditions, Condition
from reasonscope.steering.experiments.side_effects import (
    compression_ratio,
    divergences,
    generated,
    is_well_formed_answer,
    logits_function,
    read_under,
    repeated_ngrams,
)
from reasonscope.steering.vectors.intervention import (
    Intervention,
    check_vectors,
    mean_distances,
    mean_moves,
    require_edits,
)

# Measured for each trace, NaN if undefined there. An arm holds the mean (for perplexity, the exponential of the mean).
MEASURES = (
    "tokens",
    "accuracy",
    "refused",
    "refused_harmful",
    "refused_benign",
    "well_formed",
    "repeated_ngrams",
    "compression",
    "perplexity",
    "kl",
)
# Measures that are 0 or 1 for each trace.
_VERDICTS = frozenset(("accuracy", "refused", "refused_harmful", "refused_benign", "well_formed"))
# At most this many rows in one pass: a small model takes hardly longer for them than for a few.
MOST_ROWS = 256
_UNKNOWN = Estimate(value=float("nan"), low=float("nan"), high=float("nan"))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one condition did, with 95 % intervals over problems.

    Attributes:
        name: The name of the condition; `base` for the unsteered model.
        multiplier: The strength of the condition, 0 if it has none.
        n_problems: Groups of problems, the unit of all intervals.
        tokens: Mean number of thinking tokens.
        accuracy: Share of right answers among problems with a gold answer; NaN without any.
        change: Mean change of thinking tokens from the unsteered arm, as a share of the unsteered mean, paired by problem;
            NaN if the unsteered model did not think.
        n_edited: How many tokens the intervention edited.
        measures: Every defined measure by name (see MEASURES): `tokens`, `accuracy`, `refused` (also among harmful and benign
            requests alone), `well_formed` (share of answers that can be read), `repeated_ngrams` (share of repeated 4-grams) and
            `compression` (ratio). On the unsteered model's own text, `perplexity` under the condition and `kl` from the unsteered
            model, in nats per token. A measure that is undefined here is absent.
        differences: The same measures minus those of the unsteered arm, paired by problem and seed.
        distances: By how much an edited token was moved on average, by site, in units of the residual stream.
        moves: The same for each vector that acted, at multiplier 1 and with a sign: what `random_uses` needs to move states as far.
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
    moves: tuple[Mapping[Site, float], ...] = ()

    @property
    def distance(self) -> float:
        """How far the states of an edited token were moved, summed over sites, in units of the residual stream.

        0 if no state was edited, and NaN if states were edited by something that does not measure how far.
        """
        return sum(self.distances.values()) if self.distances or not self.n_edited else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Every number with its interval, for JSON."""
        return {
            "name": self.name,
            "multiplier": self.multiplier,
            "n_problems": self.n_problems,
            "n_edited": self.n_edited,
            "distance": None if np.isnan(self.distance) else self.distance,
            "distances": {str(site): moved for site, moved in self.distances.items()},
            "change": self.change.to_dict(),
            "measures": estimates_to_dict(self.measures),
            "differences": estimates_to_dict(self.differences),
        }

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "Arm":
        """The arm that `to_dict` wrote, without its `moves`."""
        measures = estimates_from_dict(known["measures"])
        return cls(
            name=known["name"],
            multiplier=known["multiplier"],
            n_problems=known["n_problems"],
            tokens=measures["tokens"],
            accuracy=measures.get("accuracy", _UNKNOWN),
            change=estimates_from_dict({"change": known["change"]})["change"],
            n_edited=known["n_edited"],
            measures=measures,
            differences=estimates_from_dict(known["differences"]),
            distances={
                Site.parse(site): float("nan") if moved is None else moved for site, moved in known["distances"].items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class ArmMeasurements:
    """One run of all problems: what was written, and each measure of it (trace,).

    `values["perplexity"]` holds the mean negative log-likelihood per token, in nats; `distances` by how much an edited token was moved
    on average, by site, `moves` the same for each vector (see `Arm`).
    """

    traces: tuple[Trace, ...]
    values: Mapping[str, Values]
    n_edited: int
    distances: Mapping[Site, float] = field(default_factory=dict)
    moves: tuple[Mapping[Site, float], ...] = ()


class ArmWriter(Protocol):
    """What writes the arms of an experiment in place of the model here."""

    def write(
        self,
        model: Model,
        problems: Sequence[Problem],
        sampling: Sampling,
        conditions: Sequence[Condition],
        *,
        samples: int,
    ) -> list[list[Trace]]:
        """One list of traces per condition, each in the order of the problems with their samples together."""
        ...


class SteeringExperiment:
    """Answers the same problems with the same seeds under any number of conditions, each compared with the unsteered model.

    Conditions that are passed together run in one batch; the unsteered run joins the first of them. Every row writes what it would
    write alone.

    Args:
        model: The model that answers.
        problems: What it answers. Use problems that no steering vector was made from.
        sampling: Temperature, limits and the seed; each problem gets the same draws under every condition.
        samples: Answers per problem.
        batch_size: Rows per pass (one row is one condition on one problem). By default as many as fit into memory, at most 256.
        on_given_text: Whether to measure perplexity and KL as well, which takes one more pass per condition.
        writer: Writes in place of the model, such as `EngineArms`; the model here then reads each text once under its condition, to
            count what was edited and how far, besides perplexity and KL.

    Raises:
        InputError: Without problems, or if all belong to one group.

    Example:
        experiment = SteeringExperiment(model, problems, rs.Sampling(max_new_tokens=512))
        steering = Steering(vector, 1.0, Scope.thinking(model))
        (arm,) = experiment.arms([Condition(name="steered", intervention=steering)])
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
        writer: ArmWriter | None = None,
    ) -> None:
        if not problems:
            raise InputError("no problems to steer on; give at least two")
        self.model, self.problems, self.sampling = model, tuple(problems), sampling
        self._samples, self._batch_size, self._on_given_text = samples, batch_size, on_given_text
        self._writer = writer
        self._groups = [problem.group for problem in problems for _ in range(samples)]
        self._n_problems, self._resamples = len(set(self._groups)), Resamples(self._groups)
        self._base: ArmMeasurements | None = None

    @property
    def groups(self) -> list[str]:
        """The problem group of each trace."""
        return [*self._groups]

    @property
    def traces(self) -> list[Trace]:
        """What the unsteered model wrote."""
        return [*self.base.traces]

    @property
    def base(self) -> ArmMeasurements:
        """The unsteered run."""
        if self._base is None:
            self.run_all([])
        assert self._base is not None
        return self._base

    @property
    def base_arm(self) -> Arm:
        """The unsteered run as an arm."""
        return self.arm("base", 0.0, self.base)

    def run(
        self,
        name: str,
        intervention: Intervention | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        prefill: str = "",
        decode: Decode | None = None,
    ) -> ArmMeasurements:
        """Run one condition alone; see `run_all`."""
        condition = Condition(
            name=name, intervention=intervention, processors=tuple(processors), prefill=prefill, decode=decode
        )
        return self.run_all([condition])[0]

    def run_all(self, conditions: Sequence[Condition]) -> list[ArmMeasurements]:
        """Run all problems under each condition, and without any if that has not been done yet.

        Perplexity and KL compare hidden states. Processors act after these, a prefill and another decoding loop beside them, so such
        conditions have neither measure.

        Args:
            conditions: What to compare; each needs an intervention of its own.

        Returns:
            One run per condition, in their order.

        Raises:
            InputError: If a vector does not fit the model, an intervention edited no token, or two conditions share one.
        """
        interventions = [one.intervention for one in conditions if one.intervention is not None]
        if len({id(one) for one in interventions}) < len(interventions):
            raise InputError("two conditions share one intervention, which counts its own edits; make one for each")
        for intervention in interventions:
            check_vectors(intervention, self.model)
        together = [*conditions] if self._base else [Condition(name="base"), *conditions]
        written = self._write(together)
        runs = self._measured(together, written, self._base.traces if self._base else written[0])
        if self._base is None:
            self._base = runs.pop(0)
        return runs

    def arms(self, conditions: Sequence[Condition]) -> list[Arm]:
        """Run the conditions as `run_all` does; one arm per condition."""
        runs = self.run_all(conditions)
        return [self.arm(one.name, one.multiplier, run) for one, run in zip(conditions, runs, strict=True)]

    def arm(self, name: str, multiplier: float, run: ArmMeasurements) -> Arm:
        """The means of a run with their intervals, and their differences from the unsteered run."""
        unsteered = self._means("tokens", self.base)
        change = self._means("tokens", run) / np.where(unsteered > 0, unsteered, np.nan) - 1
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
            moves=run.moves,
            measures=measures,
            differences=self.differences(run, [self.base]),
        )

    def differences(self, run: ArmMeasurements, others: Sequence[ArmMeasurements]) -> dict[str, Estimate]:
        """Each measure of `run` minus its mean over `others`, on the same resamples of problems."""
        return _known({name: self._difference(name, run, others) for name in run.values})

    def _write(self, conditions: Sequence[Condition]) -> list[list[Trace]]:
        """What the model writes under each condition: one list of traces per condition."""
        if self._writer is not None:
            return self._written_elsewhere(self._writer, conditions)
        written = dict[int, list[Trace]]()
        batched = [i for i, one in enumerate(conditions) if one.decode is None]
        rows = self._batch_size or self._fitting([one.prefill for one in conditions])
        with working("steering", total=len(conditions), unit="conditions") as work:
            for start in range(0, len(batched), rows):
                numbers = batched[start : start + rows]
                together = [conditions[i] for i in numbers]
                work.detail = _named(together)
                side_by_side = BatchedConditions(together)
                traces = self._rollouts(
                    rows,
                    write=side_by_side.edits,
                    on_step=side_by_side.on_step,
                    processors=[side_by_side] if any(one.processors for one in together) else (),
                    prefill=[one.prefill for one in together],
                )
                n = len(self.problems) * self._samples
                written |= {i: traces[place * n : (place + 1) * n] for place, i in enumerate(numbers)}
                work.advance(len(together))
            for i, one in enumerate(conditions):
                if one.decode is not None:
                    work.detail = one.name
                    written[i] = self._rollouts(rows, decode=one.decode)
                    work.advance()
        return [written[i] for i in range(len(conditions))]

    def _written_elsewhere(self, writer: ArmWriter, conditions: Sequence[Condition]) -> list[list[Trace]]:
        found = writer.write(self.model, self.problems, self.sampling, conditions, samples=self._samples)
        for one, traces in zip(conditions, found, strict=True):
            if one.intervention is not None:
                read_under(self.model, one.intervention, traces)
        return found

    def _rollouts(self, rows: int, **how: Any) -> list[Trace]:
        return rollouts(self.model, self.problems, self.sampling, samples=self._samples, batch_size=rows, **how)

    def _fitting(self, prefills: Sequence[str]) -> int:
        """How many rows fit, each as long as the longest prompt with all that may be written after it."""
        longest = max(
            len(self.model.encode_prompt(problem, prefill=prefill))
            for prefill in set(prefills)
            for problem in self.problems
        )
        tokens = min(longest + self.sampling.max_new_tokens, self.model.context_length)
        return max_rows_that_fit(self.model, tokens, most=MOST_ROWS)

    def _measured(
        self, conditions: Sequence[Condition], written: Sequence[list[Trace]], base: Sequence[Trace]
    ) -> list[ArmMeasurements]:
        runs = []
        for condition, traces in zip(conditions, written, strict=True):
            rows = [_of_trace(trace) for trace in traces]
            values = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
            run = ArmMeasurements(traces=tuple(traces), values=values, n_edited=0)
            if (acted := condition.intervention) is not None:
                require_edits(acted, condition.name)
                run = replace(run, n_edited=acted.n_edited, distances=mean_distances(acted), moves=mean_moves(acted))
            runs.append(run)
        of_states = [i for i, one in enumerate(conditions) if self._on_given_text and one.acts_on_states_alone]
        readers = [logits_function(self.model, one) if (one := conditions[i].intervention) else None for i in of_states]
        moved = divergences(self.model, base, readers, {"written": generated}) if readers else []
        for i, found in zip(of_states, moved, strict=True):
            on_base = found["written"]
            nats = {"perplexity": on_base.nll / on_base.n_tokens, "kl": on_base.kl / on_base.n_tokens}
            runs[i] = replace(runs[i], values={**runs[i].values, **nats})
        return runs

    def _estimate(self, name: str, run: ArmMeasurements) -> Estimate | None:
        if name not in _VERDICTS:
            return self._resamples.estimate(self._means(name, run))
        return self._verdicts(run.values[name])

    def _difference(self, name: str, run: ArmMeasurements, others: Sequence[ArmMeasurements]) -> Estimate | None:
        if name not in _VERDICTS or others[0] is run:  # minus itself it is exactly 0
            means = np.mean([self._means(name, other) for other in others], axis=0)
            return self._resamples.estimate(self._means(name, run) - means)
        return self._verdicts(run.values[name], np.mean([other.values[name] for other in others], axis=0))

    def _verdicts(self, ours: Values, theirs: Values | None = None) -> Estimate | None:
        """The mean of 0/1 verdicts, minus that of others if given; without an interval if all belong to one problem."""
        values = ours if theirs is None else ours - theirs
        known = np.isfinite(values)
        groups = [group for group, there in zip(self._groups, known, strict=True) if there]
        if not groups:
            return None
        if len(set(groups)) < 2:
            return replace(_UNKNOWN, value=float(values[known].mean()))
        if theirs is None:
            return mean_estimate(ours[known], groups=groups)
        return difference_estimate(ours[known], theirs[known], verdicts=True, groups=groups)

    def _means(self, name: str, run: ArmMeasurements) -> Values:
        """The mean of a measure on all problems and on every resample of them: (1 + resample,)."""
        if name not in ("perplexity", "kl"):
            return self._resamples.means(run.values[name])
        lengths = np.array([len(generated(trace)) for trace in self.traces], dtype=np.float64)
        means = self._resamples.means(run.values[name], lengths)
        return np.exp(means) if name == "perplexity" else means


def estimates_to_dict(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Each estimate as `Estimate.to_dict` gives it, by name."""
    return {name: estimate.to_dict() for name, estimate in estimates.items()}


def estimates_from_dict(known: Mapping[str, Mapping[str, float | None]]) -> dict[str, Estimate]:
    """What `estimates_to_dict` gave, also after a way through JSON, which has no NaN."""
    nan = float("nan")
    return {
        name: Estimate(**{end: nan if value is None else value for end, value in ends.items()})
        for name, ends in known.items()
    }


def _named(conditions: Sequence[Condition]) -> str:
    """The first of the conditions, and how many others there are."""
    others = len(conditions) - 1
    return f"{conditions[0].name} and {others} more" if others else conditions[0].name


def _known(estimates: Mapping[str, Estimate | None]) -> dict[str, Estimate]:
    """Leaves out a measure that is defined on too few problems."""
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _of_trace(trace: Trace) -> dict[str, float]:
    """The measures of one trace that need no further pass."""
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
