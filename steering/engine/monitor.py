"""A probe that vLLM reads on every token while it writes, and that may close the thinking there; `ProbeMonitor` for `--backend vllm`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.decoding import Completion
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.vllm.writer import Seen
from reasonscope.steering.decoding.closing import Closing
from reasonscope.steering.decoding.monitor import StopAt, monitor_meta, monitor_told
from reasonscope.steering.engine.stops import check_probe, layer_of, stop_look, stop_told
from reasonscope.steering.exits.places import Places
from reasonscope.steering.vectors.thinking import WrittenThinking


class EngineMonitor:
    """Reads a linear probe on every token that vLLM reads or writes, and closes the thinking if the score passes a threshold.

    Pass `look` to `vllm_writer` and the monitor to `record`. Arguments, scores and what is closed are those of `ProbeMonitor`.

    Raises:
        InputError: If the probe is of another model, or the window is below 1.
        SiteError: For a site other than the output of a layer.
    """

    def __init__(
        self,
        model: Prompting,
        probe: LinearProbe,
        *,
        stop_above: float | None = None,
        window: int = 1,
        closing: Sequence[int] = (),
        at: StopAt = "token",
        calibrated_on: Iterable[str] = (),
    ) -> None:
        if window < 1:
            raise InputError(f"a window of {window} tokens: give 1 or more")
        check_probe(probe, model)
        self.probe, self._calibrated_on = probe, frozenset(calibrated_on)
        self.kept: dict[str, NDArray[np.float32]] = {}
        self.closed: list[str] = []
        self._settings: Mapping[str, Any] | None = None
        stop = None
        if stop_above is not None:
            thinking = WrittenThinking.of(model)
            ids = Closing(thinking, closing).ids
            self._settings = {"at": at, "stop_above": stop_above, "window": window, "closing": list(ids)}
            places = Places.of(model) if at == "paragraph" else None
            stop = stop_told(model, thinking, ids, above=stop_above, window=window, places=places)
        self.look = stop_look(f"read the probe at {probe.site}", layer_of(probe, model), probe, stop)

    @property
    def meta(self) -> Mapping[str, Any] | None:
        """How it closes the thinking, as a store says it; None if it only reads."""
        return monitor_meta(self.probe, self._settings, self._calibrated_on)

    def note(self, id: str, completion: Completion) -> None:
        """Keep what was read while the trace `id` was written. Raises InputError if tokens were not read, or a score is not finite."""
        assert isinstance(completion, Seen)
        n, report = len(completion.token_ids) - 1, completion.report
        lines = [report[key] for key in sorted(report) if key.startswith("scores.")]
        scores = np.array(lines[0] if lines and isinstance(lines[0], list) else (), dtype=np.float32)
        if len(scores) < n or not np.isfinite(scores).all():
            raise InputError(
                f"the probe was read on {len(scores)} of {n} tokens of {id!r}, or its states are not finite; ask again"
            )
        self.kept[id] = scores[:n]
        if any(report[key] is not None for key in report if key.startswith("stopped.")):
            self.closed.append(id)

    def told(self) -> str:
        """One line on what it did."""
        return monitor_told(self._settings, len(self.kept), len(self.closed))
