"""A probe that is read on every token while the model writes, and that may end the thinking."""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import say
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import TokenScores, read_scores, save_scores
from reasonscope.data.summary import plural
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Look, Positions
from reasonscope.probes.evaluation.conformal import alarm_threshold
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.generation.monitored import LEARNED_FROM
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.properties.refusal_cliff import token_scores
from reasonscope.probes.properties.scores import score_unit
from reasonscope.steering.decoding.closing import Closing
from reasonscope.steering.exits.places import Places
from reasonscope.steering.exits.signals import closing_ids
from reasonscope.steering.vectors.thinking import WrittenThinking

if TYPE_CHECKING:
    from reasonscope.steering.engine.monitor import EngineMonitor

EXIT_TARGET = "right if the thinking ended here"
StopAt = Literal["token", "paragraph"]


class ProbeMonitor:
    """Reads a linear probe on every token that a model reads or writes, and closes the thinking if the score passes a threshold.

    Pass `edits` as `write=`, `on_step`, and `processors` to `generate`; each sequence of a batch has its own scores. Only a
    monitor that may stop has a processor. It resets with every generation.

    Args:
        model: The model that writes.
        probe: What to read, at its site.
        stop_above: Close the thinking after the first token at which the score (see `token_scores`), or its mean over the last `window`
            tokens of thinking, lies above this. None only reads.
        window: Tokens of thinking over which the score is averaged; before so many are written, nothing stops.
        closing: Ids that close the thinking, as in `ForcedClose`.
        at: "paragraph" stops only after a blank line. It is where probes of `steer exit` learn, and it leaves no sentence unfinished.
            "token" stops anywhere.
        calibrated_on: Groups of problems that the threshold was chosen on. With those that the probe learned from they go into the run,
            which is not judged on them.

    Raises:
        InputError: If the probe is of another model, or the window is below 1.
        SiteError: If the model has no such site.

    Example:
        monitor = ProbeMonitor(model, LinearProbe.load("runs/mine/probes/correctness.safetensors"), stop_above=0.9)
        how = {"write": monitor.edits, "on_step": monitor.on_step, "processors": monitor.processors}
        completions = generate(model, prompts, sampling, seeds=[0], **how)
        monitor.scores()[0]  # one score per token but the last
    """

    def __init__(
        self,
        model: Model,
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
        probe.check(probe.site, model.fingerprint)
        if len(probe.coef) != model.d_model:
            raise InputError(
                f"the probe reads {len(probe.coef)} numbers and the model has {model.d_model}; fit a new probe"
            )
        model.layout.module(model.hf, probe.site)  # raises SiteError if the model lacks the site
        self.probe = probe
        self._calibrated_on = frozenset(calibrated_on)
        self._coef = torch.from_numpy(probe.coef).float()[None]
        self.rows: list[int] = []
        self._read: list[tuple[list[int], Tensor]] = []  # rows, and projections (row, token, 1) of each pass
        self._n_prompt: list[int] = []
        self.kept: dict[str, NDArray[np.float32]] = {}
        self.closed: list[str] = []
        self._stopping: _Stopping | None = None
        self._bar = [math.inf]  # what a projection has to pass
        self._near = 0  # for how many more passes a score may be high
        if stop_above is not None:
            self._bar, self._window = [_bar(probe, stop_above)], window
            places = Places.of(model) if at == "paragraph" else None
            self._stopping = _Stopping(self, WrittenThinking.of(model), stop_above, window, closing, places)

    @property
    def edits(self) -> Mapping[Site, Edit]:
        """What reads the site; it changes nothing."""
        return {self.probe.site: Look(see=self._look)}

    @property
    def processors(self) -> tuple[LogitsProcessor, ...]:
        """What closes the thinking, if anything may."""
        return (self._stopping,) if self._stopping else ()

    @property
    def meta(self) -> Mapping[str, Any] | None:
        """How it closes the thinking, as a store says it; None if it only reads."""
        return monitor_meta(self.probe, self._stopping.settings if self._stopping else None, self._calibrated_on)

    @property
    def stopped(self) -> dict[int, int]:
        """The rows whose thinking was closed, with the number of thinking tokens that were written before."""
        return dict(self._stopping.at) if self._stopping else {}

    def on_step(self, step: DecodingStep) -> None:
        """Follow a step; give this as `on_step` to `generate`."""
        if step.index == 0:
            self._read, self._near = [], 0
            if self._stopping:
                self._stopping.reset()
        if not self._read or len(step.rows) != len(self.rows):
            self.rows = step.rows.tolist()

    def scores(self) -> list[NDArray[np.float32]]:
        """The scores of each sequence (token,), without the last token, which is never fed: what `probe apply` gives for the whole text.

        Raises InputError if a state was not finite.
        """
        found: dict[int, list[NDArray[np.float32]]] = {}
        for rows, values in self._stretches():
            for row, line in zip(rows, self._said(values).cpu().numpy(), strict=True):
                found.setdefault(row, []).append(line)
        whole = [np.concatenate(found[row]) for row in sorted(found)]
        whole = [line[-n:] if n else line for line, n in zip(whole, self._kept(whole), strict=True)]
        if not all(np.isfinite(line).all() for line in whole):
            raise InputError("a state was NaN or infinite while the model wrote; load it in float32 or bfloat16")
        return whole

    def finish(self, ids: Sequence[str]) -> None:
        """Keep the scores of the batch that was just written, in `kept` by the ids of its traces. Raises InputError as `scores` does."""
        self.kept |= dict(zip(ids, self.scores(), strict=True))
        self.closed += [ids[row] for row in self.stopped]

    def told(self) -> str:
        """One line on what it did in the batches that are finished."""
        return monitor_told(self._stopping.settings if self._stopping else None, len(self.kept), len(self.closed))

    def latest(self, window: int = 1) -> Tensor:
        """The scores of the newest tokens of each running sequence, (row, window), or fewer if not so many were read."""
        if not self._read:
            raise InputError("the monitor has read nothing; pass its edits and its on_step to generate as well")
        found, missing = list[Tensor](), window
        for rows, values in reversed(self._read):
            mine = values if rows is self.rows else values[[rows.index(row) for row in self.rows]]
            found.insert(0, mine[:, -missing:, 0])
            missing -= found[0].shape[1]
            if missing == 0:
                break
        return self._said(torch.cat(found, dim=1))

    @property
    def may_pass(self) -> bool:
        """Whether the mean of the latest scores of some row may be above the threshold. At most steps this is all that is asked."""
        return self._near > 0

    def _said(self, projections: Tensor) -> Tensor:
        """Scores from projections on the probe's direction."""
        scores = projections + self.probe.intercept
        return scores.sigmoid() if self.probe.task == "binary" else scores

    def _stretches(self) -> Iterator[tuple[list[int], Tensor]]:
        """What was read, with all passes over the same rows in one tensor."""
        for _, passes in groupby(self._read, key=lambda one: id(one[0])):
            joined = list(passes)
            yield joined[0][0], torch.cat([values for _, values in joined], dim=1)[..., 0]

    def _kept(self, whole: Sequence[NDArray[np.float32]]) -> list[int]:
        """How many of the scores of each row are not padding."""
        width = self._read[0][1].shape[1] if self._read else 0
        return [len(line) - width + n for line, n in zip(whole, self._n_prompt, strict=True)]

    def _look(self, activation: Tensor, where: Positions) -> None:
        """Runs at every step, so it computes no more than it must; the rest of the scores can wait."""
        if not self._read:
            self._begin(activation, where)
        states = activation.detach() if activation.requires_grad else activation
        states = states if states.dtype == torch.float32 else states.float()
        projections = functional.linear(states, self._coef)  # `@` takes twice as long here
        self._read.append((self.rows, projections))
        if self._stopping is not None:
            highest = max(map(max, projections.tolist()))  # a list of one number; torch takes longer for so few
            self._near = self._window if highest > self._bar else self._near - 1

    def _begin(self, activation: Tensor, where: Positions) -> None:
        if len(self.rows) != len(activation):
            raise InputError("a monitor follows each sequence; pass its on_step to generate as well")
        self._coef = self._coef.to(activation.device)
        self._n_prompt = (where.index >= 0).sum(dim=1).tolist()


def _bar(probe: LinearProbe, above: float) -> float:
    """What the projection of every score above `above` is surely above: a little lower than exact, because scores are rounded."""
    if probe.task == "binary":
        if not 1e-6 < above < 1:
            return -math.inf if above < 1 else math.inf
        above = math.log((above - 1e-6) / (1 - above + 1e-6))
    return above - probe.intercept - 1e-3 * (1 + abs(above) + abs(probe.intercept))


class _Stopping(LogitsProcessor):
    """Closes the thinking of each sequence once the mean of its latest scores is above a threshold."""

    def __init__(
        self,
        monitor: ProbeMonitor,
        thinking: WrittenThinking,
        above: float,
        window: int,
        closing: Sequence[int],
        places: Places | None,
    ) -> None:
        self._monitor, self._thinking, self._above, self._window = monitor, thinking, above, window
        self._ids, self._places = Closing(thinking, closing).ids, places
        self.reset()

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "at": "token" if self._places is None else "paragraph",
            "stop_above": self._above,
            "window": self._window,
            "closing": list(self._ids),
        }

    def reset(self) -> None:
        self.at: dict[int, int] = {}
        self._closing = Closing(self._thinking, self._ids)

    @property
    def idle(self) -> bool:
        """Whether nothing closes and no score is high, as at most steps; `generate` then passes it over."""
        return not self._closing and not self._monitor.may_pass

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.idle:
            return scores
        rows, passed = self._monitor.rows, self._passed()
        written, may_stop = self._thinking.written(input_ids).tolist(), self._may_stop(input_ids)
        for place in passed.nonzero()[:, 0].tolist():
            row, n = rows[place], written[place]
            if row not in self._closing and may_stop[place] and n >= self._window:
                self._closing.begin(row, n)
                self.at.setdefault(row, n)
        return self._closing.write(scores, rows, input_ids) if self._closing else scores

    def _passed(self) -> Tensor:
        """Whether the mean of the latest scores of each row is above the threshold, (row,)."""
        recent = self._monitor.latest(self._window)
        return (recent.mean(dim=1) > self._above) & (recent.shape[1] == self._window)

    def _may_stop(self, input_ids: Tensor) -> list[bool]:
        if self._places is None:
            return [True] * len(input_ids)
        return [bool(one) for one in self._places.ended(input_ids).tolist()]


