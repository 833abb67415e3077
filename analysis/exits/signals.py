"""What a finished trace shows at the places where its thinking could have stopped."""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.text.answers import equivalent
from reasonscope.data.trace import Trace
from reasonscope.steering.exits.places import Places
from reasonscope.steering.exits.signals import PlaceReader, PlaceSignals


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitSignals(PlaceSignals):
    """What is known at each place of a trace's thinking, with what the end of the trace tells.

    Attributes:
        trace: The id of the trace.
        group: The group of its problem.
        cuts: Tokens of the trace before each place, ascending, (place,) int64.
        right: Whether the answer that was forced there is right, (place,).
        total: Tokens of the whole thinking.
        finished: Whether the trace's own answer is right.
    """

    trace: str
    group: str
    cuts: NDArray[np.int64]
    right: NDArray[np.bool_]
    total: int
    finished: bool

    def with_score(self, score: Values) -> "ExitSignals":
        """The same with what a probe says at each place, with four digits, so that rounding in a pass decides nothing."""
        return replace(self, score=np.asarray(score, dtype=np.float64).round(4))


def exit_signals(reader: PlaceReader, places: Places, trace: Trace) -> ExitSignals:
    """Force an answer at every place of a trace, and read how near the model is to closing its thinking there.

    Args:
        reader: Reads with the model that wrote the trace.
        places: Where its thinking may stop.
        trace: A trace with tokens, thinking, and a gold answer.

    Returns:
        The signals; `score` is NaN, see `ExitSignals.with_score`.

    DEER (arXiv 2504.15895), section 3, for the confidence; ThinkBrake (arXiv 2510.00546) for the margin.

    Departures: DEER waits for a word such as "Wait"; here the likeliest next word tells, which a model that writes knows before it writes
        it. The margin is of all tokens that close the thinking (a newline and the tag, for most templates), so that it does not depend
        on where a tokenizer puts the newline.

    Example:
        signals = exit_signals(PlaceReader(model), Places.of(model), store.trace("p1/0"))
        signals.spent[signals.right][:1]  # after so many tokens it knew the answer
    """
    ids = trace.token_ids.tolist()
    cuts, spent = places.of_trace(trace)
    found = reader.forced(reader.read(ids, cuts, spent), ids, cuts)
    written = trace.thinking_positions >= trace.n_prompt_tokens
    return ExitSignals(
        **{field.name: getattr(found, field.name) for field in fields(PlaceSignals)},
        trace=trace.id,
        group=trace.problem.group,
        cuts=np.array(cuts, dtype=np.int64),
        right=np.array([equivalent(answer, trace.problem.answer or "") for answer in found.answers], dtype=bool),
        total=int(written.sum()),
        finished=trace.correct is True,
    )
