"""What a sentence passes on: another one in its place, every later sentence read again, and how far its words move."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from reasonscope.analysis.anchors.rollouts import Continuation, continuation
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.analysis.tokens.forced_answers import Decoder, Encoder
from reasonscope.analysis.tokens.vocabulary import Unembedding, kl_from_hidden
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.parse import THINK, ThinkTags
from reasonscope.data.trace import Sampling, Sentence, Trace
from reasonscope.probes.generation.branches import Branch, Writer
from reasonscope.probes.generation.rollout import trace_seed
from reasonscope.probes.models.model import Model

METHOD, QUANTITY = "replacement", "divergence of a sentence after another was replaced"

# Other texts to stand where each sentence (by its index) stands.
ResampledAlternatives = Mapping[int, Sequence[str]]


def resampled_alternatives(
    sentences: Sequence[Sentence], continuations: Mapping[int, Sequence[Continuation]], *, most: int = 4
) -> dict[int, tuple[str, ...]]:
    """What the model itself wrote first in place of each sentence and is not that sentence, the most frequent first, `most` at most."""
    found = {}
    for i, sentence in enumerate(sentences):
        first = [row.sentences[0].strip() for row in continuations.get(i, ()) if row.sentences]
        others = [text for text in first if text and text != sentence.text.strip()]
        found[i] = tuple(sorted(set(others), key=lambda text: (-others.count(text), text))[:most])
    return found


def replaced_rollouts(
    writer: Writer,
    trace: Trace,
    sentences: Sequence[Sentence],
    alternatives: ResampledAlternatives,
    encode: Encoder,
    decode: Decoder,
    sampling: Sampling,
    *,
    samples: int = 20,
    tags: ThinkTags = THINK,
) -> dict[int, list[Continuation]]:
    """Continuations of a trace behind an alternative in each sentence's place, `samples` each, dealt out over its alternatives.

    With `sentence_effects(…, without=…)` the counterfactual importance of sentences for sentences where the model itself hardly ever
    writes anything else. A sentence without an alternative has none.
    """
    ids = trace.token_ids.tolist()
    places, branches = [], []
    for i, texts in alternatives.items():
        span = sentences[i].tokens
        for k in range(samples if texts else 0):
            stub = tuple(_in_place(decode(ids[span.slice]), texts[k % len(texts)], encode))
            seed = trace_seed(sampling.seed, f"{trace.id}/replaced/{i}/{k}")
            branches.append(Branch(cut=span.start, stub=stub, seed=seed))
            places.append(i)
    found: dict[int, list[Continuation]] = {i: [] for i in dict.fromkeys(places)}
    for i, done in zip(places, writer(ids, branches, sampling), strict=True):
        found[i].append(continuation(done, decode, tags))
    return found


def _in_place(written: str, text: str, encode: Encoder) -> list[int]:
    """Tokens of `text` with the white space that stood around what was written there."""
    start, stop = len(written) - len(written.lstrip()), len(written.rstrip())
    return encode(written[:start] + text + written[stop:])


def replacement_effects(
    model: Model,
    trace: Trace,
    sentences: Sequence[Sentence],
    alternatives: ResampledAlternatives,
    encode: Encoder,
    decode: Decoder,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Result:
    """How far each later sentence's next-token distributions move when a sentence says something else: axes (target, source), nats.

    The mean over alternatives and over the target's tokens of KL(as it was ‖ with the alternative in the source's place), everything
    between them as it was: what the source passes on directly, and not by way of what would then have been written. Null: the same
    with another sentence of the thinking, drawn at random, in the source's place, 95 % of all pairs: an effect of any odd sentence.
    `numbers`: `replaced`, how many alternatives each source had. NaN where target ≤ source and for a source without an alternative; a
    state for fewer than two sentences or without any alternative. Raises InputError for a trace without tokens or of another vocabulary.

    The counterfactual of Thought Anchors (arXiv 2506.19143, section 3) between sentences, with two departures: the text behind the
    source is read and not written anew, so that no rollout is needed and small effects are seen; and effects are of sentences on
    sentences, where the paper's default is of sentences on the answer.
    """
    common: dict[str, Any] = {"method": METHOD, "quantity": QUANTITY, "unit": "nats"}
    provenance = {"trace": trace.id, "temperature": temperature, "seed": seed, **cut_provenance(sentences)}
    counts = [len(alternatives.get(i, ())) for i in range(len(sentences))]
    if len(sentences) < 2 or not any(counts):
        reason = "fewer than two sentences" if len(sentences) < 2 else "no sentence has an alternative"
        return undefined(**common, reason=reason, provenance=provenance)
    if not len(trace.token_ids):
        raise InputError(f"trace {trace.id!r} has no tokens; import it with the model's tokenizer")
    read = _Reader(model, trace, sentences, encode, decode, temperature)
    rng = np.random.default_rng(seed)
    texts = [sentence.text.strip() for sentence in sentences]
    odd = {i: tuple(rng.permutation([t for t in texts if t != texts[i]])[:1]) for i, n in enumerate(counts) if n}
    values, chance = (_effects(read, given, len(sentences)) for given in (alternatives, odd))
    low, high = np.nanquantile(chance, [0.025, 0.975])
    return Result(
        **common,
        axes=(Axis.of("target", len(sentences)), Axis.of("source", len(sentences))),
        values=values,
        null=Band.of(low, high, values.shape, "any other sentence of the thinking in its place, 95 % of all pairs"),
        reason="no effect on itself or on what stands before; a sentence without an alternative has none at all",
        numbers={"replaced": counts, "texts": texts, "tags": [sentence.tag for sentence in sentences]},
        provenance=provenance,
    )


def _effects(read: Callable[[int, str], Values], alternatives: ResampledAlternatives, n: int) -> Values:
    found = np.full((n, n), np.nan)
    for source, texts in alternatives.items():
        if texts and source < n - 1:
            found[:, source] = np.mean([read(source, text) for text in texts], axis=0)
    return found


class _Reader:
    """The divergences of a trace's sentences with one text in place of one of them; the trace as it was is read once."""

    def __init__(
        self,
        model: Model,
        trace: Trace,
        sentences: Sequence[Sentence],
        encode: Encoder,
        decode: Decoder,
        temperature: float,
    ) -> None:
        self._model, self._encode, self._decode, self._temperature = model, encode, decode, temperature
        self._spans = [sentence.tokens for sentence in sentences]
        self._ids = trace.token_ids[: self._spans[-1].stop].tolist()
        self._unembedding = Unembedding.of(model)
        self._plain = self._states(self._ids)

    def __call__(self, source: int, text: str) -> Values:
        """(target,) in nats; NaN up to the source."""
        span = self._spans[source]
        put = _in_place(self._decode(self._ids[span.slice]), text, self._encode)
        changed = self._states([*self._ids[: span.start], *put, *self._ids[span.stop :]])
        # Predicting the token at t is the state at t − 1.
        behind = len(self._ids) - span.stop + 1
        with torch.no_grad():
            kl = kl_from_hidden(
                self._unembedding, self._plain[-behind:], changed[-behind:], temperature=self._temperature
            )
        found = np.full(len(self._spans), np.nan)
        for target in range(source + 1, len(self._spans)):
            start, stop = (place - span.stop for place in (self._spans[target].start, self._spans[target].stop))
            found[target] = float(kl[start:stop].mean())
        return found

    def _states(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            fed = torch.tensor([ids], device=self._model.device)
            states: torch.Tensor = self._model.hf.base_model(input_ids=fed, use_cache=False).last_hidden_state[0]
        return states
