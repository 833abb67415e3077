"""Activations in memory: of one pass, of finished sequences, or of every pass inside a `with` block; and their means over spans."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.errors import ContextError, InputError, SiteError
from reasonscope.data.trace import Span
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.attached import is_attached
from reasonscope.probes.backends.base import Edit
from reasonscope.probes.backends.hooks import eager_attention, hook_site
from reasonscope.probes.backends.site_hooks import SiteHook
from reasonscope.probes.generation.padding import check_vocabulary, left_padded
from reasonscope.probes.models.model import Model


class Capture(Mapping[Site, Tensor]):
    """The activations of the passes inside a `capture` block, by site or by the name of a site.

    `found["resid_post.3"]` is (batch, token, …), with several passes joined along their tokens. `passes(site)` gives the passes one by one,
    also if their batches differ, or for `attn_probs`, whose columns grow; such passes cannot be joined.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._passes: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def passes(self, site: Site | str) -> tuple[Tensor, ...]:
        return tuple(self._passes[Site.parse(site)])

    def __getitem__(self, site: Site | str) -> Tensor:
        parts = self.passes(site)
        if not parts:
            raise InputError(f"no activations of {site}: run the model (model.hf) inside the capture block")
        if len(parts) == 1:
            return parts[0]
        if Site.parse(site).point == "attn_probs" or len({part.shape[0] for part in parts}) > 1:
            raise InputError(
                f"the {len(parts)} passes of {site} differ in shape and cannot be joined; use passes({str(site)!r})"
            )
        return torch.cat(parts, dim=1)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._passes)

    def __len__(self) -> int:
        return len(self._passes)


@contextmanager
def capture(model: Model, sites: Sequence[Site | str]) -> Iterator[Capture]:
    """Record activations of every pass of `model.hf` inside the block: a call, `hf.generate`, a training step.

    This always uses native hooks, whatever backend the model has. Rows of padding are included. With `attn_probs`, attention is eager
    inside the block.

    Args:
        model: The model.
        sites: Sites or their names.

    Yields:
        A `Capture`, which fills while the block runs.

    Raises:
        SiteError: If the model has no such site.

    Example:
        with rs.capture(model, ["resid_post.3"]) as found:
            model.hf(model.tokenizer("1 + 1 =", return_tensors="pt").input_ids)
        print(found["resid_post.3"].shape)  # (batch, token, d_model)
    """
    wanted = tuple(dict.fromkeys(Site.parse(site) for site in sites))
    seen = Capture(wanted)
    with ExitStack() as stack:
        if any(site.point == "attn_probs" for site in wanted):
            stack.enter_context(eager_attention(model.hf))
        for site in wanted:
            stack.enter_context(hook_site(model.hf, model.layout, site, _appending(seen._passes[site])))
        yield seen


def _appending(passes: list[Tensor]) -> SiteHook:
    def touch(activation: Tensor) -> Tensor:
        passes.append(activation)
        return activation

    return touch


