"""What the tokens or sentences of a trace can be coloured by, and the values behind each. No model, no Streamlit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.looking_back import mean_effect
from reasonscope.analysis.results import Axis, Result
from reasonscope.app.measurements import stamp, trace_results
from reasonscope.app.readings import Reading, reading
from reasonscope.app.runs import Run
from reasonscope.data.scores import read_scores
from reasonscope.data.trace import Trace

_TITLES = {
    "steering_shift": "steered − base",
    "alternatives": "log-probability, read again",
    "suppression": "suppression effect",
    "receiver_scores": "attention received",
    "mi_peaks": "MI",
    "mi_base": "MI of the base model",
    "anchors": "importance",
}


@dataclass(frozen=True, kw_only=True)
class Colouring:
    """A value for every token (`per` "token") or sentence of a trace, NaN where there is none.

    `null` is the band of chance (2, …), `marks` the places that stand out. `bottom` and `top` are the ends of the scale where they are
    known beforehand.
    """

    name: str
    title: str
    unit: str
    per: str
    values: NDArray[np.float64]
    about: str
    bottom: float | None = None
    top: float | None = None
    null: NDArray[np.float64] | None = None
    marks: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the scale: the 2nd and the 98th percentile where they are not given, for one odd token would wash out the rest."""
        known = self.values[np.isfinite(self.values)]
        low, high = np.quantile(known, [0.02, 0.98]).tolist() if len(known) else (0.0, 1.0)
        low = low if self.bottom is None else self.bottom
        high = high if self.top is None else self.top
        return low, high if high > low else low + 1.0


def colouring_names(run: Run, id: str) -> dict[str, str]:
    """What the trace `id` can be coloured by: name, and title."""
    trace = reading(run, id).trace
    names = {"kind": "kind of sentence"}
    if trace.entropies is not None:
        names["entropy"] = "entropy of the next token"
    if trace.logprobs is not None:
        names["surprise"] = "surprise (−log probability)"
    names |= {f"score:{path.stem}": f"probe: {path.stem}" for path in sorted(run.where.scores.glob("*.safetensors"))}
    for result in map(_over_sources, trace_results(run, id)):
        names |= {name: title for name, title, _ in _slices(result)}
    return names


def colouring(run: Run, id: str, name: str) -> Colouring | None:
    """The values behind a name of `colouring_names`; None for `kind` and for a name that the trace does not have."""
    trace = reading(run, id).trace
    kind, _, which = name.partition(":")
    if name in ("entropy", "surprise"):
        measured = trace.entropies if name == "entropy" else None if trace.logprobs is None else -trace.logprobs
        if measured is None:
            return None
        values = np.full(len(trace.token_ids), np.nan)
        values[trace.n_prompt_tokens :] = measured
        temperature = trace.sampling.temperature if trace.sampling else "unknown"
        about = f"at the generating temperature, {temperature}; n = {np.isfinite(values).sum()} tokens"
        title = colouring_names(run, id)[name]
        return Colouring(name=name, title=title, unit="nats", per="token", values=values, about=about, bottom=0.0)
    if kind == "score":
        path = run.where.scores / f"{Path(which).name}.safetensors"
        return _score(trace, path, stamp(path)) if path.exists() else None
    for result in map(_over_sources, trace_results(run, id)):
        for found, title, index in _slices(result):
            if found == name:
                return _of_result(result, index, name, title, reading(run, id))
    return None


@lru_cache(maxsize=64)
def _score(trace: Trace, path: Path, mtime: int) -> Colouring | None:
    found = read_scores(path, [trace.id])
    values = np.full(len(trace.token_ids), np.nan)
    scored = found.scores[trace.id]
    values[: len(scored)] = scored
    unit = str(found.about.get("unit", ""))
    about = f"probe at {found.about.get('site')}; n = {len(scored)} tokens; the last token is never fed back"
    title = f"probe: {path.stem}"
    bottom, top = (0.0, 1.0) if unit == "probability" else (None, None)
    name = f"score:{path.stem}"
    return Colouring(name=name, title=title, unit=unit, per="token", values=values, about=about, bottom=bottom, top=top)


def _over_sources(result: Result) -> Result:
    """Effects of sentence on sentence as one number a sentence, the mean over what stands behind it; any other result as it is."""
    if [axis.name for axis in result.axes] != ["target", "source"]:
        return result
    return replace(
        result,
        quantity=f"{result.quantity}, mean over later sentences",
        axes=(Axis.of("sentence", len(result.values)),),
        values=mean_effect(result.values),
        null=None,
        null_missing="the null is of single pairs",
        interval=None,
        arrays={},
        reason=result.reason or "nothing stands behind the last sentence",
    )


def _slices(result: Result) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, title and index of each line over tokens or sentences that a result holds, up to a dozen."""
    last = result.axes[-1] if result.axes else None
    if last is None or last.name not in ("token", "sentence") or not result.measured:
        return
    if any(axis.name in ("token", "sentence", "source", "target") for axis in result.axes[:-1]):
        return
    shape = tuple(len(axis) for axis in result.axes[:-1])
    for index in list(np.ndindex(shape))[:12]:
        labels = [axis.labels[i] for axis, i in zip(result.axes, index, strict=False)]
        name = ":".join(["result", result.method, *labels])
        title = _TITLES.get(result.method, result.method.replace("_", " "))
        yield name, " · ".join([title, *(label.replace("_", " ") for label in labels)]), index


def _of_result(result: Result, index: tuple[int, ...], name: str, title: str, read: Reading) -> Colouring | None:
    """One line of a result, spread over the tokens or sentences of the trace by the labels of its axis."""
    axis = result.axes[-1]
    n = len(read.trace.token_ids) if axis.name == "token" else len(read.sentences)
    where = [int(label) if label.isdigit() else -1 for label in axis.labels]
    if not where or min(where) < 0 or max(where) >= n:
        return None
    values = np.full(n, np.nan)
    values[where] = result.values[index]
    band = None
    if result.null is not None:
        band = np.full((2, n), np.nan)
        band[0, where], band[1, where] = result.null.low[index], result.null.high[index]
    marks: tuple[int, ...] = ()
    if "peaks" in result.arrays and result.arrays["peaks"].shape == result.values.shape:
        marks = tuple(int(where[i]) for i in np.flatnonzero(result.arrays["peaks"][index]))
    chance = result.null.what if result.null else result.null_missing or result.reason
    seed = result.provenance.get("seed", "–")
    what = ", ".join(f"{key} {result.provenance[key]}" for key in ("vector", "multiplier") if key in result.provenance)
    said = [result.quantity, what, f"chance: {chance}", f"seed {seed}", f"n = {np.isfinite(values).sum()}"]
    about = "; ".join(part for part in said if part)
    return Colouring(
        name=name, title=title, unit=result.unit, per=axis.name, values=values, about=about, null=band, marks=marks
    )
