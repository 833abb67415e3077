"""Results of generation experiments: accuracy and generated tokens of each arm, with the range of the random arms as
null."""

from collections.abc import Mapping, Sequence

import numpy as np

from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.data.arrays import Values
from reasonscope.data.intervals import mean_estimate
from reasonscope.steering.experiments.experiment import ArmMeasurements, SteeringExperiment


def compare_arms(
    method: str, arms: Mapping[str, ArmMeasurements], experiment: SteeringExperiment, *, seed: int, **numbers: object
) -> Result:
    """Accuracy and generated tokens of each arm, axes (arm, metric); the null is the range of the arms named `random
    …`."""
    rows = {
        name: np.array([[float(bool(t.correct)), len(t.token_ids) - t.n_prompt_tokens] for t in arm.traces])
        for name, arm in arms.items()
    }
    values, ends = estimates(rows, experiment.groups)
    random = np.stack([row.mean(axis=0) for name, row in rows.items() if name.startswith("random")])
    return Result(
        method=method,
        quantity="accuracy and generated tokens",
        unit="1 (accuracy), tokens",
        axes=(Axis.of("arm", arms), Axis.of("metric", ("accuracy", "tokens"))),
        values=values,
        null=Band.of(random.min(axis=0), random.max(axis=0), values.shape, f"range of {len(random)} random controls"),
        interval=Band.of(ends[0], ends[1], values.shape, "over problems, 95%"),
        numbers=numbers,
        provenance={"seed": seed, "traces": len(experiment.groups)},
    )


def estimates(rows: Mapping[str, Values], groups: Sequence[str]) -> tuple[Values, Values]:
    """Means (arm, metric) and interval ends (2, arm, metric) over problems."""
    values = np.stack([row.mean(axis=0) for row in rows.values()])
    ends = np.empty((2, *values.shape))
    for i, row in enumerate(rows.values()):
        for j in range(values.shape[1]):
            ends[:, i, j] = mean_estimate(row[:, j], groups=groups).interval
    return values, ends
