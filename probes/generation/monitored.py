"""What watches a model while it is recorded: it reads hidden states at every token, and may end the thinking."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.decoding import Completion, DecodingStep
from reasonscope.probes.vllm.steering import Look

MONITOR_KEY = "monitor"  # in the meta of a store whose thinking a monitor may have closed
LEARNED_FROM = "learned_from"  # there: the groups of problems that its probe and its threshold come from


class Monitor(Protocol):
    """Follows generations, one batch after the other."""

    @property
    def edits(self) -> Mapping[Site, Edit]:
        """What reads the sites; it changes nothing."""
        ...

    @property
    def processors(self) -> tuple[LogitsProcessor, ...]:
        """What closes the thinking, if anything may."""
        ...

    @property
    def meta(self) -> Mapping[str, Any] | None:
        """What may change the traces, as a store says it; None if nothing does."""
        ...

    def on_step(self, step: DecodingStep) -> None: ...

    def finish(self, ids: Sequence[str]) -> None:
        """A batch is written; these are the traces of its rows."""
        ...


@runtime_checkable
class EngineReads(Protocol):
    """A probe that an engine reads while it writes."""

    @property
    def look(self) -> Look:
        """The hook that reads it."""
        ...

    @property
    def meta(self) -> Mapping[str, Any] | None:
        """What may change the traces, as a store says it; None if nothing does."""
        ...

    def note(self, id: str, completion: Completion) -> None:
        """A trace is written."""
        ...


def read_after(write: Mapping[Site, Edit] | None, monitor: Monitor) -> Mapping[Site, Edit]:
    """The edits of both; at a site that is edited, the monitor reads what the edit leaves."""
    edits = dict(write or {})
    for site, look in monitor.edits.items():
        edits[site] = _in_turn(edits[site], look) if site in edits else look
    return edits


def _in_turn(first: Edit, then: Edit) -> Edit:
    def edit(activation: Tensor, where: Positions) -> Tensor:
        return then(first(activation, where), where)

    return edit
