"""How long will it think? A linear probe on the last prompt token (On Reasoning Strength Planning, arXiv 2506.08390)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reasonscope.data.errors import InputError
from reasonscope.data.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.evaluate import Estimate, Values, cluster_bootstrap, grouped_predictions, spearman

PENALTIES: list[object] = [float(penalty) for penalty in 10.0 ** np.arange(0, 6)]


@dataclass(frozen=True, kw_only=True)
class LengthProbe:
    """How well thinking tokens are predicted before the first of them, on held-out problems.

    `spearman` is of the probe; `baselines` the same for what needs no activations. `predicted` and `true` (trace,) in tokens.
    `n_truncated` traces ended at the token limit: their true length is longer than what is counted.
    """

    spearman: Estimate
    baselines: Mapping[str, Estimate]
    n_groups: int
    n_truncated: int
    predicted: Values
    true: Values


class Layer(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Chooses one layer of features (row, layer, d_model), so that a grid can choose the layer inside the fold."""

    def __init__(self, layer: int = 0) -> None:
        self.layer = layer

    def fit(self, features: NDArray[np.floating], targets: object = None) -> "Layer":
        self.n_layers_ = features.shape[1]
        return self

    def transform(self, features: NDArray[np.floating]) -> NDArray[np.floating]:
        return features[:, self.layer]


def length_probe(store: TraceStore, traces: list[Trace], *, seed: int = 0) -> LengthProbe:
    """Fit and evaluate on `traces` of a run with `resid_post` sites: ridge on log(1 + thinking tokens), groups kept together.

    The state is that of the last prompt token, which opens the thinking. Departures from the paper: log target, standardised
    features, penalty and layer chosen inside the fold, groups, and the baselines. Raises InputError where a trace has no thinking
    or the run holds no `resid_post`.
    """
    sites = sorted((site for site in store.sites if site.startswith("resid_post.")), key=lambda s: int(s.split(".")[1]))
    if not sites:
        raise InputError(
            f"the run holds no resid_post site (it holds {', '.join(store.sites)}); record it with resid_post.*"
        )
    for trace in traces:
        if trace.state == "absent":
            raise InputError(f"trace {trace.id!r} has no thinking, so it has no length to predict")
    features = np.stack([_at_last_prompt_token(store, trace, sites) for trace in traces])
    true = np.array([trace.n_thinking_tokens for trace in traces], dtype=np.float64)
    groups = [trace.problem.group for trace in traces]
    predicted = {
        "probe": _fold_predictions(
            [Layer(), StandardScaler()], features, true, groups, layer__layer=list(range(len(sites)))
        ),
        **baseline_predictions(traces),
    }
    scores = {name: cluster_bootstrap(spearman, true, values, groups, seed=seed) for name, values in predicted.items()}
    return LengthProbe(
        spearman=scores.pop("probe"),
        baselines=scores,
        n_groups=len(set(groups)),
        n_truncated=sum(trace.state == "truncated" for trace in traces),
        predicted=predicted["probe"],
        true=true,
    )


def baseline_predictions(traces: list[Trace]) -> dict[str, Values]:
    """Held-out predictions of thinking tokens from what needs no activations: prompt length, and the prompt's bag of words."""
    true = np.array([trace.n_thinking_tokens for trace in traces], dtype=np.float64)
    groups = [trace.problem.group for trace in traces]
    lengths = np.array([[trace.n_prompt_tokens] for trace in traces], dtype=np.float64)
    prompts = np.array([trace.text[trace.chars.prompt.slice] for trace in traces], dtype=object)
    words = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    return {
        "prompt_length": _fold_predictions([StandardScaler()], lengths, true, groups),
        "bag_of_words": _fold_predictions([words], prompts, true, groups, penalties=[0.01, 0.1, 1.0, 10.0]),
    }


def _fold_predictions(
    steps: list[BaseEstimator],
    features: NDArray[np.generic],
    true: Values,
    groups: list[str],
    *,
    penalties: list[object] = PENALTIES,
    **grid: list[object],
) -> Values:
    choices = {"ridge__alpha": penalties, **grid}
    estimator = make_pipeline(*steps, Ridge())
    return np.expm1(grouped_predictions(estimator, features, np.log1p(true), groups, grid=choices))


def _at_last_prompt_token(store: TraceStore, trace: Trace, sites: list[str]) -> NDArray[np.float32]:
    row = trace.n_prompt_tokens - 1
    return np.stack([np.asarray(store.activations(trace.id, site)[row], dtype=np.float32) for site in sites])