def run_with_cache(
    model: Model, prompt: str | Sequence[int] | Tensor, sites: Sequence[Site | str]
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Run one pass over a text and record activations.

    Args:
        model: The model.
        prompt: A text, which is encoded with one BOS at most; token ids; or a batch of ids (batch, token).
        sites: Sites or their names; `attn_probs` is allowed.

    Returns:
        The logits (batch, token, vocab), and by site the activations (batch, token, …).

    Raises:
        InputError: If a token is outside the vocabulary.
        ContextError: If the text is longer than the context.
        SiteError: If the model has no such site.

    Example:
        logits, found = rs.probes.run_with_cache(model, "1 + 1 =", ["resid_post.3", "attn_probs.0"])
        print(found[rs.Site("attn_probs", 0)].shape)  # (batch, head, query, key)
    """
    if isinstance(prompt, str):
        prompt = model.encode_text(prompt)
    ids = torch.as_tensor(prompt, dtype=torch.long, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids
    _check(model, ids.cpu().numpy())
    read = tuple(Site.parse(site) for site in sites)
    out = model.backend.forward(ids, mask=torch.ones_like(ids), read=read)
    return out.logits, dict(out.activations)


def replay(
    model: Model,
    sequences: Sequence[Sequence[int]],
    sites: Sequence[Site],
    *,
    spans: Sequence[Sequence[Span]] | None = None,
    write: Mapping[Site, Edit] | None = None,
) -> list[dict[Site, Tensor]]:
    """Feed finished sequences in one batch, and record their activations. This equals recording while decoding, up to rounding.

    Args:
        model: The model.
        sequences: Token ids of each sequence. The last token of each is not fed, as in decoding.
        sites: What to record.
        spans: Spans of rows of each sequence, such as its sentences, whose means are returned instead of all rows. They are computed on
            the device or machine of the model, so that nothing else has to be kept or sent.
        write: Edits by site, as the sequences were written with them; see `Intervention.begin`.

    Returns:
        By sequence and site, (token − 1, …) in the model's dtype, (head, query, key) for `attn_probs`, or (span, …) with `spans`.

    Raises:
        InputError: If a sequence is empty or has tokens outside the vocabulary, or if spans do not fit.
        ContextError: If a sequence is longer than the context.
        SiteError: If the model has no such site, or means of `attn_probs` are asked for.

    Example:
        (seen,) = rs.probes.replay(model, [trace.token_ids.tolist()], [rs.Site("resid_post", 3)])
        print(seen[rs.Site("resid_post", 3)].shape)  # (token - 1, d_model)
    """
    fed = [sequence[:-1] for sequence in sequences]
    _check(model, fed)
    lengths = [len(sequence) for sequence in fed]
    if write or is_attached(model.hf):  # edits tell tokens from padding by the mask
        ids, mask = left_padded(fed, model.device)
        starts = [ids.shape[1] - n for n in lengths]
    else:
        ids, mask, starts = _right_padded(fed, model.device), None, [0] * len(fed)
    reduce = None if spans is None else _span_means(fed, sites, spans, starts)
    seen = model.backend.forward(
        ids, mask=mask, last_logits_only=True, read=sites, write=write, reduce=reduce
    ).activations
    if reduce is not None:
        ends = np.cumsum([0, *map(len, reduce.spans)]).tolist()
        return [{site: seen[site][a:b] for site in sites} for a, b in pairwise(ends)]
    own = [slice(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    return [
        {site: seen[site][row][:, at, at] if site.point == "attn_probs" else seen[site][row, at] for site in sites}
        for row, at in enumerate(own)
    ]


def _right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """`sequences` as one batch (batch, token) with 0 after the shorter ones. No real token attends to what comes after it, so a pass over
    whole sequences needs no mask, and kernels are faster without."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(ids).to(device)


@dataclass(frozen=True, kw_only=True)
class _SpanMeans:
    """Means over spans of tokens: (batch, token, …) becomes (span, …), with the spans of the first row first.

    `spans` are (start, stop) columns of the batch for each row, as plain numbers that can be sent to another machine. A mean
    is computed in float32 and returned in the dtype of the activations; a span of one token is that token, bit by bit.
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, spans: Sequence[Sequence[Span]], padding: Sequence[int]) -> "_SpanMeans":
        """From spans that count from the first token of each sequence, which comes after `padding` columns."""
        return cls(
            spans=tuple(
                tuple((span.start + n, span.stop + n) for span in row) for row, n in zip(spans, padding, strict=True)
            )
        )

    def __call__(self, activation: Tensor) -> Tensor:
        means = [
            activation[row, start:stop].float().mean(dim=0)
            for row, kept in enumerate(self.spans)
            for start, stop in kept
        ]
        if not means:
            return activation[:, 0][:0]
        return torch.stack(means).to(activation.dtype)


def _span_means(
    fed: Sequence[Sequence[int]], sites: Sequence[Site], spans: Sequence[Sequence[Span]], padding: Sequence[int]
) -> _SpanMeans:
    if len(spans) != len(fed):
        raise InputError(f"{len(fed)} sequences, but spans of {len(spans)}; give spans for each sequence")
    for site in sites:
        if site.point == "attn_probs":
            raise SiteError(f"means of {site} would hide where attention goes; leave out spans")
    for i, (sequence, row) in enumerate(zip(fed, spans, strict=True)):
        if wrong := [span for span in row if not 0 <= span.start < span.stop <= len(sequence)]:
            raise InputError(
                f"invalid {wrong[0]} of sequence {i}: a span has to lie within its {len(sequence)} rows, and must not be empty"
            )
    return _SpanMeans.of(spans, padding)


def _check(model: Model, sequences: Sequence[Sequence[int]] | NDArray[np.int64]) -> None:
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) < 1:
        raise InputError("a sequence has no token to feed; give at least two tokens, of which the last is not fed")
    if max(lengths) > model.context_length:
        raise ContextError(
            f"a sequence of {max(lengths)} tokens; the context of {model.name} holds {model.context_length}"
        )
    check_vocabulary(sequences, model.vocabulary)
