"""Scores of a probe for every token of a run, in a file of their own beside the store: the app colours tokens by them.

scores/NAME.safetensors    one tensor a trace, named by its id, (row,) float32; row r is the score at token r,
                           the last token has none; the header's metadata say what the scores are, in JSON
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from reasonscope.data.durable import write_durably
from reasonscope.data.errors import InputError
from reasonscope.data.reading import read_arrays
from reasonscope.data.store import TraceStore
from reasonscope.probes.linear import LinearProbe
from reasonscope.probes.trajectory import token_scores

_KEY, _FORMAT, _VERSION = "reasonscope", "token scores", 1


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """`scores` (row,) float32 by trace id; `about` is JSON: what they measure, from which probe and site."""

    scores: Mapping[str, NDArray[np.float32]]
    about: Mapping[str, Any]


def write_scores(probe: LinearProbe, store: TraceStore, path: Path, *, name: str) -> int:
    """Score every token of every trace of `store` into `path`, replacing what is there; return the number of traces.

    Traces without tokens (imported text) get no tensor. Raises SiteError and InputError as `token_scores` does.
    """
    traces = [trace for trace in store if len(trace.token_ids) > 1]
    found = {trace.id: token_scores(probe, store, trace).astype(np.float32) for trace in traces}
    about = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": name,
        "site": str(probe.site),
        "unit": "probability"
        if probe.task == "binary"
        else str(probe.provenance.get("target", "as the probe's target")),
        "provenance": dict(probe.provenance),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda file: save_file(found, file, metadata={_KEY: json.dumps(about)}))
    return len(found)


def read_scores(path: Path, ids: Sequence[str] | None = None) -> TokenScores:
    """The scores in `path`, of all traces or of `ids`. Raises InputError for a file that holds none, or an unknown id."""
    fields = {"format": str, "name": str, "site": str, "unit": str, "provenance": dict}
    scores, about = read_arrays(path, _KEY, "file of token scores", version=_VERSION, fields=fields)
    if about["format"] != _FORMAT or any(values.ndim != 1 for values in scores.values()):
        raise InputError(f"{path} holds no token scores; write them with reasonscope probe apply")
    if unknown := set(ids or ()) - scores.keys():
        raise InputError(f"{path} has no scores of {sorted(unknown)[0]!r}; apply the probe to the run again")
    return TokenScores(scores={id: scores[id] for id in ids or sorted(scores)}, about=about)
