"""What the tokens or sentences of a trace can be coloured by, with the values of each. No model, no Streamlit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.attention.reading import mean_effect
from reasonscope.analysis.results import Axis, Result
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.app.page_parts.measurements import stamp, trace_results
from reasonscope.app.page_parts.readings import cut_of, places_of
from reasonscope.data.sentence_cut import CutTrace
from reasonscope.data.storage.token_scores import CONTROL_PREFIX, read_scores
from reasonscope.data.summary import plural
from reasonscope.data.trace import Trace

_PROBE, _CONTROL = "probe: ", "controller: "
_NAMES = {
    "entropy": "entropy, forking tokens",
    "steering_shift": "steered − base",
    "alternatives": "log-probability, read again",
    "suppression": "suppression effect",
    "replacement": "replacement effect",
    "receiver_scores": "attention received",
    "close_attention": "attention at the end of the thinking",
    "recurrence": "longest pause before a look",
    "mi": "MI",
    "mi_base": "MI of the base model",
    "anchors": "importance",
}


@dataclass(frozen=True, kw_only=True)
class Colouring:
    """A value for every token or sentence of a trace.

    Attributes:
        name: What it is called on the page and in its address.
        title: The title of the scale.
        unit: The unit of the values.
        per: "token" or "sentence".
        values: (place,); NaN for a place without a value.
        about: What was measured, its null and its seed.
        bottom: The lower end of the scale, if it is known beforehand.
        top: The upper end, likewise.
        null: (2, place) what chance gives.
        interval: (2, place) the interval of each value.
        marks: The places that stand out.
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
    interval: NDArray[np.float64] | None = None
    marks: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the scale; if not given, the 2nd and 98th percentile, as one odd token would wash out the rest."""
        known = self.values[np.isfinite(self.values)]
        low, high = np.quantile(known, [0.02, 0.98]).tolist() if len(known) else (0.0, 1.0)
        low = low if self.bottom is None else self.bottom
        high = high if self.top is None else self.top
        return low, high if high > low else low + 1.0


def colouring_names(run: OpenRun, id: str) -> list[str]:
    """What the trace `id` can be coloured by, in words; the address of a page says them too."""
    trace = cut_of(run, id).trace
    measured = {"entropy": trace.entropies, "surprise": trace.logprobs}
    names = ["kind", *(name for name, values in measured.items() if values is not None)]
    names += [_score_name(path) for path in sorted(run.where.scores.glob("*.safetensors"))]
    for result in map(_over_sources, trace_results(run, id)):
        names += [name for name, _ in _lines(result)]
    return list(dict.fromkeys(names))


def colouring(run: OpenRun, id: str, name: str) -> Colouring | None:
    """The values of a name of `colouring_names`; None for `kind` and for a name that the trace does not have."""
    trace = cut_of(run, id).trace
    if name == "entropy" and trace.entropies is not None:
        return _generated(trace, name, "entropy of the next token", trace.entropies)
    if name == "surprise" and trace.logprobs is not None:
        return _generated(trace, name, "surprise (−log probability)", -trace.logprobs)
    if name.startswith((_PROBE, _CONTROL)):
        stem = Path(name.removeprefix(_PROBE).replace(_CONTROL, CONTROL_PREFIX)).name
        path = run.where.scores / f"{stem}.safetensors"
        return _score(trace, path, stamp(path)) if path.exists() else None
    for result in map(_over_sources, trace_results(run, id)):
        for found, index in _lines(result):
            if found == name:
                return _of_result(result, index, name, cut_of(run, id))
    return None


def _generated(trace: Trace, name: str, title: str, measured: NDArray[np.floating]) -> Colouring:
    """What was measured at each generated token during generation."""
    values = np.full(len(trace.token_ids), np.nan)
    values[trace.n_prompt_tokens :] = measured
    temperature = trace.sampling.temperature if trace.sampling else "unknown"
    about = f"at the generating temperature, {temperature}; n = {plural(np.isfinite(values).sum(), 'token')}"
    return Colouring(name=name, title=title, unit="nats", per="token", values=values, about=about, bottom=0.0)


def _held(values: NDArray[np.float64], stop: int) -> NDArray[np.float64]:
    """Values (token,), each kept until the next one and up to `stop`."""
    known = np.isfinite(values)
    last = np.maximum.accumulate(np.where(known, np.arange(len(values)), -1))
    last[max(stop, int(last.max()) + 1) :] = -1
    return np.where(known | (last < 0), values, values[last])


def _score_name(path: Path) -> str:
    """`probe: correctness`, or `controller: adaptive-speed` for what a controller decided while the model wrote."""
    if path.stem.startswith(CONTROL_PREFIX):
        return f"{_CONTROL}{path.stem.removeprefix(CONTROL_PREFIX)}"
    return f"{_PROBE}{path.stem}"


@lru_cache(maxsize=64)
def _score(trace: Trace, path: Path, mtime: int) -> Colouring | None:
    found = read_scores(path, [trace.id])
    values = np.full(len(trace.token_ids), np.nan)
    scored = found.scores[trace.id]
    values[: len(scored)] = scored
    unit = str(found.about.get("unit", "")).removeprefix("1")
    bottom, top = (0.0, 1.0) if unit == "probability" else (None, None)
    name, n = _score_name(path), int(np.isfinite(scored).sum())
    about = f"probe at {found.about.get('site')}; n = {plural(n, 'token')}; the last token is never fed back"
    if name.startswith(_CONTROL):
        site = f" at {found.about['site']}" if found.about.get("site") else ""
        bar = (found.about.get("provenance") or {}).get("threshold")
        stops = "" if bar is None else f"; it stops at {bar:.4g}"
        about = (
            f"what the controller decided{site} while the model wrote, until it decided again; n = {n} decisions{stops}"
        )
        values = _held(values, trace.tokens.thinking.stop)
        if n:
            bottom, top = float(np.nanmin(values)), float(np.nanmax(values))
    return Colouring(name=name, title=name, unit=unit, per="token", values=values, about=about, bottom=bottom, top=top)


def _over_sources(result: Result) -> Result:
    """Effects between sentences as one number per sentence, the mean over later ones; any other result unchanged."""
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
        reason=result.reason or "nothing follows the last sentence",
    )


def _lines(result: Result) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and index of each line over tokens or sentences that a result holds, up to a dozen."""
    last = result.axes[-1] if result.axes else None
    if last is None or last.name not in ("token", "sentence") or not result.measured:
        return
    if any(axis.name in ("token", "sentence", "source", "target") for axis in result.axes[:-1]):
        return
    shape = tuple(len(axis) for axis in result.axes[:-1])
    for index in list(np.ndindex(shape))[:12]:
        labels = [_said(axis, i) for axis, i in zip(result.axes, index, strict=False)]
        yield colouring_name(result.method, *labels), index


