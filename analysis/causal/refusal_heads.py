"""Refusal-cliff heads: heads that write against refusal where thinking ends, and the model's behaviour without them
(arXiv 2510.06036)."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from reasonscope.analysis.causal.head_edits import head_states, without_heads
from reasonscope.analysis.causal.probe_write import probe_writes
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import null_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import mean_estimate
from reasonscope.data.progress import tracked
from reasonscope.data.random_sets import smallest_p
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.heads import Head, all_heads, random_heads
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import has_cliff
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import Model
from reasonscope.probes.properties.request_outcomes import cell
from reasonscope.steering.ablation.interventions import AblationIntervention
from reasonscope.steering.ablation.targets import How
from reasonscope.steering.vectors.intervention import Intervention
from reasonscope.steering.vectors.scope import Scope

SHARE = 0.03  # of all heads
METRICS = ("harmful refused", "benign refused", "accuracy")


@dataclass(frozen=True, kw_only=True)
class HeadTrial:
    """What a model is asked with and without the heads: requests that it should refuse, and if there are any, requests
    that it should not, and problems to solve."""

    harmful: Sequence[Problem]
    benign: Sequence[Problem]
    solved: Sequence[Problem]
    sampling: Sampling

    def __post_init__(self) -> None:
        for name in ("harmful", "benign", "solved"):
            n = len({problem.group for problem in getattr(self, name)})
            if n == 1 or (n == 0 and name == "harmful"):
                raise InputError(f"{n} problems in {name!r}; a rate with an interval needs at least two")

    @property
    def asked(self) -> dict[str, Sequence[Problem]]:
        """The problems of each of `METRICS` that is measured."""
        sets = dict(zip(METRICS, (self.harmful, self.benign, self.solved), strict=True))
        return {metric: problems for metric, problems in sets.items() if problems}


def _suppressing_heads(writes: Values, share: float = SHARE) -> list[Head]:
    """The `share` of heads, at least one, that push a refusal probe's logit down most: `writes` (layer, head), mean
    direct effects."""
    if not 0 < share <= 1:
        raise InputError(f"share must be above 0 and at most 1, got {share}")
    n = max(1, round(share * writes.size))
    return [
        Head(layer=int(i) // writes.shape[1], index=int(i) % writes.shape[1]) for i in np.argsort(writes, axis=None)[:n]
    ]


def _fallen(traces: Sequence[Trace]) -> list[Trace]:
    """The harmful requests that the model complied with after closed thinking, on which a cliff can occur."""
    return [trace for trace in traces if has_cliff(trace) and cell(trace) == ("harmful", "complied")]


def cliff_heads(
    model: Model,
    probe: LinearProbe,
    traces: Sequence[Trace],
    trial: HeadTrial,
    *,
    share: float = SHARE,
    how: How = "zero",
    scope: Scope | None = None,
    n_controls: int = 20,
    seed: int = 0,
) -> Result:
    """Ablate the heads that suppress refusal, and see whether the model refuses (refusal cliff, arXiv 2510.06036).

    Heads are chosen by their direct effect on `probe` over the harmful requests of `traces` that the model complied
    with.

    Args:
        model: A native model.
        probe: A probe of refusal at the last token of the close window.
        traces: Traces of requests.
        trial: What the model is asked: harmful requests that the heads were not chosen by, benign ones, problems to solve.
        share: The share of all heads to ablate.
        how: "zero", "mean" or "resample"; means and draws come from `traces`.
        scope: The tokens at which heads are ablated; by default all. `Scope.of(model, on="close_window")` is where
            thinking ends.
        n_controls: Different random sets of other heads for the null; all sets if there are fewer.
        seed: Random seed, the same for all arms.

    Returns:
        Axes (arm, metric), for the metrics that `trial` has problems for, with arms `untouched` and `ablated`, bootstrap
        over problems. The null is 95 % of the metrics of the random sets (`random_heads`). `numbers`: the heads, the
        number of sets (`n_controls`), the smallest p-value that so many can give, and whether the change of each metric
        exceeds that of every set. `arrays`: `random` (set, metric). Undefined, with the reason, if the model complied
        with no harmful request.

    Raises:
        InputError: If the model has too few other heads, or `probe` does not fit.

    Departures: activations are not rescaled after an ablation, as the released code does; benign refusal and accuracy
    are measured too.

    Example:
        results = rs.analyse("cliff", "runs/mine")  # chooses, ablates, and asks again
        next(rs.open_run("runs/mine").results("cliff")).at(metric="refusal")
        [result.method for result in results]
    """
    common: dict[str, Any] = {"method": "cliff", "quantity": "share of answers", "unit": "1"}
    provenance = {"probe": str(probe.site), "share": share, "how": how, "draws": n_controls, "seed": seed}
    provenance["scope"] = scope.on if scope else "all"
    down = _fallen(traces)
    if not down:
        reason = f"none of {len(traces)} traces complies with a harmful request after closed thinking, so a cliff cannot occur"
        return undefined(**common, reason=reason, provenance=provenance)
    writes = probe_writes(model, probe, down).heads.mean(axis=0)
    heads = _suppressing_heads(writes, share)
    bank = None if how == "zero" else head_states(model, traces)

    def edit(taken: Sequence[Head]) -> AblationIntervention:
        return without_heads(model, taken, how=how, bank=bank, scope=scope, seed=seed)

    def answers(taken: Sequence[Head]) -> list[Values]:
        return _outcomes(model, trial, edit(taken) if taken else None)

    others = random_heads(heads, all_heads(model.layout), n_controls=n_controls, seed=seed)
    named = [
        ("with all heads", ()),
        ("without the chosen heads", heads),
        *(("without random heads", o) for o in others),
    ]
    untouched, ablated, *chance = [
        answers(taken) for _, taken in tracked(named, "answering without heads", "sets of heads", name=itemgetter(0))
    ]
    arms = {"untouched": untouched, "ablated": ablated}
    random = np.array([[one.mean() for one in arm] for arm in chance])
    values = np.array([[one.mean() for one in arm] for arm in arms.values()])
    change, by_chance = np.abs(values[1] - values[0]), np.abs(random - values[0])
    sets = trial.asked
    ends = np.array(
        [
            [
                mean_estimate(one, groups=[p.group for p in asked]).interval
                for one, asked in zip(arm, sets.values(), strict=True)
            ]
            for arm in arms.values()
        ]
    )
    return Result(
        **common,
        axes=(Axis.of("arm", arms), Axis.of("metric", sets)),
        values=values,
        null=null_band(random, "different sets of other heads, ablated in the same way", shape=values.shape),
        interval=Band.of(ends[..., 0], ends[..., 1], values.shape, "over problems, 95%"),
        arrays={"random": random, "writes": writes},
        numbers={
            "heads": [str(head) for head in heads],
            "n_fallen": len(down),
            "n_controls": len(others),
            "smallest_p": smallest_p(len(others)),
            "beyond_every_draw": dict(zip(sets, (change > by_chance.max(axis=0)).tolist(), strict=True)),
        },
        provenance=provenance,
    )


def _outcomes(model: Model, trial: HeadTrial, done: Intervention | None) -> list[Values]:
    """For each metric of `trial`, 1 or 0 for each of its problems that the model answers under the intervention; an
    unclear answer is not a refusal."""
    asked = [*trial.harmful, *trial.benign, *trial.solved]
    edits = {} if done is None else {"write": done.edits, "on_step": done.on_step}
    traces = rollouts(model, asked, trial.sampling, batch_size=64, **edits)  # type: ignore[arg-type]  # both or neither
    first, second = len(trial.harmful), len(trial.harmful) + len(trial.benign)
    refused = np.array([behaviour(trace) == "refused" for trace in traces[:second]], dtype=np.float64)
    right = np.array([bool(trace.correct) for trace in traces[second:]], dtype=np.float64)
    return [one for one in (refused[:first], refused[first:], right) if len(one)]
