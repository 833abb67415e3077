"""What a probe has to beat: predictions that need no activations, or only those of the first layer.

A row is a trace and one of its tokens. Each baseline is a function from `Points` to features, (row, feature) or (row,) texts, and gets
the same folds, penalties and metric as the probe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site

Features = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Points:
    """Rows to predict from.

    Attributes:
        traces: The trace of each row, (row,); a trace appears as often as it has rows.
        tokens: The index of each row's token in its trace, (row,).
    """

    traces: Sequence[Trace]
    tokens: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.traces) != len(self.tokens):
            raise InputError(f"{len(self.traces)} traces and {len(self.tokens)} tokens; give one token per row")

    def __len__(self) -> int:
        return len(self.traces)

    @classmethod
    def last_prompt_tokens(cls, traces: Sequence[Trace]) -> "Points":
        """The last token of each prompt, before the model wrote anything."""
        return cls(traces=traces, tokens=[trace.n_prompt_tokens - 1 for trace in traces])


def _class_prior(points: Points) -> Features:
    """A constant (row, 1): what is predicted is the mean, or the share of class 1, of each training part.

    Its rank correlation and AUROC lie below chance and are not a baseline: a fold with high targets leaves a low mean to the others.
    """
    return np.zeros((len(points), 1))


def _prompt_length(points: Points) -> Features:
    """log(1 + prompt tokens) (row, 1)."""
    return np.log1p([[trace.n_prompt_tokens] for trace in points.traces])


def _elapsed_position(points: Points) -> Features:
    """Tokens written so far, and log(1 + tokens) (row, 2): what a probe knows if it reads nothing but the position."""
    pairs = zip(points.traces, points.tokens, strict=True)
    elapsed = np.array([[token + 1 - trace.n_prompt_tokens] for trace, token in pairs], dtype=np.float64)
    return np.hstack([elapsed, np.log1p(np.maximum(elapsed, 0))])


def _thinking_length(points: Points) -> Features:
    """log(1 + thinking tokens) (row, 1). Known only after the fact; a probe of correctness may be this in disguise."""
    return np.log1p([[trace.n_thinking_tokens] for trace in points.traces])


def _truncated(points: Points) -> Features:
    """Whether the token limit cut the thinking off (row, 1). Known only after the fact, as `_thinking_length` is."""
    return np.array([[trace.state == "truncated"] for trace in points.traces], dtype=np.float64)


def _difficulty(points: Points) -> Features:
    """The difficulty that the problem set states, and whether it states one (row, 2). Raises InputError if no problem states one.

    A problem without a difficulty gets the mean of the others.
    """
    stated = np.array([trace.problem.difficulty for trace in points.traces], dtype=np.float64)
    known = np.isfinite(stated)
    if not known.any():
        raise InputError("no problem states a difficulty; leave this baseline out")
    return np.stack([np.where(known, stated, stated[known].mean()), known], axis=1)


def _bag_of_words(points: Points) -> Features:
    """The text of the prompt (row,); its words are weighted by TF-IDF inside the fold."""
    return np.array([trace.text[trace.chars.prompt.slice] for trace in points.traces], dtype=object)


def _next_token(points: Points) -> Features:
    """Entropy and log-probability (nats) of the token after the row's token (row, 2): what the output itself says, without a probe.

    The log-probability is that of the token which was then drawn, so this baseline sees one token more than the probe. Raises
    InputError for a trace without them or a row before the last prompt token.
    """
    return np.array([_of_next(trace, token) for trace, token in zip(points.traces, points.tokens, strict=True)])


def _embedding(points: Points, store: TraceStore) -> Features:
    """The state before the first layer, `resid_pre.0`, or the first layer's own state if that was not recorded (row, d_model)."""
    site = str(_embedding_site(store))
    pairs = zip(points.traces, points.tokens, strict=True)
    return np.stack([np.asarray(store.activations(trace.id, site)[token], dtype=np.float64) for trace, token in pairs])


def _embedding_site(store: TraceStore) -> Site:
    """The earliest residual site of a run. Raises InputError if the run has none."""
    return residual_sites(store)[0]


def residual_sites(store: TraceStore) -> list[Site]:
    """Every recorded site of the residual stream, in the order in which the model computes them. Raises InputError if the run has none.

    `resid_pre.i + 1` is the same state as `resid_post.i`, and is left out if both are recorded.
    """
    sites = [site for site in map(Site.parse, store.sites) if site.point in ("resid_pre", "resid_post")]
    if not sites:
        raise InputError(
            f"the run has no activations of the residual stream (its sites: {', '.join(store.sites) or 'none'}), which the probes read; "
            "record it again with: reasonscope record --sites 'resid_post.*'"
        )
    repeated = {("resid_pre", site.layer + 1) for site in sites if site.point == "resid_post"}
    once = [site for site in sites if (site.point, site.layer) not in repeated]
    return sorted(once, key=lambda site: (site.layer, site.point == "resid_post"))


# The baselines that need nothing but the trace, by name.
BASELINES: Mapping[str, Callable[[Points], Features]] = {
    "class_prior": _class_prior,
    "prompt_length": _prompt_length,
    "bag_of_words": _bag_of_words,
    "elapsed_position": _elapsed_position,
    "thinking_length": _thinking_length,
    "truncated": _truncated,
    "difficulty": _difficulty,
    "next_token": _next_token,
}

# Baselines that know only the text of the prompt.
TEXT_BASELINES = ("prompt_length", "bag_of_words")

# What each baseline knows, for a sentence: "better than …".
BASELINE_WORDS: Mapping[str, str] = {
    "class_prior": "the share of each class",
    "prompt_length": "the length of the prompt",
    "bag_of_words": "the words of the prompt",
    "elapsed_position": "the number of tokens written so far",
    "thinking_length": "the length of the whole reasoning",
    "truncated": "whether the token limit cut the reasoning off",
    "difficulty": "the difficulty that the problem set states",
    "next_token": "the entropy and log-probability of the next token",
    "embedding": "the state before the first layer",
    "first_layer": "the state after the first layer",
    "linear_probe_of_the_mean": "a linear probe of the mean state",
}


def baseline_features(points: Points, store: TraceStore, names: Sequence[str]) -> dict[str, Features]:
    """Features of the baselines `names` and of those that the run allows: difficulty, first layer, entropy of the next token."""
    found = {name: BASELINES[name](points) for name in names}
    if any(trace.problem.difficulty is not None for trace in points.traces):
        found["difficulty"] = _difficulty(points)
    first = _embedding_site(store)
    if first.layer == 0:
        found["embedding" if first.point == "resid_pre" else "first_layer"] = _embedding(points, store)
    if all(trace.entropies is not None and trace.logprobs is not None for trace in points.traces):
        next_token = _next_token(points)
        if np.isfinite(next_token).all():  # what another program wrote has none
            found["next_token"] = next_token
    return found


def _of_next(trace: Trace, token: int) -> tuple[float, float]:
    index = token + 1 - trace.n_prompt_tokens
    if trace.entropies is None or trace.logprobs is None:
        raise InputError(f"trace {trace.id!r} has no entropies and log-probabilities; leave this baseline out")
    if not 0 <= index < len(trace.entropies):
        raise InputError(
            f"trace {trace.id!r}: no token was generated after token {token}; take rows from the last prompt token on"
        )
    return float(trace.entropies[index]), float(trace.logprobs[index])
