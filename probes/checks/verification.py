"""Are activations of this model read and edited correctly? Checks to run on your own model before you trust any result."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter

import torch
from torch import Tensor

from reasonscope.data.errors import InputError, ReasonscopeError
from reasonscope.data.progress import say, tracked
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.architecture.layout import unreadable
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.backends.hooks import HooksBackend, eager_attention
from reasonscope.probes.generation.activations import replay, run_with_cache
from reasonscope.probes.generation.decoding import Completion, DecodingStep, generate
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.determinism import at_least_float32, in_float32
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.packing import packing

# How much two ways to compute the same activation may differ: the norm of the difference over the norm, at the worst token.
# A few units of rounding in each of some dozens of layers.
_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The same for products of matrices of other shapes, which sum in another order: each block passes on what the one before has rounded.
# With 24 blocks the batch check measured 1.6e-4 in float32 and 3e-15 in float64 (13 units of rounding), so it is rounding.
_OTHER_SHAPES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# For packed weights, the same two: kernels of 4 bits multiply in 16 bits whatever the type of the states is, and layers that round their
# inputs do so by what is in the pass. On SmolLM2-135M the batch check measured .0098 with 4 bit and .135 with LLM.int8().
_PACKED_WEIGHTS, _PACKED_ACTIVATIONS = (_LIMITS[torch.bfloat16], _OTHER_SHAPES[torch.bfloat16]), (0.3, 0.3)
_LENGTHS = (11, 17, 5)
_ADDED: tuple[Point, ...] = ("resid_pre", "attn_out", "mixer_out", "mlp_out", "resid_post")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check.

    Attributes:
        name: What is checked, such as "batch".
        passed: Whether the model passed.
        detail: What was compared, or why the check could not run.
        value: What was measured; None if there is nothing to measure.
        limit: The largest value that passes.
    """

    name: str
    passed: bool
    detail: str
    value: float | None = None
    limit: float | None = None


def verify(model: Model) -> list[Check]:
    """Check that activations of a model are read and edited correctly.

    Checks that compare two computations allow for rounding in the model's dtype. A check that cannot run has failed, and its detail says
    why.

    Args:
        model: The model.

    Returns:
        One result per check.

    Example:
        for check in rs.verify(rs.load_model("organism")):
            print(check.name, check.passed, check.value)
    """
    return [
        _run(name, check, model)
        for name, check in tracked(list(_CHECKS.items()), "verifying", "checks", name=itemgetter(0))
    ]


def _run(name: str, check: Callable[[Model], Check], model: Model) -> Check:
    began = time.monotonic()
    try:
        with torch.no_grad():
            done = check(model)
    except ReasonscopeError as error:
        done = Check(name=name, passed=False, detail=f"{type(error).__name__}: {error}")
    say(f"{name}: {'passed' if done.passed else 'FAILED'} ({time.monotonic() - began:.1f} s)")
    return done


def _measured(name: str, detail: str, value: float, limit: float) -> Check:
    return Check(name=name, passed=value <= limit, detail=detail, value=value, limit=limit)


