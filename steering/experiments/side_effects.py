"""Side effects of an intervention: repetition and form of what was written, and how far the predictions of the model moved."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import working
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.trace import Span, Trace
from reasonscope.probes.evaluation.divergence import kl_divergence
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.intervention import Composed, Intervention, Steering, parts_of

_BATCH_VALUES = 2**27  # logits of one batch: 0.5 GB in float32

# Feeds whole sequences (ids, mask, prompt lengths) and returns logits (batch, token, vocab).
LogitsFunction: TypeAlias = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class _Divergence:
    """How an intervention changes the prediction of given tokens; sums over the tokens of each trace, all (trace,).

    Attributes:
        nll: Negative log-likelihood with the intervention, in nats.
        nll_unchanged: The same without it.
        kl: KL(unchanged ‖ changed) of the next token at temperature 1, in nats.
        n_tokens: How many tokens were summed over.
    """

    nll: Values
    nll_unchanged: Values
    kl: Values
    n_tokens: Values


def repeated_ngrams(ids: Sequence[int], n: int = 4) -> float:
    """The share of `n`-grams of tokens that repeat an earlier one of the same text; 0 for a text shorter than that."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression_ratio(text: str) -> float:
    """Bytes of the text over its bytes compressed by zlib: about 2 to 4 for prose, far more for loops; 1 for an empty text."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else 1.0


def is_well_formed_answer(trace: Trace) -> bool:
    """Whether a completion ended by itself, closed its thinking, and can be read: it has a final answer if the problem has a gold answer,
    else it clearly refuses or complies."""
    if trace.finish_reason == "length" or trace.state == "truncated":
        return False
    return trace.final_answer is not None if trace.problem.answer is not None else behaviour(trace) != "unclear"


def generated(trace: Trace) -> Span:
    """The tokens that the model wrote."""
    return Span(trace.n_prompt_tokens, len(trace.token_ids))


def logits_function(model: Model, intervention: Intervention | None) -> LogitsFunction:
    """Forward passes over whole sequences under an intervention; None is the unchanged model."""

    def read(ids: Tensor, mask: Tensor, n_prompt: Sequence[int]) -> Tensor:
        if intervention is None:
            return model.backend.forward(ids, mask=mask).logits
        intervention.begin(n_prompt)
        return model.backend.forward(ids, mask=mask, write=intervention.edits).logits

    return read


def read_under(model: Model, intervention: Intervention, traces: Sequence[Trace]) -> None:
    """Let vectors edit finished texts as they edited them while they were written, so that these count their tokens and distances."""
    steering = [one for one in parts_of(intervention) if isinstance(one, Steering)]
    if not steering:
        return
    together = Composed(*steering)
    for batch in batches(model, traces):
        together.begin([traces[i].n_prompt_tokens for i in batch])
        replay(model, [traces[i].token_ids.tolist() for i in batch], (), write=together.edits)


def divergences(
    model: Model,
    traces: Sequence[Trace],
    readers: Sequence[LogitsFunction | None],
    spans: Mapping[str, Callable[[Trace], Span | NDArray[np.int64]]],
) -> list[dict[str, _Divergence]]:
    """How each reader predicts the tokens of finished traces, compared with the unchanged model.

    `spans` choose tokens of each trace (a span or positions), never its first one; a reader None is the unchanged model itself. One
    dictionary per reader, by the names of the spans; a trace with an empty span has 0 tokens there.
    """
    sums = [{name: np.zeros((4, len(traces))) for name in spans} for _ in readers]
    with working("reading again", total=len(traces) * len(readers), unit="texts") as work:
        for batch in batches(model, traces):
            ids, mask = left_padded([traces[i].token_ids.tolist() for i in batch], model.device)
            plain = model.backend.forward(ids, mask=mask).logits
            for read, of_reader in zip(readers, sums, strict=True):
                changed = plain if read is None else read(ids, mask, [traces[i].n_prompt_tokens for i in batch])
                for row, i in enumerate(batch):
                    padding = ids.shape[1] - len(traces[i].token_ids)
                    for name, span in spans.items():
                        at = padding + _positions(span(traces[i]))
                        # The position before a token predicts it.
                        of_reader[name][:, i] = _sums(plain[row, at - 1], changed[row, at - 1], ids[row, at])
                work.advance(len(batch))
    return [
        {name: _Divergence(nll=a, nll_unchanged=b, kl=c, n_tokens=d) for name, (a, b, c, d) in of_reader.items()}
        for of_reader in sums
    ]


def _positions(span: Span | NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.arange(span.start, span.stop) if isinstance(span, Span) else span)


def _sums(plain: Tensor, changed: Tensor, targets: Tensor) -> tuple[float, float, float, float]:
    with torch.no_grad():
        p, q = plain.float().log_softmax(dim=-1), changed.float().log_softmax(dim=-1)
        at = targets[:, None].to(q.device)
        kl = kl_divergence(p, q).double().sum()
        return -float(q.gather(1, at).double().sum()), -float(p.gather(1, at).double().sum()), float(kl), len(targets)


def batches(model: Model, traces: Sequence[Trace]) -> Iterator[list[int]]:
    """Batches of traces of similar length, as many as their logits allow. Raises InputError for one without prompt or completion."""
    lengths = [len(trace.token_ids) for trace in traces]
    if any(trace.n_prompt_tokens == n or not trace.n_prompt_tokens for trace, n in zip(traces, lengths, strict=True)):
        raise InputError("a trace has no prompt or no generated token; leave it out")
    order, batch = sorted(range(len(traces)), key=lengths.__getitem__), list[int]()
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] * model.vocabulary > _BATCH_VALUES:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
