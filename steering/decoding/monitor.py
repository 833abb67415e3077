"""A probe that is read on every token while the model writes, and that may end the thinking."""

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import TokenScores, read_scores, save_scores
from reasonscope.data.text.steps_and_sentences import separator_token_ids
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.evaluation.conformal import alarm_threshold
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.decoding import DecodingStep
from reasonscope.probes.models.model import Model
from reasonscope.probes.properties.refusal_cliff import token_scores
from reasonscope.probes.properties.scores import score_unit
from reasonscope.steering.decoding.processors import forced
from reasonscope.steering.vectors.thinking import WrittenThinking

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
        at: "paragraph" stops only at the end of a paragraph: after a token with a blank line, or before one if that is the likeliest next
            token. It is where probes of `steer exit` learn, and it leaves no sentence unfinished. "token" stops anywhere.

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
        self._coef = torch.from_numpy(probe.coef).float()
        self.rows: list[int] = []
        self._read: list[tuple[list[int], Tensor]] = []  # rows, and (row, token) scores of each pass
        self._n_prompt: list[int] = []
        self._latest: Tensor | None = None
        self.kept: dict[str, NDArray[np.float32]] = {}
        self.closed: list[str] = []
        self._stopping: _Stopping | None = None
        if stop_above is not None:
            ends = _blank_lines(model) if at == "paragraph" else None
            self._stopping = _Stopping(self, WrittenThinking.of(model), stop_above, window, closing, ends)

    @property
    def edits(self) -> Mapping[Site, Edit]:
        """What reads the site; it changes nothing."""
        return {self.probe.site: self._look}

    @property
    def processors(self) -> tuple[LogitsProcessor, ...]:
        """What closes the thinking, if anything may."""
        return (self._stopping,) if self._stopping else ()

    @property
    def meta(self) -> Mapping[str, Any] | None:
        """How it closes the thinking, as a store says it; None if it only reads."""
        if not self._stopping:
            return None
        coef = hashlib.sha256(self.probe.coef.tobytes()).hexdigest()[:12]
        return {"probe": coef, "site": str(self.probe.site), **self._stopping.settings}

    @property
    def stopped(self) -> dict[int, int]:
        """The rows whose thinking was closed, with the number of thinking tokens that were written before."""
        return dict(self._stopping.at) if self._stopping else {}

    def on_step(self, step: DecodingStep) -> None:
        """Follow a step; give this as `on_step` to `generate`."""
        if step.index == 0:
            self._read = []
            if self._stopping:
                self._stopping.reset()
        if not self._read or len(step.rows) != len(self.rows):
            self.rows = step.rows.tolist()

    def scores(self) -> list[NDArray[np.float32]]:
        """The scores of each sequence (token,), without the last token, which is never fed: what `probe apply` gives for the whole text.

        Raises InputError if a state was not finite.
        """
        found: dict[int, list[NDArray[np.float32]]] = {}
        for rows, values in self._read:
            for row, line in zip(rows, values.cpu().numpy(), strict=True):
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
        if not self._stopping:
            return f"the probe was read on every token of {len(self.kept)} traces"
        above = f"{self._stopping.settings['stop_above']:.4g}"
        if not self.closed:
            return f"the score never passed {above} in {len(self.kept)} traces, so nothing was stopped"
        return f"the thinking of {len(self.closed)} of {len(self.kept)} traces was closed above {above}"

    def latest(self) -> list[float]:
        """The score of the newest token of each running sequence."""
        if self._latest is None:
            raise InputError("the monitor has read nothing; pass its edits and its on_step to generate as well")
        return [float(value) for value in self._latest.tolist()]

    def _kept(self, whole: Sequence[NDArray[np.float32]]) -> list[int]:
        """How many of the scores of each row are not padding."""
        width = self._read[0][1].shape[1] if self._read else 0
        return [len(line) - width + n for line, n in zip(whole, self._n_prompt, strict=True)]

    def _look(self, activation: Tensor, where: Positions) -> Tensor:
        if len(self.rows) != len(activation):
            raise InputError("a monitor follows each sequence; pass its on_step to generate as well")
        if self._coef.device != activation.device:
            self._coef = self._coef.to(activation.device)
        scores = activation.detach().float() @ self._coef + self.probe.intercept
        if self.probe.task == "binary":
            scores = scores.sigmoid()
        if not self._read:
            self._n_prompt = (where.index >= 0).sum(dim=1).tolist()
        self._read.append((self.rows, scores))
        self._latest = scores[:, -1]
        return activation


