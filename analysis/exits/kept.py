"""The forced answers of a study of early exits, kept beside the run: another try with other rules or thresholds forces none again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from reasonscope.analysis.exits.signals import ExitSignals, exit_signals
from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.safetensors_file import SafetensorsFormat
from reasonscope.data.trace import Trace
from reasonscope.steering.exits.places import Places
from reasonscope.steering.exits.signals import PlaceReader

_FORMAT = SafetensorsFormat(
    key="reasonscope.exits",
    noun="file of forced answers",
    version=1,
    fields={"how": dict, "answers": list, "about": dict},
)
_ARRAYS = ("spent", "confidence", "trial", "margin", "transition", "candidates", "draw", "cuts", "right")
_ABOUT = ("trace", "group", "total", "finished")


class KeptSignals:
    """Reads the signals of traces, and keeps each in a file of its own, so that an interrupted study goes on.

    Attributes:
        folder: Where they are kept; None keeps nothing.
        how: What the signals depend on beside the trace, as JSON; files of other settings or places are written again.
        n_found: How many were there already.
    """

    def __init__(self, folder: Path | None, how: Mapping[str, Any]) -> None:
        self.folder, self.how, self.n_found = folder, how, 0

    def of(self, reader: PlaceReader, places: Places, trace: Trace) -> ExitSignals:
        """The signals of a trace, as `exit_signals` reads them. Raises as it does."""
        if self.folder is None:
            return exit_signals(reader, places, trace)
        path = self.folder / f"{quote(trace.id, safe='')}.safetensors"
        if (found := self._read(path, trace)) is not None and found.cuts.tolist() == places.of_trace(trace)[0]:
            self.n_found += 1
            return found
        found = exit_signals(reader, places, trace)
        make_folder(self.folder)
        header = {
            "how": self._key(trace),
            "answers": list(found.answers),
            "about": {n: getattr(found, n) for n in _ABOUT},
        }
        _FORMAT.write(path, header, {name: getattr(found, name) for name in _ARRAYS})
        return found

    def _key(self, trace: Trace) -> dict[str, Any]:
        return {**self.how, "answer": trace.problem.answer, "tokens": [int(i) for i in trace.token_ids]}

    def _read(self, path: Path, trace: Trace) -> ExitSignals | None:
        try:
            header, arrays = _FORMAT.read(path)
            if header["how"] != self._key(trace) or arrays.keys() != set(_ARRAYS):
                return None
            known: dict[str, Any] = {**arrays, **header["about"], "answers": tuple(header["answers"])}
            return ExitSignals(**known, score=np.full(len(arrays["cuts"]), np.nan))
        except (InputError, TypeError):
            return None  # none there, or damaged: it is written again
