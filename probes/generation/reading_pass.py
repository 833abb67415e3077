"""The pass that reads the activations of finished traces, and the scores of tokens that nobody has measured yet."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.steered import Steered
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.unembedding import Unembedding, token_scores

_READ_TOKENS = 4096  # of one pass that reads activations, with padding


def read_traces(
    reader: Model, traces: Sequence[Trace], sites: Sequence[Site], steered: Steered | None = None
) -> tuple[list[Trace], list[dict[Site, Tensor]]]:
    """Read traces of similar length together, and so few that neither padding nor memory of the accelerator grows with the batch.

    A steered model is steered as it was while it wrote: it sees the same tokens, so the same ones are edited. Traces that were written
    elsewhere come back with the log-probabilities and entropies that `reader` has at their tokens.
    """
    edits = steered.edits if steered else None
    found: dict[int, tuple[Trace, dict[Site, Tensor]]] = {}

    def read(group: Sequence[int]) -> None:
        chosen = [traces[j] for j in group]
        if edits:
            edits.begin([trace.n_prompt_tokens for trace in chosen])
        with _final_states(reader, [] if edits else chosen) as kept:
            seen = replay(
                reader,
                [trace.token_ids.tolist() for trace in chosen],
                sites,
                write=edits.edits if edits else None,
            )
        seen = [{site: states.cpu() for site, states in one.items()} for one in seen]  # frees the accelerator
        scored = _scored(reader, chosen, kept)
        found.update(zip(group, zip(scored, seen, strict=True), strict=True))

    group: list[int] = []
    for i in sorted(range(len(traces)), key=lambda i: len(traces[i].token_ids)):
        if group and (len(group) + 1) * len(traces[i].token_ids) > _READ_TOKENS:
            read(group)
            group = []
        group.append(i)
    read(group)
    return [found[i][0] for i in range(len(traces))], [found[i][1] for i in range(len(traces))]


@contextmanager
def _final_states(reader: Model, traces: Sequence[Trace]) -> Iterator[list[Tensor]]:
    """Inside, keep what the last norm gives (batch, token, d_model) and the last logits (batch, vocab) of the pass.

    Nothing is kept if the traces have the scores of their tokens already, or if the weights are elsewhere.
    """
    kept: list[Tensor] = []
    norm = reader.layout.final_norm
    scored = all(trace.entropies is not None and np.isfinite(trace.entropies).all() for trace in traces)
    if scored or norm is None or reader.backend.name != "hooks":
        yield kept
        return
    with ExitStack() as hooks:
        for module in (reader.hf.get_submodule(norm), reader.hf):
            handle = module.register_forward_hook(
                lambda _module, _given, out: kept.append(out if isinstance(out, Tensor) else out.logits[:, -1])
            )
            hooks.callback(handle.remove)
        yield kept


@torch.inference_mode()
def _scored(reader: Model, traces: Sequence[Trace], kept: Sequence[Tensor]) -> list[Trace]:
    """The traces with log-probabilities and entropies of their tokens; unchanged if the model does more than unembed (a scale)."""
    if not kept:
        return list(traces)
    states, logits = kept
    unembedding = Unembedding.of(reader)
    if not torch.allclose(unembedding.logits(states[:, -1]), logits.float(), rtol=1e-2, atol=1e-2):
        return list(traces)
    return [_with_scores(unembedding, trace, row) for trace, row in zip(traces, states, strict=True)]


def _with_scores(unembedding: Unembedding, trace: Trace, states: Tensor) -> Trace:
    start = max(trace.n_prompt_tokens, 1)  # nothing comes before the first token, so its score is unknown
    ids = torch.as_tensor(trace.token_ids[start:], device=states.device)
    if not len(ids):
        return trace
    temperature = trace.sampling.temperature if trace.sampling else 1.0
    before = states[start - 1 : len(trace.token_ids) - 1]  # `replay` pads after the tokens
    unknown = np.full(start - trace.n_prompt_tokens, np.nan, dtype=np.float32)
    logprobs, entropies = (
        np.concatenate([unknown, scores.numpy(force=True)])
        for scores in token_scores(unembedding, before, ids, temperature=temperature)
    )
    return replace(trace, logprobs=logprobs, entropies=entropies)
