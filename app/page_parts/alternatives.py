"""What else could have stood at each token of a trace, as `reasonscope analyse alternatives` left it beside the run."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.runs.open_run import OpenRun
from reasonscope.app.page_parts.measurements import trace_results


@dataclass(frozen=True, kw_only=True)
class ShownAlternatives:
    """From token `first` on: how likely (log-probability, nats) what stands there was, `said` (token,), and the likeliest tokens in its
    place, `ids` and `logprobs` (token, rank). `pieces` is the text of each id."""

    first: int
    said: NDArray[np.float64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    pieces: Mapping[int, str]

    def at(self, token: int) -> list[tuple[str, float]]:
        """Text and probability of the likeliest tokens at a place, the likeliest first; empty where nothing is known."""
        row = token - self.first
        if not 0 <= row < len(self.said):
            return []
        return [
            (self.pieces.get(int(id), ""), float(np.exp(logprob)))
            for id, logprob in zip(self.ids[row], self.logprobs[row], strict=True)
        ]

    def chance(self, token: int) -> float | None:
        """How likely the token was that stands at a place."""
        row = token - self.first
        return float(np.exp(self.said[row])) if 0 <= row < len(self.said) else None


def shown_alternatives(run: OpenRun, id: str) -> ShownAlternatives | None:
    """Those of the trace `id`; None where they were not measured, or not of all of its generated tokens."""
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