def monitor_meta(
    probe: LinearProbe, settings: Mapping[str, Any] | None, calibrated_on: Collection[str]
) -> Mapping[str, Any] | None:
    """How a probe closes the thinking, as a store says it; None without `settings`, if it only reads."""
    if settings is None:
        return None
    coef = hashlib.sha256(probe.coef.tobytes()).hexdigest()[:12]
    learned = probe.provenance.get("learned_from")  # an old probe does not say
    known = {} if learned is None else {LEARNED_FROM: sorted({*learned, *calibrated_on})}
    return {"probe": coef, "site": str(probe.site), **settings, **known}


def monitor_told(settings: Mapping[str, Any] | None, n_traces: int, n_closed: int) -> str:
    """One line on what a monitor did."""
    if settings is None:
        return f"the probe was read on every token of {plural(n_traces, 'trace')}"
    above = f"{settings['stop_above']:.4g}"
    if not n_closed:
        return f"the score never passed {above} in {plural(n_traces, 'trace')}, so nothing was stopped"
    return f"the thinking of {n_closed} of {n_traces} traces was closed above {above}"


def monitor_options(
    model: Prompting,
    path: Path,
    *,
    stop_above: float | None = None,
    window: int = 1,
    at: StopAt = "token",
    calibrate: TraceStore | None = None,
    false_alarms: float = 0.05,
) -> tuple[LinearProbe, dict[str, Any]]:
    """A saved probe, and the options of a monitor that reads it: with a threshold, or one from a run, as `calibrated_threshold` finds it
    on the traces that it should leave alone (`_left_alone`). Raises InputError if both are given, or no score can be on either side of
    the threshold."""
    probe, alone = LinearProbe.load(path), list[Trace]()
    if stop_above is not None:
        _check_above(probe, stop_above)
    if calibrate is not None:
        if stop_above is not None:
            raise InputError("--calibrate finds the threshold; leave out --stop-above, or --calibrate")
        alone = _left_alone(probe, list(calibrate))
        stop_above = calibrated_threshold(probe, calibrate, alone, false_alarms=false_alarms, window=window)
    seen = {trace.problem.group for trace in alone}
    how = {"stop_above": stop_above, "window": window, "at": at, "calibrated_on": seen}
    return probe, {**how, "closing": closing_ids(model)}


