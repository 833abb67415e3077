"""What else a model could have written at each token of a trace, and how a steering vector or a missing head changes
that."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.statistics import chance_above, mean_band, mean_number, null_band
from reasonscope.data.arrays import Values
from reasonscope.data.progress import tracked
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Sentence, Trace
from reasonscope.probes.architecture.heads import Head, all_heads
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit
from reasonscope.probes.evaluation.divergence import kl_divergence
from reasonscope.probes.generation.padding import check_sequence
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.interventions import AblationIntervention
from reasonscope.steering.ablation.targets import Ablation
from reasonscope.steering.vectors.intervention import Intervention, Steering
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector, learned_groups

_ROWS = 256  # tokens per sort of distributions


def alternatives(
    model: Model, trace: Trace, sentences: Sequence[Sentence] = (), *, top: int = 5, seed: int = 0
) -> Result:
    """The log-probability of each generated token, and the likeliest tokens in its place, by reading the trace again.

    Args:
        model: The model.
        trace: The trace, with tokens.
        sentences: Its sentences, over which intervals are resampled (at least two).
        top: How many alternatives to keep.
        seed: Random seed.

    Returns:
        Axes (token,): nats at temperature 1; a token is labelled by its index in the trace. The null is the
        log-probability of what the model itself would draw there, 95 % of its own distribution. `arrays`: `ids` and
        `logprobs` (token, rank) of the `top` likeliest tokens. `numbers`: `pieces`, the text of each of these ids, and
        `first_choice`, the share of tokens that were the likeliest, with its interval.

    Raises:
        InputError: If the trace cannot be fed.
        ContextError: If it exceeds the model's context.

    Example:
        trace = rs.open_run("runs/mine").store.trace("p1/0")
        result = rs.analysis.alternatives(model, trace, rs.sentences(trace))
        result.numbers["first_choice"]
    """
    common: dict[str, Any] = {
        "method": "alternatives",
        "quantity": "log-probability of the token that was written",
        "unit": "nats",
    }
    provenance = {"trace": trace.id, "temperature": 1.0, "top": top, **cut_provenance(sentences)}
    if reason := nothing_written(trace):
        return undefined(**common, reason=reason, axis="token", provenance=provenance)
    logits = _logits(model, trace)
    top = min(top, logits.shape[-1])
    written = torch.as_tensor(trace.token_ids[trace.n_prompt_tokens :], device=logits.device)
    said, ids, best = list[Tensor](), list[Tensor](), list[Tensor]()
    low, high = list[Tensor](), list[Tensor]()
    for start in tracked(range(0, len(logits), _ROWS), "ranking tokens", f"blocks of {_ROWS} tokens"):
        rows = slice(start, start + _ROWS)
        logprobs = logits[rows].float().log_softmax(dim=-1)
        ordered = logprobs.sort(dim=-1, descending=True)
        said.append(logprobs.gather(1, written[rows, None])[:, 0])
        ids.append(ordered.indices[:, :top])
        best.append(ordered.values[:, :top])
        mass = ordered.values.double().exp().cumsum(dim=-1)
        for ends, share in ((high, 0.025), (low, 0.975)):
            at = (mass < share).sum(dim=-1).clamp(max=mass.shape[-1] - 1)
            ends.append(ordered.values.gather(1, at[:, None])[:, 0])
    values = _array(said)
    chosen = torch.cat(ids).cpu().numpy().astype(np.int32)
    return Result(
        **common,
        axes=(_generated(trace),),
        values=values,
        null=Band.of(_array(low), _array(high), values.shape, "what the model would draw there itself, 95 %"),
        arrays={"ids": chosen, "logprobs": _array(best).astype(np.float32)},
        numbers={
            "first_choice": mean_number(
                chosen[:, 0] == trace.token_ids[trace.n_prompt_tokens :], _sentence_of(trace, sentences), seed=seed
            ),
            "pieces": {str(id): model.tokenizer_backend.decode([id], skip_special_tokens=False) for id in np.unique(chosen).tolist()},
        },
        provenance=provenance,
    )  # fmt: skip


def steering_shift(
    model: Model,
    trace: Trace,
    vector: SteeringVector,
    multiplier: float,
    scope: Scope,
    sentences: Sequence[Sentence] = (),
    *,
    name: str = "",
    n_controls: int = 20,
    seed: int = 0,
) -> Result:
    """How a steering vector changes the log-probability of each token of a trace, by reading it again.

    Args:
        model: The model.
        trace: The trace, with tokens.
        vector: The steering vector.
        multiplier: Its strength.
        scope: The tokens at which it is applied.
        sentences: The trace's sentences, over which intervals are resampled (at least two).
        name: A name for the vector in the result.
        n_controls: Random vectors of the same norm, applied in the same way, for the null.
        seed: Random seed.

    Returns:
        Axes (token,): steered minus base log-probability of the written token, nats at temperature 1. `arrays`: `kl`
        (token,), of the steered from the unsteered distribution, and `random` (draw,), the mean change of each control.
        `numbers`: means with intervals, and whether the vector was made from the problem of the trace (None if it does not
        say). The null is the band of the controls. Undefined, with the reason, if the scope has
        none of the trace's tokens.

    Raises:
        InputError: If the trace cannot be fed, or the vector does not fit the model.
        ContextError: If the trace exceeds the model's context.

    Example:
        vector = rs.SteeringVector.load("runs/mine/steering/seal.safetensors")
        result = rs.analysis.steering_shift(model, trace, vector, 1.0, rs.Scope(), rs.sentences(trace))
        result.arrays["kl"].mean()
    """
    common: dict[str, Any] = {
        "method": "steering_shift",
        "quantity": "log-probability of the written token, steered minus base",
        "unit": "nats",
    }
    provenance = {
        "trace": trace.id,
        "vector": name or vector.method,
        "multiplier": multiplier,
        "scope": str(scope.steps or scope.on),
        "seed": seed,
        **cut_provenance(sentences),
    }
    if reason := nothing_written(trace):
        return undefined(**common, reason=reason, axis="token", provenance=provenance)
    plain = _logits(model, trace).float().log_softmax(dim=-1)
    steering = Steering(vector, multiplier, scope)
    moved = _logits(model, trace, steering).float().log_softmax(dim=-1)
    if not steering.n_edited:
        reason = "no token of the trace lies in the vector's scope"
        return undefined(**common, reason=reason, axis="token", provenance=provenance)
    values = _change(plain, moved, trace)
    controls = []
    for draw in tracked(range(n_controls), "steering by random vectors", "vectors"):
        control = Steering(vector.random_like(seed + draw), multiplier, scope)
        controls.append(_change(plain, _logits(model, trace, control).float().log_softmax(dim=-1), trace))
    null = null_band(controls, "random vectors of the same norm")
    owner, learned = _sentence_of(trace, sentences), learned_groups([vector.provenance])
    return Result(
        **common,
        axes=(_generated(trace),),
        values=values,
        null=null,
        arrays={"kl": _kl(moved, plain), "random": np.mean(controls, axis=1)},
        numbers={
            "touched": steering.n_edited,
            "learned_from_the_problem": trace.problem.group in learned["groups"] if learned else None,
            "mean": mean_number(values, owner, seed=seed),
            "share_outside_by_chance": 2 * chance_above(n_controls),
            "share_outside_null": mean_number((values < null.low) | (values > null.high), owner, seed=seed),
        },
        provenance=provenance,
    )


def head_effects(
    model: Model, trace: Trace, sentences: Sequence[Sentence] = (), *, n_controls: int = 5, seed: int = 0
) -> Result:
    """What each attention head contributes to the next tokens: KL(with ‖ without), where "without" sets the head's `z`
    to 0.

    Args:
        model: The model.
        trace: The trace, with tokens.
        sentences: Its sentences, over which intervals are resampled (at least two).
        n_controls: Random directions for the null.
        seed: Random seed.

    Returns:
        Axes (layer, head): mean over the generated tokens in nats, with the 95 % interval. The null adds to `attn_out`,
        at each token, a vector in a random direction, as long as the change that the head's absence makes; the band is
        the range of `n_controls` draws. Undefined, with the reason, for a trace without generated tokens.

    Raises:
        InputError: If the trace cannot be fed.
        ContextError: If it exceeds the model's context.
        SiteError: If the model lacks a site.

    Example:
        trace = rs.open_run("runs/mine").store.trace("p1/0")
        result = rs.analysis.head_effects(model, trace, rs.sentences(trace))
        result.values > result.null.high  # (layer, head)
    """
    common: dict[str, Any] = {
        "method": "head_effects",
        "quantity": "KL of the next tokens without the head",
        "unit": "nats",
    }
    provenance = {"trace": trace.id, "draws": n_controls, "seed": seed, **cut_provenance(sentences)}
    if reason := nothing_written(trace):
        return undefined(**common, reason=reason, provenance=provenance)
    fed = trace.token_ids[:-1].tolist()
    check_sequence(model, fed)
    ids, random = torch.tensor([fed], device=model.device), torch.Generator().manual_seed(seed)

    def read(sites: Sequence[Site], edits: Mapping[Site, Edit]) -> tuple[Tensor, Mapping[Site, Tensor]]:
        out = model.backend.forward(ids, mask=None, read=sites, write=edits)
        return out.logits[0, trace.n_prompt_tokens - 1 :].float().log_softmax(dim=-1), out.activations

    values = np.full((model.n_layers, model.n_heads, len(fed) - trace.n_prompt_tokens + 1), np.nan)
    chance = np.full((n_controls, model.n_layers, model.n_heads), np.nan)
    writes = {layer: Site("attn_out", layer) for layer in model.layers_with_heads}
    plain, with_all = read(list(writes.values()), {})
    every = [(head.layer, head.index) for head in all_heads(model.layout)]
    for layer, head in tracked(every, "reading without each head", "heads"):
        written = writes[layer]
        removed = AblationIntervention(model, Ablation(name="head", heads=(Head(layer=layer, index=head),)))
        without, left = read([written], removed.edits)
        values[layer, head] = _kl(plain, without)
        length = (with_all[written][0] - left[written][0]).float().norm(dim=-1, keepdim=True)
        for draw in range(n_controls):
            noise = torch.randn(with_all[written][0].shape, generator=random)
            noise = torch.nn.functional.normalize(noise, dim=-1).to(length)
            moved, _ = read((), {written: _adding(length * noise)})
            chance[draw, layer, head] = _kl(plain, moved).mean()
    return Result(
        **common,
        axes=(Axis.of("layer", model.n_layers), Axis.of("head", model.n_heads)),
        values=values.mean(axis=-1),
        reason=model.layout.without_heads,
        null=Band.of(
            chance.min(axis=0),
            chance.max(axis=0),
            values.shape[:2],
            f"range of {n_controls} random directions, each token moved as far",
        ),
        interval=mean_band(values, _sentence_of(trace, sentences), seed=seed),
        numbers={"tokens": values.shape[-1]},
        provenance=provenance,
    )


def _sentence_of(trace: Trace, sentences: Sequence[Sentence]) -> NDArray[np.int64]:
    """The sentence of each generated token."""
    return sentence_of_each(sentences, len(trace.token_ids))[trace.n_prompt_tokens :]


def _adding(vectors: Tensor) -> Edit:
    return lambda activation, _: activation + vectors.to(activation)


def _kl(one: Tensor, other: Tensor) -> Values:
    return _array([kl_divergence(one, other)])


def nothing_written(trace: Trace) -> str:
    """Why the trace has no tokens to look at; empty if it has some."""
    if not len(trace.token_ids):
        return "the trace has no tokens; import it with a tokenizer"
    if not 0 < trace.n_prompt_tokens < len(trace.token_ids):
        return "the trace has no prompt or no completion"
    return ""


def _logits(model: Model, trace: Trace, done: Intervention | None = None) -> Tensor:
    """The logits that predict each generated token: (token, vocab)."""
    fed = trace.token_ids[:-1].tolist()
    check_sequence(model, fed)
    ids = torch.tensor([fed], device=model.device)
    if done is None:
        logits = model.backend.forward(ids, mask=torch.ones_like(ids)).logits
    else:
        done.begin([trace.n_prompt_tokens])
        logits = model.backend.forward(ids, mask=torch.ones_like(ids), write=done.edits).logits
    return logits[0, trace.n_prompt_tokens - 1 :]


def with_entropies(model: Model, trace: Trace) -> Trace:
    """The trace with the entropy of each token at its sampling temperature, as `model` reads it; a server measures none."""
    logits = _logits(model, trace)
    temperature = (trace.sampling.temperature if trace.sampling else 1.0) or 1.0
    parts = []
    for start in range(0, len(logits), _ROWS):
        logprobs = (logits[start : start + _ROWS].float() / temperature).log_softmax(dim=-1)
        parts.append(-(logprobs.exp() * logprobs).sum(dim=-1))
    entropies = torch.cat(parts)[: len(trace.token_ids) - trace.n_prompt_tokens]
    return replace(trace, entropies=entropies.detach().cpu().numpy())


def _change(plain: Tensor, moved: Tensor, trace: Trace) -> Values:
    written = torch.as_tensor(trace.token_ids[trace.n_prompt_tokens :], device=plain.device)[:, None]
    return _array([(moved.gather(1, written) - plain.gather(1, written))[:, 0]])


def _generated(trace: Trace) -> Axis:
    return Axis.of("token", range(trace.n_prompt_tokens, len(trace.token_ids)))


def _array(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.asarray(torch.cat(list(parts)).double().cpu().numpy())
