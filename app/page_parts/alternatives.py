"""What else could have been written at each token of a trace, as `reasonscope analyse alternatives` saved it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts.measurements import trace_results


@dataclass(frozen=True, kw_only=True)
class ShownAlternatives:
    """What could have been written at each generated token.

    Attributes:
        first: The first generated token.
        said: (token,) log-probability in nats of the token that was written.
        ids: (token, rank) ids of the likeliest tokens in its place.
        logprobs: (token, rank) their log-probabilities in nats.
        pieces: The text of each id.
    """

    first: int
    said: NDArray[np.float64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    pieces: Mapping[int, str]

    def at(self, token: int) -> list[tuple[str, float]]:
        """Text and probability of the likeliest tokens at a place, likeliest first; empty if nothing is known."""
        row = token - self.first
        if not 0 <= row < len(self.said):
            return []
        return [
            (self.pieces.get(int(id), ""), float(np.exp(logprob)))
            for id, logprob in zip(self.ids[row], self.logprobs[row], strict=True)
        ]

    def chance(self, token: int) -> float | None:
        """The probability of the token that was written at a place."""
        row = token - self.first
        return float(np.exp(self.said[row])) if 0 <= row < len(self.said) else None


def shown_alternatives(run: OpenRun, id: str) -> ShownAlternatives | None:
    """Those of the trace `id`; None if they were not measured for all of its generated tokens."""
    found = next((one for one in trace_results(run, id) if one.method == "alternatives" and one.measured), None)
    if found is None or not {"ids", "logprobs"} <= found.arrays.keys():
        return None
    labels = [int(label) for label in found.axes[-1].labels if label.isdigit()]
    if labels != list(range(labels[0], labels[0] + len(found.values))) or len(found.arrays["ids"]) != len(labels):
        return None
    return ShownAlternatives(
        first=labels[0],
        said=found.values,
        ids=np.asarray(found.arrays["ids"]),
        logprobs=np.asarray(found.arrays["logprobs"], dtype=np.float64),
        pieces={int(id): text for id, text in (found.numbers.get("pieces") or {}).items()},
    )
