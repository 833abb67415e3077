"""Scores of a probe for every token of a run, saved beside its store."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import TokenScores, save_scores
from reasonscope.data.trace import Trace
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import Place
from reasonscope.probes.properties.label_probe import span_states
from reasonscope.probes.properties.label_reports import AnyProbe
from reasonscope.probes.properties.refusal_cliff import token_scores


def write_scores(
    probe: AnyProbe, store: TraceStore, path: Path, *, name: str, ids: Collection[str] | None = None
) -> int:
    """Score every token of the traces of `store`, or of those named by `ids`, into `path`, and return how many traces that were.

    A file that is there is replaced. Traces without tokens (imported text) get no scores. Raises SiteError and InputError as
    `token_scores` does.
    """
    chosen = store if ids is None else map(store.trace, ids)
    traces = [trace for trace in chosen if len(trace.token_ids) > 1]
    scored = tracked(traces, "scoring tokens", "traces")
    found = {trace.id: _scores(probe, store, trace).astype(np.float32) for trace in scored}
    about = {
        "name": name,
        "site": str(probe.site),
        "unit": score_unit(probe),
        "provenance": dict(probe.provenance),
    }
    save_scores(TokenScores(scores=found, about=about), path)
    return len(found)


def _scores(probe: AnyProbe, store: TraceStore, trace: Trace) -> Values:
    """The score at every token. A probe of all tokens says after each of its tokens what it would say if they were all.

    Before its first token it has that token's score, because a score of nothing is not defined.
    """
    if isinstance(probe, LinearProbe):
        return token_scores(probe, store, trace)
    probe.check(probe.site, trace.model)
    place = Place.parse(probe.provenance["position"])
    if not (rows := place.rows(trace)):
        return np.full(len(trace.token_ids) - 1, np.nan)
    states = span_states(store, trace, place, probe.site)
    read = probe.probabilities(states) if probe.task == "binary" else probe.scores(states)
    latest = np.searchsorted(rows, np.arange(len(trace.token_ids) - 1), side="right") - 1
    return read[np.maximum(latest, 0)]


def score_unit(probe: AnyProbe) -> str:
    """What a score of `probe` is: a probability, or a value of its target."""
    return "probability" if probe.task == "binary" else str(probe.provenance.get("target", "as the probe's target"))