def _check_above(probe: LinearProbe, above: float) -> None:
    """Raise InputError for a threshold that every score passes, or none."""
    if probe.task == "binary" and not 0 <= above < 1:
        raise InputError(
            f"--stop-above {above:g}: the scores of this probe are probabilities; give 0 or more, and less than 1"
        )
    if not math.isfinite(above):
        raise InputError(f"--stop-above {above:g}: give a finite number")


def _left_alone(probe: LinearProbe, traces: Sequence[Trace]) -> list[Trace]:
    """The traces that a monitor of this probe should not stop: benign requests for a refusal probe, wrong answers for a correctness
    probe, all of them for any other. Raises InputError without any, and for an exit probe, which forced answers calibrate."""
    target = str(probe.provenance.get("target", ""))
    if target == EXIT_TARGET:
        raise InputError(
            "an exit probe should not stop at places at which the answer would be wrong, which only forced answers tell; calibrate it with "
            "`reasonscope steer exit --run OTHER --probe PROBE --false-alarms 0.05`"
        )
    if target.startswith("refusal"):
        found, what = [t for t in traces if t.problem.meta.get("harmful") is False], "benign requests"
    elif target.startswith("correctness"):
        found, what = [t for t in traces if t.correct is False], "wrong answers"
    else:
        found, what = list(traces), "traces"
    if not found:
        raise InputError(
            f"the run to calibrate on has no {what}, which the monitor should leave alone; give another run"
        )
    return found


