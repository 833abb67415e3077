"""Which model answers at an address: what it makes of a fixed sequence of tokens, and since when its process runs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.server.connection import metrics
from reasonscope.probes.vllm.writer import VllmWriter

# Plain text, because what follows random ids may not be a whole character, and how much of its last state is compared. Weights that
# differ by fine-tuning change it by far more than rounding does.
_TEXT, _NUMBERS, _TOLERANCE = "One and two are three; four and five are nine.", 24, 0.02


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """A model as it answers.

    Attributes:
        states: Numbers of its last residual stream on the fixed sequence, in units of their root mean square.
        started: When its process started, in seconds; None if it does not say.
    """

    states: tuple[float, ...]
    started: float | None = None

    def same_model(self, states: Sequence[float]) -> bool:
        """Whether the numbers differ by rounding at most."""
        if len(states) != len(self.states):
            return False
        return max(abs(a - b) for a, b in zip(self.states, states, strict=True)) <= _TOLERANCE


def _identity(writer: VllmWriter) -> _Identity:
    """The model that answers `writer` now. Raises InputError if it does not answer, or has no vllm-lens."""
    ids, site = _ids(writer), Site("resid_post", writer.n_layers - 1)
    plain = writer.plain
    ((_, _, found),) = plain.stream([ids], Sampling(temperature=0, max_new_tokens=1), [0], [site])
    last = found[site][len(ids) - 1].double()
    scaled = (last[:_NUMBERS] / last.square().mean().sqrt()).tolist()
    return _Identity(states=tuple(round(value, 5) for value in scaled), started=_started(writer))


def check_vectors(writer: VllmWriter) -> None:
    """Raise InputError if the vectors of the writer's recipe do not move the states of the server by what they are.

    A vector leaves no other trace than what it changes; a server without vllm-lens takes the field and ignores it.
    """
    if writer.steering is None or not writer.steering.vectors:
        return
    moved = writer.steering.moved_first()
    ids, site = _ids(writer), Site("resid_post", moved[0])
    steered, plain = (
        next(one.stream([ids], Sampling(temperature=0, max_new_tokens=1), [0], [site]))[2][site].float()
        for one in (writer, writer.plain)
    )
    expected = torch.tensor(moved[1])
    apart = (steered - plain - expected).norm(dim=1).min()
    if apart > 0.05 * expected.norm():
        raise InputError(
            f"{writer.url} does not add the vector of {writer.steering.meta['name']} at {site}; is vllm-lens 1.3 active there?"
        )


class Watch:
    """Makes sure that what a run stores was written by one model, although its server may be restarted at any time."""

    def __init__(self, writer: VllmWriter, known: Sequence[float] | None = None) -> None:
        self._writer = writer
        self._now = _identity(writer)
        check_vectors(writer)
        if known is not None and not self._now.same_model(known):
            raise StoreError(_changed(writer))

    @property
    def states(self) -> list[float]:
        return list(self._now.states)

    def restarted(self) -> bool:
        """Whether the server was restarted since the last call, so that what it wrote since then is to be written again.

        Raises StoreError if another model answers now, InputError if none does.
        """
        before, self._now = self._now, _identity(self._writer)
        if not before.same_model(self._now.states):
            raise StoreError(_changed(self._writer))
        return before.started != self._now.started


def _ids(writer: VllmWriter) -> list[int]:
    return [int(token) for token in writer.tokenizer.encode(_TEXT, add_special_tokens=False).ids]


def _changed(writer: VllmWriter) -> str:
    return (
        f"another model answers at {writer.url} under the name {writer.model}, so nothing that it wrote was stored; serve the model "
        "that the run began with, or give another folder"
    )


def _started(writer: VllmWriter) -> float | None:
    found = re.search(r"^process_start_time_seconds ([\d.e+]+)", metrics(writer.url, writer.key), re.MULTILINE)
    return float(found[1]) if found else None
