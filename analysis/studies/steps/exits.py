"""A step that replays early exits on a run."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from reasonscope.analysis.exits.evaluation import check_tolerance
from reasonscope.analysis.exits.run import early_exits
from reasonscope.analysis.exits.summary import exit_summary
from reasonscope.analysis.figures import exit_frontier
from reasonscope.analysis.studies.lab import Lab
from reasonscope.analysis.studies.steps.base import Outcome, Step, Work
from reasonscope.analysis.studies.steps.measured import Measured, run_line

_CUTS = 6  # of a trace, for the estimate


@dataclass(frozen=True, kw_only=True)
class ExitStep(Step):
    """What stopping the thinking early would save, by a probe, by confidence, by stable answers and by other rules.

    Attributes:
        exit: The step that recorded the run.
        held_out: Share of the problems that the rules are judged on.
        places: An answer is forced at the end of each paragraph or sentence.
        every: The fewest tokens of thinking between two of these.
        tolerance: Accuracy that a threshold may cost, from 0 to 1, for the summary.
        n: At most so many problems to judge on.
        batch_size: Answers that are forced together.
    """

    kind: ClassVar[str] = "exit"

    exit: str
    held_out: float = 0.5
    places: Literal["paragraph", "sentence"] = "paragraph"
    every: int = 4
    tolerance: float = 0.02
    n: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.exit,)

    def _options(self) -> dict[str, Any]:
        """The options of `reasonscope steer exit` that are not at their defaults."""
        return {name: value for name, value in self.settings().items() if name not in ("exit", "after")}

    def work(self, lab: Lab) -> Work:
        step: Any = lab.plan.steps[self.exit]
        traces = len(lab.problems(step.problems)) * step.samples
        return Work(written=traces * _CUTS * 16.0, read=traces * _CUTS * step.max_new_tokens / 2.0, disk=10e6)

    def execute(self, lab: Lab, name: str) -> Outcome:
        where = lab.where(self.exit)
        study = early_exits(
            lab.store(self.exit),
            lab.model_of(self.exit),
            tolerance=self.tolerance,
            held_out=self.held_out,
            n=self.n,
            kind=self.places,
            every=self.every,
            batch_size=self.batch_size,
            keep=lab.out / "steps" / name,
            seed=lab.plan.seed,
        )
        saved = Measured(
            name="exit",
            summaries=[exit_summary(study, tolerance=self.tolerance)],
            numbers=study.report.to_dict(),
            figures={"exit_frontier": exit_frontier(study.report)},
            probes={"exit": study.fitted.probe} if study.fitted else {},
            command=run_line("reasonscope steer exit", lab, self.exit, self._options()),
            seed=lab.plan.seed,
        ).save(where)
        return Outcome(
            summaries=tuple(saved.summaries),
            numbers=saved.numbers,
            files=tuple(saved.files(where)),
            figures=tuple(saved.drawn(where)),
        )
