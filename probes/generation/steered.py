"""How a model is steered while it is recorded: what `record` has to know of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import LogitsProcessor

from reasonscope.data.errors import StoreError
from reasonscope.data.storage.store import TraceStore
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model

KEY = "steered"  # in the meta of a store and of each of its traces


class Edits(Protocol):
    """Edits of hidden states that follow a generation, or passes over whole sequences after `begin`."""

    @property
    def edits(self) -> Mapping[Site, Edit]: ...

    @property
    def n_edited(self) -> int: ...

    def on_step(self, step: DecodingStep) -> None: ...

    def begin(self, n_prompt: Sequence[int]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A model's steering for one recording.

    Attributes:
        meta: Its name and hash, as the store and its traces say them.
        write: Saves a copy of it to a path, for the store.
        edits: Edits of hidden states, or None.
        processors: Edits of the logits.
        prefill: Text that the thinking starts with.
    """

    meta: Mapping[str, Any]
    write: Callable[[Path], None]
    edits: Edits | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    prefill: str = ""


class Steers(Protocol):
    """What can steer any model that it fits, such as a recipe."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """Its name and hash, as a store and its traces say them."""
        ...

    def steered(self, model: Model) -> Steered:
        """What it does to a model, for one recording."""
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
