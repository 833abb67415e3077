"""Scores of every token of a run, in a file next to its store, by which the app colours tokens.

scores/NAME.safetensors    one tensor per trace, named by its id, (row,) float32; row r is the score at token r, the
last token has none; the header's metadata say in JSON what the scores are
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder, write_durably
from reasonscope.data.storage.untrusted import check_fields, parse_json, wrap_errors

CONTROL_PREFIX = "control-"  # of the files of what a controller decided, such as control-adaptive-speed.safetensors
_KEY, _FORMAT, _VERSION = "reasonscope", "token scores", 1


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """`scores` (row,) float32 by trace id; `about` is JSON: what they measure, with which probe and site."""

    scores: Mapping[str, NDArray[np.float32]]
    about: Mapping[str, Any]


def save_scores(found: TokenScores, path: Path) -> None:
    """Write scores into `path`, replacing what it held."""
    make_folder(path.parent)
    about = {"format": _FORMAT, "version": _VERSION, **found.about}
    write_durably(path, lambda file: save_file(dict(found.scores), file, metadata={_KEY: json.dumps(about)}))


def read_scores(path: Path, ids: Sequence[str] | None = None) -> TokenScores:
    """The scores in `path`, of all traces or of `ids`. Raises InputError for a file without scores, or an unknown id."""
    with wrap_errors(path), safe_open(path, framework="numpy") as file:
        about = parse_json((file.metadata() or {}).get(_KEY, "{}"), f"the header of {path}")
        if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (_FORMAT, _VERSION):
            raise InputError(
                f"{path} has no token scores of version {_VERSION}; write them with reasonscope probe apply"
            )
        check_fields(about, {"name": str, "site": str, "unit": str, "provenance": dict}, str(path))
        known = set(file.keys())
        if unknown := set(ids or ()) - known:
            raise InputError(f"{path} has no scores of {sorted(unknown)[0]!r}; apply the probe to the run again")
        return TokenScores(
            scores={id: file.get_tensor(id) for id in (sorted(known) if ids is None else ids)}, about=about
        )
