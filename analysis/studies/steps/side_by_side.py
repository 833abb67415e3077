"""A step that compares several steering methods at one strength each, in one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from reasonscope.analysis.figures import steering_plane
from reasonscope.analysis.studies.lab import Lab
from reasonscope.analysis.studies.steps.base import Outcome, Work
from reasonscope.analysis.studies.steps.extracting import LearnsFromRun, other_traces, save_recipe
from reasonscope.analysis.studies.steps.measured import Measured, study_line
from reasonscope.data.summary import Summary, in_hundredths, in_percent, in_words, plural
from reasonscope.data.trace import Problem
from reasonscope.steering.experiments.conditions import method_conditions, random_conditions
from reasonscope.steering.experiments.experiment import Arm, ArmMeasurements, SteeringExperiment
from reasonscope.steering.experiments.held_out import sampling_of_run
from reasonscope.steering.methods.registry import method
from reasonscope.steering.recipes.files import SUFFIX
from reasonscope.steering.vectors.application import VectorUse


@dataclass(frozen=True, kw_only=True)
class _SideArm:
    """A method at one strength, beside others.

    Attributes:
        method: The method, such as seal-clamp.
        run: The run that its vectors are made from, without the problems that are judged on.
        strength: Its strength.
        sites: Where it acts; its own sites if empty.
        reversed: Also run its reverse.
    """

    method: str
    run: str
    strength: float = 1.0
    sites: tuple[str, ...] = ()
    reversed: bool = False


@dataclass(frozen=True, kw_only=True)
class SideBySideStep(LearnsFromRun):
    """Steer the same problems by several methods at one strength each, all in one batch, with random vectors for each.

    Attributes:
        side_by_side: What to compare, by the name that figures use.
        problems: What is judged on: sets or parts.
        run: The run whose sampling is used, and beside which the numbers are saved.
        n_controls: Random vectors for each method.
    """

    kind: ClassVar[str] = "side_by_side"

    side_by_side: Mapping[str, _SideArm]
    problems: tuple[str, ...]
    run: str
    n_controls: int = 2

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.run, *(arm.run for arm in self.side_by_side.values())]))

    def work(self, lab: Lab) -> Work:
        longest = lab.plan.steps[self.run].max_new_tokens  # type: ignore[attr-defined]  # it records
        arms = 1 + sum(1 + arm.reversed + self.n_controls for arm in self.side_by_side.values())
        return Work(written=float(len(lab.problems(self.problems)) * longest * arms), disk=10e6)

    def execute(self, lab: Lab, name: str) -> Outcome:
        judged, where = lab.problems(self.problems), lab.where(self.run)
        uses = {of: self._uses(lab, arm, judged) for of, arm in self.side_by_side.items()}
        sampling = sampling_of_run(lab.store(self.run), lab.plan.seed)
        experiment = SteeringExperiment(lab.model_of(self.run), judged, sampling, on_given_text=False)
        arms, written = self._run(experiment, uses)
        paths = [save_recipe(where.vectors / f"{of}{SUFFIX}", of, parts, self.run) for of, parts in uses.items()]
        saved = Measured(
            name="steering",
            summaries=[_side_by_side_summary(arms)],
            numbers={**{arm.name: arm.to_dict() for arm in arms}, "same_texts": _same_texts(written)},
            figures={"steering_plane": steering_plane(arms)},
            command=study_line(lab, name),
            seed=lab.plan.seed,
        ).save(where)
        return Outcome(
            summaries=tuple(saved.summaries),
            numbers=saved.numbers,
            files=(*saved.files(where), *paths),
            figures=tuple(saved.drawn(where)),
        )

    def _uses(self, lab: Lab, arm: _SideArm, judged: Sequence[Problem]) -> tuple[VectorUse, ...]:
        ids = other_traces(lab.store(arm.run), judged)
        told = {"sites": arm.sites, "pairs": None, "verdict": None, "fast": None}
        return method(arm.method).parts(self.source(lab, arm.run, ids, told))

    def _run(
        self, experiment: SteeringExperiment, uses: Mapping[str, tuple[VectorUse, ...]]
    ) -> tuple[list[Arm], dict[str, ArmMeasurements]]:
        """The unsteered model, reverses, methods and random vectors, and what was written under each method."""
        told = self.side_by_side
        back = [
            condition
            for of, arm in told.items()
            if arm.reversed
            for condition in method_conditions(f"{of} reversed", uses[of], -arm.strength)
        ]
        steered = [method_conditions(of, uses[of], arm.strength)[0] for of, arm in told.items()]
        runs = experiment.run_all([*back, *steered])
        named = [*back, *steered]
        arms = [experiment.arm(one.name, one.multiplier, run) for one, run in zip(named, runs, strict=True)]
        moves = dict(zip(told, (arm.moves for arm in arms[len(back) :]), strict=True))
        random = [
            condition
            for of, arm in told.items()
            for condition in random_conditions(of, uses[of], arm.strength, n_controls=self.n_controls, moves=moves[of])
        ]
        written = dict(zip(told, runs[len(back) :], strict=True))
        return [experiment.base_arm, *arms, *experiment.arms(random)], written


def _side_by_side_summary(arms: Sequence[Arm]) -> Summary:
    """Every arm in a row, the random vectors among them."""
    base, *others = arms
    rows = [("unsteered", in_words(base.tokens), "", in_hundredths(base.accuracy), "")]
    rows += [
        (arm.name, in_words(arm.tokens), in_percent(arm.change), in_hundredths(arm.accuracy), in_words(arm.distance))
        for arm in others
    ]
    return Summary(
        finding=f"{len(others)} arms on {plural(base.n_problems, 'problem')} that no vector was made from, with the same seeds.",
        columns=("arm", "thinking tokens", "change", "accuracy", "moved by"),
        rows=rows,
    )


def _same_texts(written: Mapping[str, ArmMeasurements]) -> dict[str, int]:
    """On how many problems two methods write the same text, by their names."""
    return {
        f"{one}, {other}": sum(
            a.text == b.text for a, b in zip(written[one].traces, written[other].traces, strict=True)
        )
        for one, other in combinations(written, 2)
    }
