"""Scores of a probe for every token of a run, saved beside its store."""

from pathlib import Path

import numpy as np

from reasonscope.data.progress import tracked
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import TokenScores, save_scores
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.properties.refusal_cliff import token_scores


def write_scores(probe: LinearProbe, store: TraceStore, path: Path, *, name: str) -> int:
    """Score every token of every trace of `store` into `path`, replace the file that is there, and return the number of traces.

    Traces without tokens (imported text) get no scores. Raises SiteError and InputError as `token_scores` does.
    """
    traces = [trace for trace in store if len(trace.token_ids) > 1]
    scored = tracked(traces, "scoring tokens", "traces")
    found = {trace.id: token_scores(probe, store, trace).astype(np.float32) for trace in scored}
    about = {
        "name": name,
        "site": str(probe.site),
        "unit": score_unit(probe),
        "provenance": dict(probe.provenance),
    }
    save_scores(TokenScores(scores=found, about=about), path)
    return len(found)


def score_unit(probe: LinearProbe) -> str:
    """What a score of `probe` is: a probability, or a value of its target."""
    return "probability" if probe.task == "binary" else str(probe.provenance.get("target", "as the probe's target"))