class _Stopping(LogitsProcessor):
    """Closes the thinking of each sequence once the mean of its latest scores is above a threshold."""

    def __init__(
        self,
        monitor: ProbeMonitor,
        thinking: WrittenThinking,
        above: float,
        window: int,
        closing: Sequence[int],
        ends: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._monitor, self._thinking, self._above, self._window = monitor, thinking, above, window
        self._closing, self._ends = tuple(closing) or thinking.closing, ends
        if self._closing[-1] != thinking.closing[-1]:
            raise InputError("closing does not end with the closing tag; add its id as the last one")
        self.reset()

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "at": "token" if self._ends is None else "paragraph",
            "stop_above": self._above,
            "window": self._window,
            "closing": list(self._closing),
        }

    def reset(self) -> None:
        self.at: dict[int, int] = {}
        self._closes: dict[int, int] = {}  # rows whose closing is being written, with the thinking tokens before it
        self._recent: dict[int, deque[float]] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self._monitor.rows
        passed = [self._passes(row, score) for row, score in zip(rows, self._monitor.latest(), strict=True)]
        if not self._closes and not any(passed):  # by far the most steps, which should cost next to nothing
            return scores
        written, may_stop = self._thinking.written(input_ids).tolist(), self._may_stop(input_ids, scores)
        for place, row in enumerate(rows):
            n = written[place]
            if row in self._closes and n < 1:
                del self._closes[row]
            elif row not in self._closes and passed[place] and may_stop[place] and n >= self._window:
                self._closes[row] = n
                self.at.setdefault(row, n)
            if row in self._closes:
                done = n - self._closes[row]
                scores = forced(scores, place, self._closing[min(done, len(self._closing) - 1)])
        return scores

    def _passes(self, row: int, score: float) -> bool:
        """Whether the mean of the latest scores, with this one, is above the threshold."""
        if self._window == 1:
            return score > self._above
        recent = self._recent.setdefault(row, deque(maxlen=self._window))
        recent.append(score)
        return len(recent) == self._window and fmean(recent) > self._above

    def _may_stop(self, input_ids: Tensor, scores: Tensor) -> list[bool]:
        if self._ends is None:
            return [True] * len(input_ids)
        holding, alone = (ids.to(scores.device) for ids in self._ends)
        ended = torch.isin(input_ids[:, -1], holding) | torch.isin(scores.argmax(dim=-1), alone)
        return [bool(one) for one in ended.tolist()]


def _blank_lines(model: Model) -> tuple[Tensor, Tensor]:
    """The tokens that hold a blank line, and those that are nothing else (others end a sentence first, as `.\\n\\n` does). Raises
    InputError if the tokenizer has none."""
    ids = separator_token_ids(model.tokenizer_backend)
    if not ids:
        raise InputError(f"the tokenizer of {model.name} has no token with a blank line; stop at any token")
    alone = [id for id in ids if not model.tokenizer_backend.decode([id], skip_special_tokens=False).strip()]
    return torch.tensor(ids), torch.tensor(alone, dtype=torch.int64)


def open_monitor(
    model: Model,
    path: Path,
    *,
    stop_above: float | None = None,
    window: int = 1,
    at: StopAt = "token",
    calibrate: TraceStore | None = None,
    false_alarms: float = 0.05,
) -> ProbeMonitor:
    """The monitor of a saved probe, with a threshold or one from a run, as `calibrated_threshold` finds it on the traces that it
    should leave alone (`left_alone`). Raises InputError if both are given."""
    probe = LinearProbe.load(path)
    if calibrate is not None:
        if stop_above is not None:
            raise InputError("--calibrate finds the threshold; leave out --stop-above, or --calibrate")
        alone = left_alone(probe, list(calibrate))
        stop_above = calibrated_threshold(probe, calibrate, alone, false_alarms=false_alarms, window=window)
    # A newline before the tag, as the models that write tags do.
    closing = model.tokenizer.encode(f"\n{model.tags.close}", add_special_tokens=False) if model.tags else ()
    return ProbeMonitor(model, probe, stop_above=stop_above, window=window, closing=closing, at=at)


def left_alone(probe: LinearProbe, traces: Sequence[Trace]) -> list[Trace]:
    """The traces that a monitor of this probe should not stop: benign requests for a refusal probe, wrong answers for a correctness
    probe, all of them for any other. Raises InputError without any."""
    target = str(probe.provenance.get("target", ""))
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


def save_live_scores(monitor: ProbeMonitor, store: TraceStore, path: Path, *, name: str) -> int:
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


def windowed(scores: Values, window: int) -> Values:
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
    highest, groups = [], []
    for trace in probe.unseen(list(store) if traces is None else list(traces)):
        scores = token_scores(probe, store, trace)
        places = trace.thinking_positions
        means = windowed(scores[places[places < len(scores)]], window)
        if len(means):
            highest.append(float(means.max()))
            groups.append(trace.problem.group)
    return alarm_threshold(np.array(highest), groups, false_alarms=false_alarms)
