"""The attention chain of an answer: the few tokens that it was read from, step by step backwards (UQAC, arXiv
2503.19168)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.analysis.attention.blocks import read_attention
from reasonscope.analysis.attention.rows.block import AttentionBlock
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span
from reasonscope.data.variants import Variant, is_published
from reasonscope.probes.models.model import Model

Reduction = Literal["max", "mean"]

# The factors for weights on the token 1, 2, … 10 before, by which the released code compensates for nearness.
_CALIBRATION = (
    0.16644488, 0.20938152, 0.32959151, 0.46061748, 0.59304059, 0.67549127, 0.73914525, 0.81274293, 0.87378443, 0.93925344,
)  # fmt: skip
_TINY = 1e-12
_FIRST = 5  # columns of each source that are always visited


@dataclass(frozen=True, kw_only=True)
class Link:
    """A token of the chain.

    `index` in the response (it predicts the token after it; −1 is the last of the instruction), and its score.
    """

    index: int
    score: float


class _ReducedAttention:
    """A reader for `read_attention`: for each response row, the `heads_kept` heads of least entropy over all layers,
    reduced to one row.

    Rows go through `_prepared` first. Only the heads kept so far are in memory: (row, head, column), for any number of
    layers.
    """

    def __init__(
        self,
        response: Span,
        *,
        heads_kept: int = 16,
        reduction: Reduction = "max",
        calibration: Sequence[float] = _CALIBRATION,
    ) -> None:
        if reduction not in get_args(Reduction):
            raise InputError(f"unknown reduction {reduction!r}; choose {', '.join(get_args(Reduction))}")
        if response.start < len(calibration) or not len(response):
            raise InputError(
                f"a response at tokens {response.start} to {response.stop} must have a token and follow an instruction of at "
                f"least {len(calibration)} tokens"
            )
        self._response, self._kept, self._reduction = response, heads_kept, reduction
        self._calibration = torch.tensor(calibration, dtype=torch.float64)
        self._rows = torch.zeros(len(response), 0, response.stop, dtype=torch.float64)
        self._entropies = torch.zeros(len(response), 0, dtype=torch.float64)
        self._layer: list[tuple[int, Tensor]] = []

    def __call__(self, block: AttentionBlock) -> None:
        first = max(block.rows.start, self._response.start)
        last = min(block.rows.stop, self._response.stop)
        if first >= last:
            return
        shown = block.probabilities[:, first - block.rows.start : last - block.rows.start].double().cpu()
        rows = torch.zeros(len(shown), last - first, self._response.stop, dtype=torch.float64)
        rows[..., block.keys.slice] = shown
        rows = _prepared(rows, first, self._calibration)
        entropy = -(rows * (rows + _TINY).log()).sum(dim=-1)
        at = slice(first - self._response.start, last - self._response.start)
        self._layer.append((at.start, torch.cat([rows, entropy[..., None]], dim=-1)))
        if last == self._response.stop:
            self._merge()

    def _merge(self) -> None:
        """Add the heads of a finished layer to those kept so far, and keep the best of both."""
        found = torch.cat([part for _, part in sorted(self._layer, key=lambda item: item[0])], dim=1).transpose(0, 1)
        self._layer = []
        rows = torch.cat([self._rows, found[..., :-1]], dim=1)
        entropies = torch.cat([self._entropies, found[..., -1]], dim=1)
        best = entropies.argsort(dim=1, stable=True)[:, : self._kept]
        self._entropies = entropies.gather(1, best)
        self._rows = rows.gather(1, best[..., None].expand(-1, -1, rows.shape[-1]))

    def result(self) -> Values:
        """The reduced attention (row of the response, column)."""
        reduced = self._rows.amax(dim=1) if self._reduction == "max" else self._rows.mean(dim=1)
        return np.asarray(reduced.numpy())


def _prepared(rows: Tensor, first: int, calibration: Tensor) -> Tensor:
    """Rows (head, row, column) from token `first` on, without their own column and column 0, corrected for nearness,
    summing to 1."""
    rows = rows.clone()
    rows[..., 0] = 0.0
    for offset in range(rows.shape[1]):
        own = first + offset
        rows[:, offset, own] = 0.0
        rows[:, offset, own - len(calibration) : own] *= calibration.flip(0)
    return rows / (rows.sum(dim=-1, keepdim=True) + _TINY)


def reduced_attention(
    model: Model, ids: Sequence[int], response: Span, *, heads_kept: int = 16, reduction: Reduction = "max"
) -> Values:
    """`_ReducedAttention` of `model` reading `ids`, in the rows of `response`. Raises InputError, ContextError."""
    reader = _ReducedAttention(response, heads_kept=heads_kept, reduction=reduction)
    read_attention(model, ids, reader)
    return reader.result()


def attention_chain(
    reduced: Values,
    answer: Sequence[int],
    stop: Sequence[bool],
    *,
    buffer: int = 3,
    threshold: float = 0.5,
    min_chain: int = 5,
    variant: Variant = "corrected",
) -> list[Link]:
    """Trace an answer back through the attention of a response to the few tokens that it was read from (UQAC, arXiv
    2503.19168).

    The sources are the positions that predict the answer's tokens. Each round sums their weights by token, takes up to
    `buffer` of the best tokens, and continues from the positions that predict those.

    Args:
        reduced: (row, column), the attention of the response's rows (see `reduced_attention`).
        answer: The answer's tokens, as indices in the response.
        stop: (token,) flags of response tokens that are never taken (stop words, punctuation); tokens of the
            instruction are not either.
        buffer: How many tokens a round takes at most.
        threshold: Below this score a token is taken only while the chain is shorter than `min_chain` plus the answer.
        min_chain: Shortest chain without the answer.
        variant: "published" counts the tokens of a round twice towards that length, as the released code does.

    Returns:
        The tokens of the chain with their scores, in order of position.

    Raises:
        InputError: For an answer outside the response.

    Example:
        from reasonscope.analysis.attention.uqac import reduced_attention
        reduced = reduced_attention(model, trace.token_ids, rs.data.Span(trace.n_prompt_tokens, len(trace.token_ids)))
        rs.analysis.attention_chain(reduced, answer=[120, 121], stop=[False] * len(reduced))
    """
    instruction = reduced.shape[1] - reduced.shape[0]
    if not len(answer) or not all(0 <= token < len(reduced) for token in answer):
        raise InputError(f"answer tokens {list(answer)} of a response of {len(reduced)}; give tokens inside it")
    wanted, published = min_chain + len(answer), is_published(variant)
    barred = np.concatenate([np.ones(instruction, dtype=bool), np.asarray(stop, dtype=bool)])
    sources = [token - 1 for token in answer]
    chain = [Link(index=source, score=0.0) for source in sources]
    used: set[int] = set()
    while sources:
        used |= set(sources)
        scores = _scores(reduced, sources, used, barred, instruction, short=len(chain) < wanted)
        taken: list[Link] = []
        for token, score in sorted(scores.items(), key=lambda item: -item[1])[:buffer]:
            length = len(chain) + (len(taken) if published else 0)
            if score < threshold and length >= wanted:
                break
            taken.append(Link(index=token - 1, score=score))
            chain.append(taken[-1])
        sources = [link.index for link in taken]
    return sorted(chain, key=lambda link: link.index)


def _scores(
    reduced: Values, sources: Sequence[int], used: set[int], barred: NDArray[np.bool_], instruction: int, *, short: bool
) -> dict[int, float]:
    """Summed weights by token of the response, over the columns that each source visits."""
    found: dict[int, float] = {}
    for source in sources:
        row = reduced[source] if source >= 0 else np.zeros(reduced.shape[1])
        for visited, column in enumerate(np.argsort(-row, kind="stable")):
            if visited >= _FIRST and not (short and not any(score > 0 for score in found.values())):
                break
            token = int(column) - instruction
            if token == source or token - 1 in used or barred[column] or not row[column] > 0:
                continue
            found[token] = found.get(token, 0.0) + float(row[column])
    return found
