"""Published importances: read unchanged, recomputed as far as the files allow, and written in the published layout."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reasonscope.analysis.anchors.importance import Rollout, resampled_sentences
from reasonscope.analysis.results import Axis, Result, undefined
from reasonscope.analysis.statistics import DependencyAgreement, agreement_numbers, dependency_agreement
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.importers import PUBLISHED_EFFECTS
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.storage.untrusted import wrap_errors
from reasonscope.data.text.published_chunks import published_sentences
from reasonscope.data.trace import Sentence, Trace

METHOD = "anchors"
_NEAR = 5  # sentences; the paper reports these pairs separately
_PUBLISHED = (
    "accuracy",
    "resampling_importance_accuracy",
    "resampling_importance_kl",
    "counterfactual_importance_accuracy",
    "counterfactual_importance_kl",
    "forced_importance_accuracy",
    "forced_importance_kl",
    "different_trajectories_fraction",
    "overdeterminedness",
)
# Our names for the same numbers.
_OURS = {
    "resampling_importance_accuracy": "resampling_accuracy",
    "resampling_importance_kl": "resampling_kl",
    "counterfactual_importance_accuracy": "counterfactual_accuracy",
    "counterfactual_importance_kl": "counterfactual_kl",
    "different_trajectories_fraction": "different_fraction",
    "forced_importance_accuracy": "forced_accuracy",
    "forced_importance_kl": "forced_kl",
}


def published_importances(trace: Trace) -> Result:
    """The importances published with an imported trace: axes (metric, sentence), a sentence labelled by its published
    index.

    `arrays`: `recomputed`, the resampling accuracy from the published accuracies of a sentence and the next (0 at the
    end, as published); `effects` (target, source) by resampling and `suppression` by attention, if they were published.
    `numbers`: the share of sentences whose two accuracies agree to 1e-9, how well the effects find the published
    dependencies, and how they correlate with suppression over all pairs and over those up to 5 sentences apart
    (Pearson; chance is 0). The published files have no rollouts, so nulls, intervals and KLs cannot be computed.
    Undefined for a trace without published chunks. Raises InputError for anything outside the published layout.
    """
    chunks: Sequence[Mapping[str, Any]] = trace.meta.get("chunks", ())
    provenance: dict[str, Any] = {"trace": trace.id, "source": "published"}
    if not chunks:
        reason = "no importances were published with this trace"
        return undefined(method=METHOD, quantity="importance", unit="1", reason=reason, provenance=provenance)
    with wrap_errors(f"what was published with trace {trace.id!r}"):
        placed = published_sentences(trace)
        if len(placed) == len(chunks):
            provenance |= cut_provenance(placed)
        values = np.array([[_number(chunk.get(name)) for chunk in chunks] for name in _PUBLISHED], dtype=np.float64)
        anew = _recomputed_resampling_accuracy(chunks)
        about = {
            "tags": [(chunk["function_tags"] or ["unknown"])[0] for chunk in chunks],
            "texts": [chunk["chunk"] for chunk in chunks],
            "depends_on": published_dependencies(chunks),
            "resampled": [_resampled(trace, chunk, i) for i, chunk in enumerate(chunks)],
        }
    told = values[_PUBLISHED.index("resampling_importance_accuracy")]
    both = np.isfinite(anew) & np.isfinite(told)
    effects, suppressed = (_effect_matrix(trace.meta.get(name) or (), len(chunks)) for name in PUBLISHED_EFFECTS)
    given = {"effects": effects, "suppression": suppressed}
    arrays = {"recomputed": anew} | {name: matrix for name, matrix in given.items() if matrix is not None}
    agreement = None if effects is None else _agreement(effects, chunks)
    return Result(
        method=METHOD,
        quantity="published importance of a sentence",
        unit="1 (accuracy), nats (kl)",
        axes=(
            Axis.of("metric", [_OURS.get(name, name) for name in _PUBLISHED]),
            Axis.of("sentence", [str(chunk.get("chunk_idx", i)) for i, chunk in enumerate(chunks)]),
        ),
        values=values,
        null_missing="the published files have no rollouts to draw a null from",
        reason="a number was not published" if np.isnan(values).any() else "",
        arrays=arrays,
        numbers={
            "recomputed_equal": float((np.abs(anew - told)[both] <= 1e-9).mean()) if both.any() else None,
            "recomputed_of": int(both.sum()),
            "dependencies": None if agreement is None else agreement_numbers(agreement),
            "suppression_correlation": None
            if effects is None or suppressed is None
            else _correlations(effects, suppressed),
            **about,
        },
        provenance=provenance,
    )


def _resampled(trace: Trace, chunk: Mapping[str, Any], place: int) -> list[dict[str, Any]]:
    """What the published rollouts wrote instead of a sentence, if that was published; their answers were not."""
    written = (trace.meta.get("chunks_resampled") or {}).get(str(chunk.get("chunk_idx", place)), ())
    return resampled_sentences(chunk["chunk"], [Rollout(answer=None, correct=None, resampled=text) for text in written])


def _recomputed_resampling_accuracy(chunks: Sequence[Mapping[str, Any]]) -> Values:
    """accuracy(i + 1) − accuracy(i) from the published accuracies; 0 for the last chunk, NaN if one was not
    published."""
    told = [(int(chunk.get("chunk_idx", i)), _number(chunk.get("accuracy"))) for i, chunk in enumerate(chunks)]
    accuracies = dict(told)
    return np.array([accuracies[i + 1] - value if i + 1 in accuracies else 0.0 for i, value in told], dtype=np.float64)


def _effect_matrix(step_importance: Sequence[Mapping[str, Any]], n: int) -> Values | None:
    """The published effects as (target, source), NaN if not published; None without any. Raises InputError."""
    if not step_importance:
        return None
    effects = np.full((n, n), np.nan)
    with wrap_errors("step_importance"):
        for row in step_importance:
            source = int(row["source_chunk_idx"])
            for impact in row["target_impacts"]:
                target = int(impact["target_chunk_idx"])
                if not (0 <= source < n and 0 <= target < n):
                    raise InputError(f"step_importance names sentences {source} and {target} of {n}")
                effects[target, source] = _number(impact["importance_score"])
    return effects


def with_importances(trace: Trace, sentences: Sequence[Sentence], result: Result) -> Trace:
    """The trace with our importances as published `chunks` and `step_importance` in its meta, for
    `export_thought_anchors`.

    A number that we do not have is null, and depends_on is empty, because nobody labelled dependencies.
    """
    ours = result.axis("metric").labels
    rows = {name: _OURS.get(name, name) for name in _PUBLISHED if _OURS.get(name, name) in ours}
    chunks = [
        {
            "chunk": sentence.text,
            "chunk_idx": i,
            "function_tags": [sentence.tag],
            "depends_on": [],
            **{name: _null(result.at(metric=metric)[i]) for name, metric in rows.items()},
        }
        for i, sentence in enumerate(sentences)
    ]
    effects = np.asarray(result.arrays["effects"]) if "effects" in result.arrays else np.full((0, 0), np.nan)
    steps = [
        {
            "source_chunk_idx": source,
            "source_chunk_text": sentence.text,
            "target_impacts": [
                {"target_chunk_idx": target, "importance_score": float(effects[target, source])}
                for target in range(source + 1, len(effects))
                if np.isfinite(effects[target, source])
            ],
        }
        for source, sentence in enumerate(sentences)
    ]
    return replace(trace, meta={**trace.meta, "chunks": chunks, "step_importance": steps if len(effects) else []})


def published_dependencies(chunks: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The labelled sources of each sentence; entries that are not the number of an earlier sentence are left out."""
    found = []
    for target, chunk in enumerate(chunks):
        named = [int(source) for source in chunk.get("depends_on") or [] if str(source).isdecimal()]
        found.append([source for source in named if source < target])
    return found


def _agreement(effects: Values, chunks: Sequence[Mapping[str, Any]]) -> DependencyAgreement | None:
    dependencies = published_dependencies(chunks)
    try:
        return dependency_agreement(np.abs(effects), dependencies) if any(dependencies) else None
    except InputError:  # too few effects were published to separate true pairs from others
        return None


def _correlations(effects: Values, suppressed: Values) -> dict[str, float | None]:
    """Pearson correlation of the two matrices (target, source), over all pairs that both have and over near ones;
    None if too few."""
    near = np.subtract.outer(np.arange(len(effects)), np.arange(len(effects))) <= _NEAR
    both = np.isfinite(effects) & np.isfinite(suppressed)
    found: dict[str, float | None] = {}
    for name, pairs in (("all", both), (f"up to {_NEAR} apart", both & near)):
        x, y = effects[pairs], suppressed[pairs]
        found[name] = float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and np.ptp(x) and np.ptp(y) else None
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _null(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