def _hidden_states(model: Model) -> Check:
    """The hidden states of Hugging Face hold the output of each block; the last one comes after the final norm."""
    ids = torch.tensor([_sequences(model)[0]], device=model.device)
    sites = [Site("resid_pre", 0), *_all(model, "resid_post")]
    _, ours = run_with_cache(model, ids, sites)
    states = model.hf(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    mine = [*(ours[site] for site in sites[:-1]), model.final_norm(ours[sites[-1]])]
    detail = "resid_post.i == hidden_states[i + 1], resid_pre.0 == hidden_states[0], norm(last resid_post) == hidden_states[-1]"
    if torch.equal(states[0], ours[sites[1]]):  # as Mamba lists them
        mine = [*(ours[site] for site in sites[1:]), mine[-1]]
        detail = "resid_post.i == hidden_states[i], norm(last resid_post) == hidden_states[-1]"
    gaps = [_gap(one, theirs) for one, theirs in zip(mine, states, strict=True)]
    return _measured("hidden states", detail, max(gaps), _limit(model))


def _contributions(model: Model) -> Check:
    """Attention, mixer and MLP are all that is added to the stream."""
    sites = [Site(point, i) for point in _ADDED for i in model.layout.layers_with(point)]
    _, seen = run_with_cache(model, _sequences(model)[0], sites)
    value = 0.0
    for layer, block in enumerate(model.layout.of_block):
        here = [at_least_float32(seen[site]) for site in sites if site.layer == layer]
        before, *added, after = here
        value = max(value, _gap(after, sum(added, start=before * block.stream_scale)))
    parts = " + ".join(point for point in _ADDED[:-1] if model.layout.layers_with(point))
    return _measured("contributions", f"{parts} == resid_post in every block", value, _limit(model))


def _heads(model: Model) -> Check:
    """The sum of what the heads write is what attention adds, through the norm after it if there is one."""
    layers = model.layout.layers_with("z")
    if not layers:
        return _nothing_to_do("head writes", "no block has attention heads")
    _, seen = run_with_cache(model, _sequences(model)[0], [Site(p, i) for p in ("z", "attn_out") for i in layers])
    value = max(
        _gap(seen[Site("attn_out", i)], model.layout.attention_of_heads(model.hf, i, seen[Site("z", i)]))
        for i in layers
    )
    after_norm = " after the post-norm" if any(block.has_post_norm for block in model.layout.of_block) else ""
    return _measured(
        "head writes",
        f"sum over heads of z W_O{after_norm} == attn_out in {_blocks(model, layers)}",
        value,
        max(_limit(model), _packed_limits(model)[0]),
    )


def _attention(model: Model) -> Check:
    """Each row of attention is a distribution over the tokens up to its own, minus the share of a sink."""
    layers = model.layout.layers_with("attn_probs")
    if not layers:
        return _nothing_to_do("attention rows", "no block has attention weights")
    _, seen = run_with_cache(model, _sequences(model)[0], [Site("attn_probs", i) for i in layers])
    off, ahead = 0.0, 0.0
    for site in seen:
        probs = at_least_float32(seen[site]).cpu()
        sums, has_sink = probs.sum(dim=-1) - 1, model.layout.of_block[site.layer].sinks
        off = max(off, float(sums.max() if has_sink else sums.abs().max()))
        ahead = max(ahead, float(probs.triu(diagonal=1).abs().max()))
    allowed = "sum to at most 1 (sinks)" if model.layout.sinks else "sum to 1"
    return _measured(
        "attention rows",
        f"attn_probs of {_blocks(model, layers)} {allowed}, and are 0 on keys after the query",
        max(off, ahead),
        _softmax_limit(model),
    )


def _nothing_to_do(name: str, detail: str) -> Check:
    return Check(name=name, passed=True, detail=f"nothing to check: {detail}")


def _blocks(model: Model, layers: Sequence[int]) -> str:
    return "every block" if len(layers) == model.n_layers else f"{len(layers)} of {model.n_layers} blocks"


def _batch(model: Model) -> Check:
    """A sequence reads the same alone and in a batch with longer ones: left-padded as it writes, padded after it as it reads."""
    sequences, sites = _sequences(model), _all(model, "resid_post")
    alone = [replay(model, [sequence], sites)[0] for sequence in sequences]
    ids, mask = left_padded([sequence[:-1] for sequence in sequences], model.device)
    padded = model.backend.forward(ids, mask=mask, last_logits_only=True, read=sites).activations
    rows = [{site: padded[site][row, real == 1] for site in sites} for row, real in enumerate(mask)]
    together = [*zip(rows, alone, strict=True), *zip(replay(model, sequences, sites), alone, strict=True)]
    value = max(_gap(a[site], b[site]) for a, b in together for site in sites)
    return _measured(
        "batch", f"ragged batch of {len(sequences)}, left-padded == one by one", value, _other_limit(model)
    )


def _cache(model: Model) -> Check:
    """Reading token by token with the cache is the same as reading all at once, in a left-padded batch."""
    ids, mask = left_padded(_sequences(model), model.device)
    # Every row has begun: a recurrent state has no mask for padding that is fed one token at a time, and decoding never feeds it.
    sites, half = _all(model, "resid_post"), ids.shape[1] - min(_LENGTHS) + 1
    whole = model.backend.forward(ids, mask=mask, read=sites)
    part = model.backend.forward(ids[:, :half], mask=mask[:, :half], use_cache=True)
    value = 0.0
    for t in range(half, ids.shape[1]):
        part = model.backend.forward(
            ids[:, t : t + 1], mask=mask[:, : t + 1], cache=part.cache, use_cache=True, read=sites
        )
        real = mask[:, t] == 1
        value = max(value, _gap(whole.logits[real, t], part.logits[real, 0]))
        value = max(value, *(_gap(whole.activations[s][real, t], part.activations[s][real, 0]) for s in sites))
    return _measured(
        "cache", "token by token on the KV cache == one pass, logits and every resid_post", value, _other_limit(model)
    )


def _replay(model: Model) -> Check:
    """A replay of finished sequences reads the same activations as decoding did."""
    sites = _all(model, "resid_post")
    written = _generate(model, read=sites)
    replayed = replay(model, [completion.token_ids.tolist() for completion in written], sites)
    value = max(_gap(a.activations[site], b[site]) for a, b in zip(written, replayed, strict=True) for site in sites)
    return _measured("replay", "one teacher-forced pass == capture while decoding", value, _other_limit(model))


def _alone(model: Model) -> Check:
    """A site reads the same alone and together with all others: nothing that was recorded is overwritten later, as by a norm in place."""
    ids = _sequences(model)[0]
    sites = [Site(point, i) for point in (*_ADDED, "z") for i in model.layout.layers_with(point)]
    _, together = run_with_cache(model, ids, sites)
    chosen = sites[:: max(1, len(sites) // 12)]
    value = max(float((run_with_cache(model, ids, [s])[1][s] - together[s]).abs().max()) for s in chosen)
    return _measured(
        "read alone", f"each of {len(chosen)} sites is the same read alone and among all, bit by bit", value, 0.0
    )


def _kernels(model: Model) -> Check:
    """The attention kernel changes nothing but rounding; a mask or a sink that a kernel ignores would change more."""
    if not model.layout.layers_with("attn_out"):
        return _nothing_to_do("attention kernels", "no block has attention")
    # Eager attention takes its softmax in float32, where the mask of float64 is -inf, and NaN spreads from rows of padding alone.
    sequences = _sequences(model)[:1] if model.compute_dtype == torch.float64 else _sequences(model)
    ids, mask = left_padded(sequences, model.device)
    sites, real = _all(model, "resid_post"), mask == 1
    native = HooksBackend(model.hf, model.layout)

    def gaps() -> Tensor:
        own = native.forward(ids, mask=mask, read=sites)
        with eager_attention(model.hf):
            eager = native.forward(ids, mask=mask, read=sites)
        return torch.stack([_gaps(own.activations[s][real], eager.activations[s][real]).cpu() for s in sites])

    name = model.hf.config.get_text_config()._attn_implementation
    detail = f"{name} == eager at every resid_post, left-padded"
    if model.compute_dtype not in (torch.float16, torch.bfloat16):
        limit = max(_softmax_limit(model), _packed_limits(model)[1])
        return _measured("attention kernels", detail, float(gaps().max()), limit)
    # Eager attention rounds its scores to 16 bits, which for large ones (Qwen2.5) hides what a mask would change.
    usual = float(gaps().median())
    with in_float32(model.hf):
        value = float(gaps().max())
    detail += f", in float32 (in {str(model.compute_dtype).removeprefix('torch.')} they differ by {usual:.2g} at the median token)"
    limit = max(0.5, _limit(model)) if unreadable(model.hf, model.layout) else _LIMITS[torch.float32]
    return _measured("attention kernels", detail, value, limit)


def _nothing_left(model: Model) -> Check:
    """A pass gives the same after other passes, among them edited ones and one that raised an error."""

    def edit(activation: Tensor, _: Positions) -> Tensor:
        return activation + 1.0

    def broken(activation: Tensor, _: Positions) -> Tensor:
        raise InputError("intended: a pass that ends in the middle")

    ids, mask = left_padded(_sequences(model), model.device)
    site = Site("resid_post", model.n_layers // 2)
    before = model.backend.forward(ids, mask=mask).logits
    steered = model.backend.forward(ids, mask=mask, write={site: edit}).logits
    with suppress(InputError):
        model.backend.forward(ids, mask=mask, write={site: broken}, read=[site])
    after = model.backend.forward(ids, mask=mask).logits
    value = float((before - after).abs().max())
    if torch.equal(before, steered):
        detail = f"adding 1 at {site} did not change the logits, so edits have no effect"
        return Check(name="independent passes", passed=False, detail=detail)
    return _measured("independent passes", "a pass after edited and failed ones == the one before them", value, 0.0)


def _zero_strength(model: Model) -> Check:
    """Adding 0 changes nothing, to the last bit."""

    def edit(activation: Tensor, _: Positions) -> Tensor:
        return activation + 0.0 * torch.ones_like(activation)

    ids, mask = left_padded(_sequences(model), model.device)
    points: tuple[Point, ...] = ("resid_post", "z", "mixer_out", "mlp_out")
    write = {Site(point, i): edit for point in points for i in model.layout.layers_with(point)}
    plain = model.backend.forward(ids, mask=mask, last_logits_only=True).logits
    edited = model.backend.forward(ids, mask=mask, last_logits_only=True, write=write).logits
    value = float((plain - edited).abs().max())
    return _measured(
        "strength 0",
        "writing 0 · v at every resid_post, z, mixer_out and mlp_out leaves the logits bit-equal",
        value,
        0.0,
    )


def _positions(model: Model) -> Check:
    """An edit sees each token that is fed exactly once, at its own position and with the right activation."""
    met: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    rows: list[int] = []
    site = Site("resid_post", model.n_layers // 2)

    def follow(step: DecodingStep) -> None:
        rows[:] = step.rows.tolist()

    def edit(activation: Tensor, where: Positions) -> Tensor:
        for row, given, index in zip(rows, activation, where.index.tolist(), strict=True):
            for state, at in zip(given, index, strict=True):
                if at >= 0:
                    met[row, at].append(state)
        return activation

    written = _generate(model, write={site: edit}, on_step=follow)
    expected = [(row, at) for row, done in enumerate(written) for at in range(len(done.token_ids) - 1)]
    count = sum(map(len, met.values()))
    detail = f"an edit during generation saw {count} positions of {len(expected)} (prompt + generated − 1)"
    if met.keys() != set(expected) or count != len(expected):
        return Check(name="positions edited", passed=False, detail=detail)
    replayed = replay(model, [done.token_ids.tolist() for done in written], [site])
    value = max(_gap(met[row, at][0], replayed[row][site][at]) for row, at in expected)
    return _measured("positions edited", f"{detail}, each with what a replay reads there", value, _other_limit(model))


def _bos(model: Model) -> Check:
    """A prompt begins with one BOS if the tokenizer adds one, and never with two, even if the text already has one."""
    tokenizer = model.tokenizer
    bos, token = tokenizer.bos_token_id, tokenizer.bos_token
    problems = [Problem(id="bare", prompt="1 + 1 ="), Problem(id="own", prompt=f"{token or ''}1 + 1 =")]
    if tokenizer.chat_template is not None:
        problems.append(Problem(id="chat", messages=(Message(role="user", content="1 + 1 ="),)))
    # Later ones may mark turns.
    counts = [len(list(takewhile(lambda id: id == bos, model.encode_prompt(problem)))) for problem in problems]
    least = int(bos is not None and tokenizer.encode("")[:1] == [bos])
    wrong = sum(not least <= count <= 1 for count in counts)
    found = ", ".join(f"{problem.id} {count}" for problem, count in zip(problems, counts, strict=True))
    detail = f"BOS {token!r} at the beginning, {'1' if least else 'at most 1'} expected: {found}"
    return _measured("one BOS", detail, float(wrong), 0.0)


def _tags(model: Model) -> Check:
    """Which tags mark the thinking block; a model that reasons without tags, or not at all, is read correctly all the same."""
    if model.tags is None:
        detail = "none: neither the tokenizer nor the chat template marks thinking; if the model does, name its tags"
        return Check(name="think tags", passed=True, detail=detail)
    pieces = [len(model.tokenizer.encode(tag, add_special_tokens=False)) for tag in (model.tags.open, model.tags.close)]
    detail = f"{model.tags.open!r} … {model.tags.close!r}, of {pieces[0]} and {pieces[1]} tokens"
    return Check(name="think tags", passed=True, detail=detail)


def _all(model: Model, point: Point) -> list[Site]:
    return [Site(point, layer) for layer in range(model.n_layers)]


def _limit(model: Model) -> float:
    return _LIMITS[model.compute_dtype]


def _other_limit(model: Model) -> float:
    return max(_OTHER_SHAPES[model.compute_dtype], _packed_limits(model)[1])


def _packed_limits(model: Model) -> tuple[float, float]:
    packed = packing(model.hf.config)
    if packed is None:
        return 0.0, 0.0
    return _PACKED_ACTIVATIONS if packed.rounds_activations else _PACKED_WEIGHTS


def _softmax_limit(model: Model) -> float:
    """Eager attention computes its softmax in float32, whatever the dtype of the rest."""
    return max(_limit(model), _LIMITS[torch.float32])


def _gap(a: Tensor, b: Tensor) -> float:
    """The norm of the difference divided by the norm of `b`, at the worst token."""
    return float(_gaps(a, b).max())


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """The same for every token."""
    a, b = at_least_float32(a), at_least_float32(b).to(a.device)
    gaps: Tensor = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)
    return gaps.nan_to_num(nan=torch.inf)


def _sequences(model: Model) -> list[list[int]]:
    """Random tokens in sequences of different lengths. They need no meaning, but must not repeat a pattern."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.hf.config.get_text_config().vocab_size
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _LENGTHS]


def _generate(
    model: Model,
    *,
    read: Sequence[Site] = (),
    write: Mapping[Site, Edit] | None = None,
    on_step: Callable[[DecodingStep], None] | None = None,
) -> list[Completion]:
    sequences = _sequences(model)
    return generate(
        model,
        sequences,
        Sampling(max_new_tokens=6),
        seeds=[0] * len(sequences),
        read=read,
        write=write,
        on_step=on_step,
    )


_CHECKS: dict[str, Callable[[Model], Check]] = {
    "hidden states": _hidden_states,
    "contributions": _contributions,
    "head writes": _heads,
    "attention rows": _attention,
    "batch": _batch,
    "cache": _cache,
    "replay": _replay,
    "read alone": _alone,
    "attention kernels": _kernels,
    "independent passes": _nothing_left,
    "strength 0": _zero_strength,
    "positions edited": _positions,
    "one BOS": _bos,
    "think tags": _tags,
}
