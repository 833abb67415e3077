"""What an intervention does beside what it is for: repetition and form of what was written, and how far the model itself was moved."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import working
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.trace import Span, Trace
from reasonscope.probes.evaluation.divergence import kl_divergence
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.intervention import Intervention

_BATCH_VALUES = 2**27  # logits of one batch: 0.5 GB in float32

# Reads whole sequences (ids, mask, prompt lengths) and gives the logits (batch, token, vocab).
LogitsFunction: TypeAlias = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How an intervention changes what the model says of given tokens, a row a trace; sums over the `n_tokens` of each.

    `nll`, `nll_unchanged`: negative log-likelihood in nats with the intervention and without; `kl`: KL(unchanged ‖ changed) of the next
    token in nats, at temperature 1.
    """

    nll: Values
    nll_unchanged: Values
    kl: Values
    n_tokens: Values


def repeated_ngrams(ids: Sequence[int], n: int = 4) -> float:
    """The share of the `n`-grams of tokens that stood before in the same text; 0 where there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression_ratio(text: str) -> float:
    """Bytes of the text over its bytes behind zlib: about 2 to 4 for prose, far more for loops; 1 for an empty text."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else 1.0


def is_well_formed_answer(trace: Trace) -> bool:
    """Whether a completion ended by itself with its thinking closed and an answer that can be read: a final answer where there is a gold
    one, else one that clearly refuses or complies."""
    if trace.finish_reason == "length" or trace.state == "truncated":
        return False
    return trace.final_answer is not None if trace.problem.answer is not None else behaviour(trace) != "unclear"


def generated(trace: Trace) -> Span:
    """The tokens that the model wrote."""
    return Span(trace.n_prompt_tokens, len(trace.token_ids))


def logits_function(model: Model, intervention: Intervention | None) -> LogitsFunction:
    """Passes over whole sequences under an intervention; None is the unchanged model."""

    def read(ids: Tensor, mask: Tensor, n_prompt: Sequence[int]) -> Tensor:
        if intervention is None:
            return model.backend.forward(ids, mask=mask).logits
        intervention.begin(n_prompt)
        return model.backend.forward(ids, mask=mask, write=intervention.edits).logits

    return read


def divergences(
    model: Model,
    traces: Sequence[Trace],
    readers: Sequence[LogitsFunction | None],
    spans: Mapping[str, Callable[[Trace], Span]],
) -> list[dict[str, Divergence]]:
    """Teacher-forced: the tokens of `traces` in each of the `spans` (none of which holds the first token), read by each of `readers` and
    by the unchanged model. A reader None is the unchanged model itself; a trace whose span is empty has 0 tokens there."""
    sums = [{name: np.zeros((4, len(traces))) for name in spans} for _ in readers]
    with working("reading again", total=len(traces) * len(readers), unit="texts") as work:
        for batch in _batches(model, traces):
            ids, mask = left_padded([traces[i].token_ids.tolist() for i in batch], model.device)
            plain = model.backend.forward(ids, mask=mask).logits
            for read, of_reader in zip(readers, sums, strict=True):
                changed = plain if read is None else read(ids, mask, [traces[i].n_prompt_tokens for i in batch])
                for row, i in enumerate(batch):
                    padding = ids.shape[1] - len(traces[i].token_ids)
                    for name, span in spans.items():
                        at = slice(padding + span(traces[i]).start, padding + span(traces[i]).stop)
                        before = slice(at.start - 1, at.stop - 1)  # what predicts a token stands before it
                        of_reader[name][:, i] = _sums(plain[row, before], changed[row, before], ids[row, at])
                work.advance(len(batch))
    return [
        {name: Divergence(nll=a, nll_unchanged=b, kl=c, n_tokens=d) for name, (a, b, c, d) in of_reader.items()}
        for of_reader in sums
    ]


def _sums(plain: Tensor, changed: Tensor, targets: Tensor) -> tuple[float, float, float, float]:
    with torch.no_grad():
        p, q = plain.float().log_softmax(dim=-1), changed.float().log_softmax(dim=-1)
        at = targets[:, None].to(q.device)
        kl = kl_divergence(p, q).double().sum()
        return -float(q.gather(1, at).double().sum()), -float(p.gather(1, at).double().sum()), float(kl), len(targets)


def _batches(model: Model, traces: Sequence[Trace]) -> Iterator[list[int]]:
    """Traces of like length together, as many as their logits allow. Raises InputError for one without prompt or completion."""
    lengths = [len(trace.token_ids) for trace in traces]
    if any(trace.n_prompt_tokens == n or not trace.n_prompt_tokens for trace, n in zip(traces, lengths, strict=True)):
        raise InputError("a trace has no prompt or no generated token to be read again; leave it out")
    order, batch = sorted(range(len(traces)), key=lengths.__getitem__), list[int]()
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] * model.vocabulary > _BATCH_VALUES:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
