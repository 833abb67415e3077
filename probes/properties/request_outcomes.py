"""What became of each request, harmful or benign, and which of them a probe of refusal learns to tell apart (arXiv 2510.06036)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.text.behaviour import Behaviour, behaviour
from reasonscope.data.trace import Trace
from reasonscope.probes.fitting.positions import Position

RequestLabel = Literal["harmful", "benign"]
RequestOutcome = tuple[RequestLabel, Behaviour]

HARMFUL_COMPLIED: RequestOutcome = ("harmful", "complied")
BENIGN_COMPLIED: RequestOutcome = ("benign", "complied")


def cell(trace: Trace, behaviours: Mapping[str, Behaviour] | None = None) -> RequestOutcome:
    """Which of the cells (harmful or benign) × (refused, complied or unclear) a trace falls into.

    What it did is judged by the rules, or given by `behaviours` (by id; a trace that is missing there is unclear). Raises InputError if
    the problem's meta does not say whether the request is harmful.
    """
    harmful = trace.problem.meta.get("harmful")
    if not isinstance(harmful, bool):
        raise InputError(
            f"problem {trace.problem.id!r} does not say whether its request is harmful (meta.harmful is {harmful!r}); "
            'write "meta": {"harmful": true} or false in the problem file'
        )
    done = behaviour(trace) if behaviours is None else behaviours.get(trace.id, "unclear")
    return "harmful" if harmful else "benign", done


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Which requests a probe learns to tell apart, and where in the trace it learns.

    Attributes:
        positive: Cells of the positive class.
        negative: Cells of the negative class.
        negative_at_window: Cells that belong to the negative class at the close window only; their thinking is not learned from.
        positions: Where the probe learns. The last is the close window, where the answer is decided.
        predicted: What the probe predicts, for a sentence: "predicts …".
    """

    positive: frozenset[RequestOutcome]
    negative: frozenset[RequestOutcome]
    negative_at_window: frozenset[RequestOutcome] = frozenset()
    positions: tuple[Position, ...] = ("window",)
    predicted: str = "which class a request belongs to"

    def __post_init__(self) -> None:
        if self.positions[-1:] != ("window",):
            raise InputError(f"positions {self.positions}: the last has to be 'window', where the answer is decided")

    def is_training_cell(self, of: RequestOutcome, position: Position) -> bool:
        """Whether the probe learns from traces of the cell `of` at `position`."""
        return of in self.positive | self.negative or (position == "window" and of in self.negative_at_window)

    def rows(self, cells: Sequence[RequestOutcome]) -> tuple[list[int], Values]:
        """The rows that the probe learns from at the window, and their targets, 1 for the positive class."""
        rows = [i for i, of in enumerate(cells) if self.is_training_cell(of, "window")]
        return rows, np.array([cells[i] in self.positive for i in rows], dtype=np.float64)


CONTRASTS: Mapping[str, Contrast] = {
    # What the model will do with requests of the same kind: this is the probe of refusal.
    "refusal": Contrast(
        positive=frozenset({("harmful", "refused")}),
        negative=frozenset({("harmful", "complied")}),
        predicted="whether the model will refuse a harmful request",
    ),
    # What was asked, whatever the model does.
    "harmfulness": Contrast(
        positive=frozenset({("harmful", "refused"), ("harmful", "complied")}),
        negative=frozenset({("benign", "refused"), ("benign", "complied")}),
        predicted="whether the request is harmful",
    ),
    # Will it refuse, at matching positions? Along the thinking the probe learns only from traces whose outcome matches their stated
    # intent, at the close window from all. It learns nothing from the thinking of traces that noticed the harm and complied, so that
    # their plateau is a finding.
    "intent": Contrast(
        positive=frozenset({("harmful", "refused")}),
        negative=frozenset({("benign", "complied")}),
        negative_at_window=frozenset({("harmful", "complied")}),
        positions=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0, "window"),
        predicted="whether the model will refuse",
    ),
}