def save_live_scores(monitor: "ProbeMonitor | EngineMonitor", store: TraceStore, path: Path, *, name: str) -> int:
    """Write the scores that were read while the traces of `store` were written, in the file that `probe apply` writes.

    Scores of a recording that this one resumed stay. Returns the number of traces without any: those that were written before the
    monitor watched, or in a batch whose recording was interrupted.
    """
    before = read_scores(path).scores if path.exists() else {}
    known = {**before, **monitor.kept}
    found = {id: known[id] for id in store.ids if id in known}
    probe = monitor.probe
    about = {
        "name": name,
        "site": str(probe.site),
        "unit": score_unit(probe),
        "provenance": {**probe.provenance, "live": True, **(monitor.meta or {})},
    }
    save_scores(TokenScores(scores=found, about=about), path)
    return len(store) - len(found)


def _windowed(scores: Values, window: int) -> Values:
    """The mean of each `window` scores in a row, (token − window + 1,); empty if there are fewer."""
    if len(scores) < window:
        return np.zeros(0)
    return np.convolve(scores, np.full(window, 1 / window), mode="valid")


def calibrated_threshold(
    probe: LinearProbe,
    store: TraceStore,
    traces: Iterable[Trace] | None = None,
    *,
    false_alarms: float = 0.05,
    window: int = 1,
) -> float:
    """The score above which a monitor stops at most a share `false_alarms` of new problems that it should leave alone.

    Split conformal over groups (see `alarm_threshold`): of each trace the highest score of its thinking, averaged over `window` tokens.

    Args:
        probe: The probe.
        store: A run with the states that it reads.
        traces: Traces that must not be stopped; all by default. Those whose problems the probe learned from do not count.
        false_alarms: The share of problems.
        window: As for `ProbeMonitor`.

    Returns:
        The threshold, in the unit of `token_scores`.

    Raises:
        InputError: If the probe learned from all groups, or there are too few of them for so small a share.
    """
    given = list(store) if traces is None else list(traces)
    unseen = probe.unseen(given)
    if len(unseen) < len(given):
        say(
            f"The threshold comes from {len(unseen)} of {len(given)} traces: the probe learned from the problems of the others."
        )
    highest, groups = [], []
    for trace in unseen:
        scores = token_scores(probe, store, trace)
        places = trace.thinking_positions
        means = _windowed(scores[places[places < len(scores)]], window)
        if len(means):
            highest.append(float(means.max()))
            groups.append(trace.problem.group)
    return alarm_threshold(np.array(highest), groups, false_alarms=false_alarms)
