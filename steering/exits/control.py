"""An exit rule while a model writes: it stops at the token at which the same rule stops the finished text."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Look, Positions
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.branches import Writer
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model
from reasonscope.steering.decoding.closing import Closing
from reasonscope.steering.exits.places import Places
from reasonscope.steering.exits.rules import PROBE, ExitRule, slug
from reasonscope.steering.exits.signals import PlaceReader, PlaceSignals, closing_ids

# From the tokens of a prompt to a context in which a pass over a text that begins with it is edited as the model is while it writes.
Reading = Callable[[Sequence[int]], AbstractContextManager[object]]


class ExitControl(LogitsProcessor):
    """Closes the thinking of each sequence at the first place at which a rule's number reaches its threshold.

    Pass `edits` as `write=` (they only read), `on_step`, and the object itself among `processors`. It resets with every generation.

    Args:
        model: The model that writes.
        rule: The rule.
        threshold: The number to reach.
        places: Where the thinking may stop.
        probe: What the rule "probe" reads.
        seed: Seed of random stops.
        writer: Writes forced answers; by default the model as it is.
        reading: Edits the passes that the rule needs, as the model is edited while it writes.

    Raises:
        InputError: If the rule reads a probe and none is given, or the probe is of another model.
        SiteError: If the model lacks the probe's site.
    """

    def __init__(
        self,
        model: Model,
        rule: ExitRule,
        threshold: float,
        *,
        places: Places | None = None,
        probe: LinearProbe | None = None,
        seed: int = 0,
        writer: Writer | None = None,
        reading: Reading | None = None,
    ) -> None:
        if rule.name == PROBE and probe is None:
            raise InputError("the exit rule probe reads a probe, and none is given")
        if probe is not None:
            probe.check(probe.site, model.fingerprint)
            model.layout.module(model.hf, probe.site)  # raises SiteError if the model lacks the site
        self.rule, self.threshold, self.probe = rule, threshold, probe if rule.name == PROBE else None
        self.places = places or Places.of(model)
        self._reader = PlaceReader(model, writer=writer, seed=seed)
        self._reading = reading or (lambda _: nullcontext())
        self._closing = Closing(self.places.thinking, closing_ids(model))
        self._rows: list[int] = []
        self._n_answers = self._n_stopped = 0
        self._latest: Tensor | None = None
        self._prompts: list[list[int]] = []
        self._begin()

    def _begin(self) -> None:
        self.stopped: dict[
            int, int
        ] = {}  # rows whose thinking was closed, with the tokens of it that were written before
        self._signals: dict[int, PlaceSignals] = {}
        self._lines: dict[int, list[tuple[int, float]]] = {}  # of each row, the number by the last token before a place
        self._closing = Closing(self.places.thinking, self._closing.ids)

    @property
    def edits(self) -> Mapping[Site, Edit]:
        """What reads the probe's site; it changes nothing."""
        return {self.probe.site: Look(see=self._look)} if self.probe is not None else {}

    @property
    def n_edited(self) -> int:
        """None: it only reads."""
        return 0

    def begin(self, n_prompt: Sequence[int]) -> None:
        """Nothing to do: finished text is read and not stopped."""

    def on_step(self, step: DecodingStep) -> None:
        """Follow a step; give this as `on_step` to `generate`."""
        if step.index == 0:
            assert step.n_prompt is not None
            lengths = step.n_prompt.tolist()
            self._width = step.ids.shape[1]
            self._prompts = [row[len(row) - n :] for row, n in zip(step.ids.tolist(), lengths, strict=True)]
            self._begin()
            self._n_answers += len(lengths)
        if len(step.rows) != len(self._rows) or step.index == 0:
            self._rows = step.rows.tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self._rows) != len(input_ids):
            raise InputError("an exit rule follows each sequence; pass its on_step to generate as well")
        ended = self.places.ended(input_ids)
        for place in ended.nonzero()[:, 0].tolist() if ended.any() else ():
            row = self._rows[place]
            if row not in self._closing and row not in self.stopped:
                self._decide(row, place, input_ids[place].tolist())
        return self._closing.write(scores, self._rows, input_ids) if self._closing else scores

    @property
    def about(self) -> Mapping[str, Any]:
        """What its decisions are: the rule's number by the last token before each place."""
        site = "" if self.probe is None else str(self.probe.site)
        said = {"rule": self.rule.name, "threshold": self.threshold}
        return {"name": f"exit-{slug(self.rule.name)}", "site": site, "unit": self.rule.unit, "provenance": said}

    def finish(self, sequences: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """A batch is written; the rule's number at each token of its sequences but the last, (token,), NaN but before places."""
        lines = []
        for row, ids in enumerate(sequences):
            line = np.full(len(ids) - 1, np.nan, dtype=np.float32)
            for at, value in self._lines.get(row, ()):
                line[at] = value
            lines.append(line)
        return lines

    def told(self) -> str:
        """One line on what it did so far."""
        rule = f"the exit rule “{self.rule.name}”"
        if not self._n_stopped:
            return f"{rule} never reached {self.threshold:g} in {self._n_answers} answers, so nothing was stopped"
        return f"{rule} closed the thinking of {self._n_stopped} of {self._n_answers} answers at {self.threshold:g}"

    def _decide(self, row: int, place: int, padded: list[int]) -> None:
        prompt = self._prompts[row]
        ids = padded[self._width - len(prompt) :]
        spent, before = self.places.written(ids), self._signals.get(row)
        if spent < self.places.every + (int(before.spent[-1]) if before is not None else 0):
            return
        with self._reading(prompt):
            found = self._reader.read(ids, [len(ids)], [spent], margins=self.rule.passes)
            if self.rule.tries is not None:
                found = self._reader.forced(found, ids, [len(ids)], self.rule.tries(found))
        if self.probe is not None:
            found.score[:] = self._score(place)
        signals = found if before is None else before.then(found)
        self._signals[row] = signals
        number = float(self.rule.statistic(signals)[-1])
        self._lines.setdefault(row, []).append((len(ids) - 1, number))
        if number >= self.threshold:
            self.stopped[row] = spent
            self._n_stopped += 1
            self._closing.begin(row, spent)

    def _score(self, place: int) -> float:
        if self._latest is None or self.probe is None:
            raise InputError("an exit rule that reads a probe has read nothing; pass its edits to generate as well")
        value = self._latest[place].double() @ torch.from_numpy(self.probe.coef).to(self._latest.device).double()
        value = value + self.probe.intercept
        return round(float(value.sigmoid() if self.probe.task == "binary" else value), 4)

    def _look(self, activation: Tensor, _: Positions) -> None:
        self._latest = activation[:, -1].detach()
