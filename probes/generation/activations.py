"""Activations in memory: of one pass, of finished sequences, or of whatever is run inside a `with` block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.errors import ContextError, InputError, SiteError
from reasonscope.data.trace import Span
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.hooks import eager_attention, hook_site
from reasonscope.probes.backends.site_hooks import SiteHook
from reasonscope.probes.generation.padding import check_vocabulary, left_padded
from reasonscope.probes.generation.span_means import SpanMeans
from reasonscope.probes.models.model import Model


class Capture(Mapping[Site, Tensor]):
    """What the passes inside `capture` read, by site or its name; several passes are joined along their tokens.

    `passes(site)` are the passes one by one: their activations are not joined where batches differ, nor are `attn_probs`,
    whose columns grow.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._passes: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def passes(self, site: Site | str) -> tuple[Tensor, ...]:
        return tuple(self._passes[Site.parse(site)])

    def __getitem__(self, site: Site | str) -> Tensor:
        parts = self.passes(site)
        if not parts:
            raise InputError(f"{site}: no pass was run inside capture; call the model's hf in its block")
        if len(parts) == 1:
            return parts[0]
        if Site.parse(site).point == "attn_probs" or len({part.shape[0] for part in parts}) > 1:
            raise InputError(
                f"{site}: its {len(parts)} passes differ in shape and cannot be joined; use passes({str(site)!r})"
            )
        return torch.cat(parts, dim=1)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._passes)

    def __len__(self) -> int:
        return len(self._passes)


@contextmanager
def capture(model: Model, sites: Sequence[Site | str]) -> Iterator[Capture]:
    """Collect `sites` of every pass of `model.hf` in the block: a call, `hf.generate`, a training step.

    Reads with native hooks, whichever backend the model has. Reading `attn_probs` sets attention to eager for the block.
    Rows of padding are there too. Raises SiteError for a site that the model does not have.
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
    """One pass over a text, token ids, or a batch of ids (batch, token): logits (batch, token, vocab) and `sites`.

    A text is encoded as `Model.encode_text` does, with one BOS at most. Raises ContextError where it is too long.
    """
    if isinstance(prompt, str):
        prompt = model.encode_text(prompt)
    ids = torch.as_tensor(prompt, dtype=torch.long, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids
    _check(model, ids.tolist())
    read = tuple(Site.parse(site) for site in sites)
    out = model.backend.forward(ids, mask=torch.ones_like(ids), read=read)
    return out.logits, dict(out.activations)


def replay(
    model: Model,
    sequences: Sequence[Sequence[int]],
    sites: Sequence[Site],
    *,
    spans: Sequence[Sequence[Span]] | None = None,
) -> list[dict[Site, Tensor]]:
    """Feed finished sequences in one batch, teacher-forced; of each, what stood at `sites` in the model's dtype.

    Rows are those of a capture while decoding: every token but the last, which was never fed back. `attn_probs` come as
    (head, query, key), all else with rows first. Equal to a capture while decoding up to rounding.

    `spans` of each sequence ask for means over rows instead, (span, …): sentences, or single rows as spans of one. They are taken
    where the model runs, so that nothing else is kept, or sent back from another machine. Raises InputError, ContextError, SiteError.
    """
    fed = [sequence[:-1] for sequence in sequences]
    _check(model, fed)
    ids, mask = left_padded(fed, model.device)
    padding = [ids.shape[1] - len(sequence) for sequence in fed]
    reduce = None if spans is None else _span_means(fed, sites, spans, padding)
    seen = model.backend.forward(ids, mask=mask, last_logits_only=True, read=sites, reduce=reduce).activations
    if reduce is not None:
        ends = np.cumsum([0, *map(len, reduce.spans)]).tolist()
        return [{site: seen[site][a:b] for site in sites} for a, b in pairwise(ends)]
    return [
        {site: seen[site][row][:, n:, n:] if site.point == "attn_probs" else seen[site][row, n:] for site in sites}
        for row, n in enumerate(padding)
    ]


def _span_means(
    fed: Sequence[Sequence[int]], sites: Sequence[Site], spans: Sequence[Sequence[Span]], padding: Sequence[int]
) -> SpanMeans:
    if len(spans) != len(fed):
        raise InputError(f"{len(fed)} sequences but spans of {len(spans)}; give the spans of each")
    for site in sites:
        if site.point == "attn_probs":
            raise SiteError(f"{site}: means over the rows of attention hide where they look; leave spans away")
    for i, (sequence, row) in enumerate(zip(fed, spans, strict=True)):
        if wrong := [span for span in row if not 0 <= span.start < span.stop <= len(sequence)]:
            raise InputError(f"{wrong[0]} of sequence {i}: spans are not empty and lie within its {len(sequence)} rows")
    return SpanMeans.of(spans, padding)


def _check(model: Model, sequences: Sequence[Sequence[int]]) -> None:
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) < 1:
        raise InputError("there is a sequence without a token to feed; at least one is needed")
    if max(lengths) > model.context_length:
        raise ContextError(
            f"a sequence of {max(lengths)} tokens; the context of {model.name} holds {model.context_length}"
        )
    check_vocabulary(sequences, model.vocabulary)
