"""What a sentence passes on: replace it, read every later sentence again, and see how far the predictions move."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from reasonscope.analysis.anchors.rollouts import Continuation, continuation
from reasonscope.analysis.results import Axis, Band, Result, undefined
from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.sentence_cut import cut_provenance
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Sampling, Sentence, Trace
from reasonscope.probes.generation.branches import Branch, Writer
from reasonscope.probes.generation.forced_answers import Decoder, Encoder
from reasonscope.probes.generation.rollout import trace_seed
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.unembedding import Unembedding, kl_from_hidden

METHOD, QUANTITY = "replacement", "divergence of a sentence after another was replaced"

# Alternative texts for each sentence, by its index.
ResampledAlternatives = Mapping[int, Sequence[str]]


def resampled_alternatives(
    sentences: Sequence[Sentence], continuations: Mapping[int, Sequence[Continuation]], *, most: int = 4
) -> dict[int, tuple[str, ...]]:
    """What the model itself wrote first instead of each sentence, other than that sentence: at most `most`, the most
    frequent first."""
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
    thinking: Thinking | None = None,
) -> dict[int, list[Continuation]]:
    """Continuations of a trace after an alternative in each sentence's place, `samples` each, distributed over its
    alternatives.

    With `sentence_effects(…, without=…)` they give the counterfactual importance of sentences for sentences if the
    model itself hardly ever writes anything else. A sentence without an alternative has none.
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
        found[i].append(continuation(done, decode, thinking or Thinking()))
    return found


def _in_place(written: str, text: str, encode: Encoder) -> list[int]:
    """Tokens of `text` with the white space of the text that it replaces."""
    start, stop = len(written) - len(written.lstrip()), len(written.rstrip())
    return encode(written[:start] + text + written[stop:])


def replacement_effects(
    model: Model,
    trace: Trace,
    sentences: Sequence[Sentence],
    alternatives: ResampledAlternatives,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Result:
    """How far each later sentence's next-token distributions move if a sentence says something else.

    This is the counterfactual of Thought Anchors (arXiv 2506.19143, section 3) between sentences: the text between
    source and target is unchanged, so an effect is what the source passes on directly, not by way of what would have
    been written next.

    Args:
        model: The model.
        trace: The trace, with tokens.
        sentences: Its sentences.
        alternatives: Other texts for each sentence, by index (see `resampled_alternatives`).
        temperature: Temperature of the distributions.
        seed: Random seed.

    Returns:
        Axes (target, source), nats: the mean over alternatives and over the target's tokens of KL(original ‖ with the
        alternative). The null puts another sentence of the thinking, drawn at random, in the source's place; the band
        is 95 % of all pairs, the effect of any odd sentence. `numbers`: `replaced`, how many alternatives each source
        had. NaN for target ≤ source and for a source without alternatives; undefined, with the reason, for fewer than
        two sentences or without any alternative.

    Raises:
        InputError: For a trace without tokens or with another vocabulary.

    Departures: the text after the source is read and not rewritten, so no rollouts are needed and small effects are
    visible; effects are of sentences on sentences, whereas the paper's default is of sentences on the answer.

    Example:
        found = rs.analysis.replacement_effects(model, trace, rs.sentences(trace), {2: ("So x = 5.",)})
        found.values[:, 2]  # nats, of each later sentence
    """
    common: dict[str, Any] = {"method": METHOD, "quantity": QUANTITY, "unit": "nats"}
    provenance = {"trace": trace.id, "temperature": temperature, "seed": seed, **cut_provenance(sentences)}
    counts = [len(alternatives.get(i, ())) for i in range(len(sentences))]
    if len(sentences) < 2 or not any(counts):
        reason = "fewer than two sentences" if len(sentences) < 2 else "no sentence has an alternative"
        return undefined(**common, reason=reason, provenance=provenance)
    if not len(trace.token_ids):
        raise InputError(f"trace {trace.id!r} has no tokens; import it with the model's tokenizer")
    read = _Reader(model, trace, sentences, temperature)
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
        reason="a sentence has no effect on itself or on earlier ones; one without alternatives has no effects",
        numbers={"replaced": counts, "texts": texts, "tags": [sentence.tag for sentence in sentences]},
        provenance=provenance,
    )


def _effects(read: Callable[[int, str], Values], alternatives: ResampledAlternatives, n: int) -> Values:
    found = np.full((n, n), np.nan)
    for source, texts in tracked(list(alternatives.items()), "replacing", "sentences"):
        if texts and source < n - 1:
            found[:, source] = np.mean([read(source, text) for text in texts], axis=0)
    return found


class _Reader:
    """The divergences of a trace's sentences if one of them is replaced by a text; the original trace is read once."""

    def __init__(
        self,
        model: Model,
        trace: Trace,
        sentences: Sequence[Sentence],
        temperature: float,
    ) -> None:
        self._model, self._temperature = model, temperature
        self._spans = [sentence.tokens for sentence in sentences]
        self._ids = trace.token_ids[: self._spans[-1].stop].tolist()
        self._unembedding = Unembedding.of(model)
        self._plain = self._states(self._ids)

    def __call__(self, source: int, text: str) -> Values:
        """(target,) in nats; NaN up to the source."""
        span = self._spans[source]
        put = _in_place(self._model.decode(self._ids[span.slice]), text, self._model.encode_continuation)
        changed = self._states([*self._ids[: span.start], *put, *self._ids[span.stop :]])
        # The state at t − 1 predicts the token at t.
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