def _said(axis: Axis, place: int) -> str:
    label = axis.labels[place]
    return f"{axis.name} {label}" if label.isdigit() else label


def colouring_name(method: str, *labels: str) -> str:
    """The name of a line of a method's result."""
    return " · ".join([_NAMES.get(method, method.replace("_", " ")), *labels])


def _of_result(result: Result, index: tuple[int, ...], name: str, read: CutTrace) -> Colouring | None:
    """One line of a result, spread over the tokens or sentences of the trace by the labels of its axis."""
    axis = result.axes[-1]
    n = len(read.trace.token_ids) if axis.name == "token" else len(read.sentences)
    places = places_of(read, result)
    there = [i for i, place in enumerate(places) if place >= 0]
    if not there:
        return None
    where = [places[i] for i in there]
    values = np.full(n, np.nan)
    values[where] = result.values[index][there]
    null, interval = (
        None if band is None else _spread(np.stack([band.low[index], band.high[index]])[:, there], where, n)
        for band in (result.null, result.interval)
    )
    marks: tuple[int, ...] = ()
    if "peaks" in result.arrays and result.arrays["peaks"].shape == result.values.shape:
        marks = tuple(places[i] for i in np.flatnonzero(result.arrays["peaks"][index]))
    chance = result.null.what if result.null else result.null_missing or result.reason
    seed = result.provenance.get("seed", "–")
    what = ", ".join(f"{key} {result.provenance[key]}" for key in ("vector", "multiplier") if key in result.provenance)
    said = [result.quantity, what, f"chance: {chance}", f"seed {seed}", f"n = {np.isfinite(values).sum()}"]
    about = "; ".join(part for part in said if part)
    unit = result.unit_of(result.axes[0].labels[index[0]] if index else "")
    return Colouring(
        name=name,
        title=name,
        unit=unit,
        per=axis.name,
        values=values,
        about=about,
        null=null,
        interval=interval,
        marks=marks,
    )


def _spread(ends: NDArray[np.float64], where: list[int], n: int) -> NDArray[np.float64]:
    """(2, place) as (2, n), NaN at the other places."""
    found = np.full((2, n), np.nan)
    found[:, where] = ends
    return found
