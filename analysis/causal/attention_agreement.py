"""Whether attention finds the true dependencies between sentences: receiver and suppression scores against the
grammar of a problem set."""

from collections.abc import Sequence

import numpy as np

from reasonscope.analysis.attention.rows.functionals import SentenceAttention
from reasonscope.analysis.attention.sentence_attention import sentence_attention
from reasonscope.analysis.attention.vertical import kurtosis, nan_mean, top_heads, vertical_scores
from reasonscope.analysis.causal.suppression import normalised, suppression_effect
from reasonscope.analysis.results import Axis, Result
from reasonscope.analysis.statistics import DependencyAgreement, dependency_agreement, null_band
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import CutTrace, cut_trace
from reasonscope.data.trace import Trace
from reasonscope.probes.models.model import Model

METHODS = ("receiver", "all heads", "suppression")
METRICS = ("auroc", "precision", "auroc of nearness")


def attention_agreement(
    model: Model, traces: Sequence[Trace], *, n_heads: int = 4, n_permutations: int = 200, seed: int = 0
) -> Result:
    """AUROC and precision at k of three scores of (target, source) pairs: axes (method, metric).

    `receiver`: mean attention between the sentences in the `n_heads` of highest kurtosis (without layer 0), chosen
    without the trace on which they are judged; `all heads`: in every head equally; `suppression`: its normalised log
    divergence. Null: each target's scores shuffled among its sources, 95 % of `n_permutations`. Nearness alone is the
    baseline, because most dependencies are near. `numbers` has the p-values. Raises InputError for fewer than two
    traces with closed thinking whose dependencies are known.
    """
    chosen = [cut for cut in map(cut_trace, traces) if _is_known(cut)]
    if len(chosen) < 2:
        raise InputError(
            f"{len(chosen)} of {len(traces)} traces have closed thinking of two sentences or more with known dependencies; "
            "this needs two such traces"
        )
    read, suppressed = [], []
    for cut in chosen:
        spans = [sentence.tokens for sentence in cut.sentences]
        ids = cut.trace.token_ids[: spans[-1].stop].tolist()
        read.append(sentence_attention(model, ids, spans))
        suppressed.append(normalised(suppression_effect(model, ids, spans).log_kl))
    depends = [cut.depends_on or () for cut in chosen]
    scores = {
        "receiver": _by_receivers(read, n_heads),
        "all heads": [one.matrix.mean(axis=(0, 1)) for one in read],
        "suppression": suppressed,
    }
    found = {
        name: dependency_agreement(scores[name], depends, n_permutations=n_permutations, seed=seed) for name in METHODS
    }
    return _result(
        found, {"traces": [cut.trace.id for cut in chosen], "n_heads": n_heads, "draws": n_permutations, "seed": seed}
    )


def _is_known(cut: CutTrace) -> bool:
    return cut.trace.state == "closed" and cut.depends_on is not None and len(cut.sentences) > 1


def _by_receivers(read: Sequence[SentenceAttention], n: int) -> list[Values]:
    peaked = np.stack([kurtosis(vertical_scores(one.matrix)) for one in read])
    found = []
    for index, one in enumerate(read):
        heads = top_heads(nan_mean(np.delete(peaked, index, axis=0), axis=0), n, from_layer=1)
        found.append(np.mean([one.matrix[head.layer, head.index] for head in heads], axis=0))
    return found


def _result(found: dict[str, DependencyAgreement], provenance: dict[str, object]) -> Result:
    values = np.array([[one.auroc, one.precision, one.distance_auroc] for one in found.values()])
    nulls = [
        [one.null_auroc, one.null_precision, np.full(len(one.null_auroc), one.distance_auroc)] for one in found.values()
    ]
    first = next(iter(found.values()))
    return Result(
        method="anchor_agreement",
        quantity="agreement with the true dependencies",
        unit="1",
        axes=(Axis.of("method", METHODS), Axis.of("metric", METRICS)),
        values=values,
        null=null_band(np.moveaxis(np.array(nulls), -1, 0), "scores shuffled among each target's sources"),
        numbers={
            "p": {name: one.p_value for name, one in found.items()},
            "pairs": first.n_pairs,
            "true": first.n_true,
        },
        provenance=provenance,
    )
