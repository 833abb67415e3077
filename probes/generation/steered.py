"""How a model is steered while it is recorded: what `record` has to know of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import LogitsProcessor

from reasonscope.data.errors import StoreError
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import CONTROL_PREFIX, TokenScores, read_scores, save_scores
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model

KEY = "steered"  # in the meta of a store and of each of its traces


class _Edits(Protocol):
    """Edits of hidden states that follow a generation, or passes over whole sequences after `begin`."""

    @property
    def edits(self) -> Mapping[Site, Edit]: ...

    @property
    def n_edited(self) -> int: ...

    def on_step(self, step: DecodingStep) -> None: ...

    def begin(self, n_prompt: Sequence[int]) -> None: ...


class _Follows(Protocol):
    """A controller, which decides while a model writes."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What its decisions are: `name`, `site`, `unit` and `provenance`, as a file of token scores says them."""
        ...

    def finish(self, sequences: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """A batch is written; what was decided at each token of its sequences but the last, (token,), NaN if nothing was."""
        ...

    def told(self) -> str:
        """One line on what it did so far."""
        ...


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A model's steering for one recording.

    Attributes:
        meta: Its name and hash, as the store and its traces say them.
        write: Saves a copy of it to a path, for the store.
        edits: Edits of hidden states, or None.
        processors: Edits of the logits.
        prefill: Text that the thinking starts with.
        controls: What decides while the model writes.
    """

    meta: Mapping[str, Any]
    write: Callable[[Path], None]
    edits: _Edits | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    prefill: str = ""
    controls: tuple[_Follows, ...] = ()


class Decisions:
    """What the controllers of a recording decided, by trace: kept beside the run, in the files by which the app colours tokens."""

    def __init__(self, steered: Steered | None) -> None:
        self._controls = steered.controls if steered else ()
        self._kept: list[dict[str, NDArray[np.float32]]] = [{} for _ in self._controls]

    def note(self, ids: Sequence[str], sequences: Sequence[NDArray[np.int64]]) -> None:
        """A batch is written: these are the traces of its rows, and their tokens."""
        for kept, control in zip(self._kept, self._controls, strict=True):
            kept.update(zip(ids, control.finish(sequences), strict=True))

    def save(self, store: TraceStore) -> None:
        """Write those of stored traces beside the run; those of a recording that this one resumed stay."""
        for kept, control in zip(self._kept, self._controls, strict=True):
            path = run_folder(store.path).scores / f"{CONTROL_PREFIX}{control.about['name']}.safetensors"
            known = {**(read_scores(path).scores if path.exists() else {}), **kept}
            if found := {id: known[id] for id in store.ids if id in known}:
                save_scores(TokenScores(scores=found, about=control.about), path)

    def told(self) -> list[str]:
        """One line per controller on what it did."""
        return [control.told() for control in self._controls]


class Steers(Protocol):
    """What can steer any model that it fits, such as a recipe."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """Its name and hash, as a store and its traces say them."""
        ...

    def steered(self, model: Model, sampling: Sampling) -> Steered:
        """What it does to a model, for one recording."""
        ...

    def save(self, path: Path) -> None:
        """Write a copy of it, for the store."""
        ...


def check_steering(store: TraceStore, wanted: Mapping[str, Any] | None) -> None:
    """Raise StoreError if the traces of a store were steered in another way than `wanted` (None is the plain model)."""
    there = store.meta.get(KEY)
    if (there or {}).get("hash") != (wanted or {}).get("hash"):
        raise StoreError(
            f"{store.path} holds traces {_by(there)}, and these would be {_by(wanted)}; give another folder, so that they do not mix"
        )


def _by(meta: Mapping[str, Any] | None) -> str:
    return f"steered by {meta['name']} ({meta['hash']})" if meta else "of the plain model"
