"""Activation patching: put states of one text into another, place by place, and see how much of its answer comes back."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.progress import working
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.generation.padding import check_sequence
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.effects import Cells, Forgetful

At = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "heads"]
Ids: TypeAlias = Sequence[int]
_FED = 4096  # tokens of one batch of patched texts


@dataclass(frozen=True, kw_only=True)
class PatchPair:
    """Two texts and the tokens that answer them, the first place at which the answers differ.

    Attributes:
        clean: Token ids of the text whose states are put into the other.
        corrupted: Token ids of the text that is patched.
        right: The token that continues `clean`.
        wrong: The token that continues `corrupted`.
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    right: int
    wrong: int

    @classmethod
    def of_texts(cls, model: Model, clean: Ids, corrupted: Ids, answers: tuple[str, str]) -> "PatchPair":
        """Texts as ids, and the two answers as they follow them, such as (" 12", " 15"). Raises InputError for equal ones."""
        right, wrong = (model.tokenizer.encode(text, add_special_tokens=False) for text in answers)
        if not right or not wrong:
            raise InputError("an answer has no token; write what follows the text, such as ' 12'")
        shared = _shared(right, wrong)
        if shared in (len(right), len(wrong)):
            raise InputError(
                f"the answers {answers[0]!r} and {answers[1]!r} do not differ in a token; nothing can be told apart"
            )
        joined = tuple((*ids, *answer[:shared]) for ids, answer in ((clean, right), (corrupted, wrong)))
        return cls(clean=joined[0], corrupted=joined[1], right=right[shared], wrong=wrong[shared])

    @classmethod
    def of_traces(cls, clean: Trace, corrupted: Trace) -> "PatchPair":
        """Each trace up to its final answer, as far as the two answers agree.

        Raises InputError if a trace states no final answer in its answer, or both give the same.
        """
        left, right = (_answer_tokens(trace) for trace in (clean, corrupted))
        shared = _shared(left[1], right[1])
        if shared in (len(left[1]), len(right[1])):
            raise InputError(
                f"{clean.id} and {corrupted.id} answer {clean.final_answer!r} and {corrupted.final_answer!r}, which no token tells apart; "
                "choose traces with different answers"
            )
        texts = [
            tuple(trace.token_ids[: start + shared].tolist())
            for trace, (start, _) in ((clean, left), (corrupted, right))
        ]
        return cls(clean=texts[0], corrupted=texts[1], right=left[1][shared], wrong=right[1][shared])

    def check(self, last: int | None) -> None:
        """Raise InputError if the tokens of the two texts cannot be put side by side."""
        n_clean, n_corrupted = len(self.clean), len(self.corrupted)
        if last is None and n_clean != n_corrupted:
            raise InputError(
                f"the clean text has {n_clean} tokens and the corrupted one {n_corrupted}, so that their tokens cannot be paired; "
                "give texts of equal length, or patch the last few tokens only (last: 8)"
            )
        if last is not None and not 1 <= last <= min(n_clean, n_corrupted):
            raise InputError(f"last: {last}; the texts have {n_clean} and {n_corrupted} tokens")


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchEffect:
    """What each patch gives back; all arrays are NaN for layers that lack the site.

    Attributes:
        at: Where states were patched.
        places: The tokens of the corrupted text (by index), or the heads.
        logit_difference: (layer, place), the logit of the right token minus that of the wrong one.
        probability: (layer, place), the probability of the right token.
        of_clean: The same two numbers for the clean text.
        of_corrupted: And for the corrupted one.
        null: (text, 2, layer, place): the two with states of unrelated texts.
    """

    at: At
    places: tuple[int, ...]
    logit_difference: Values
    probability: Values
    of_clean: tuple[float, float]
    of_corrupted: tuple[float, float]
    null: Values


def patch_activations(
    model: Model,
    pair: PatchPair,
    *,
    at: At = "resid_pre",
    last: int | None = None,
    unrelated: Sequence[Ids] = (),
    cells: Cells | None = None,
) -> PatchEffect:
    """Run the corrupted text once for every layer and token (or head), each time with the clean text's states there.

    Args:
        model: The model.
        pair: The two texts.
        at: A site of the residual stream, patched token by token; or `heads`, each patched at all tokens.
        last: Only the last so many tokens, counted from the end of either text; all of them if None.
        unrelated: Other texts, whose states are patched in for comparison.
        cells: Keeps each layer, so that an interrupted run goes on.

    Raises:
        InputError: If the tokens of two texts cannot be put side by side, a text is too short, or `at` is unknown.
    """
    if at not in get_args(At):
        raise InputError(f"at={at!r}; choose from {', '.join(get_args(At))}")
    pair.check(last)
    point: Point = "z" if at == "heads" else at
    window = last or len(pair.corrupted)
    if short := [len(ids) for ids in unrelated if len(ids) < window]:
        raise InputError(f"an unrelated text has {short[0]} tokens, but {window} are patched; give longer ones")
    for text in (pair.clean, pair.corrupted):
        check_sequence(model, text)
    layers = model.layout.layers_with(point)
    if not layers:
        model.layout.module(model.hf, Site(point, 0))  # raises, and says why
    kept = cells if cells is not None else Forgetful()
    sources: list[Ids] = [pair.clean, *(ids[-window:] if last else ids[:window] for ids in unrelated)]
    places = range(model.n_heads) if at == "heads" else range(len(pair.corrupted) - window, len(pair.corrupted))
    found = np.full((len(sources), 2, model.n_layers, len(places)), np.nan)
    with working("patching", total=len(sources) * len(layers), unit="layers") as work:
        for source, ids in enumerate(sources):
            for layer in layers:
                key = _key(pair, ids, at, layer, window)
                if (known := kept.get(key)) is None:
                    known = _patched(model, pair, ids, Site(point, layer), window)
                    kept.put(key, known)
                found[source, :, layer, : len(known[0])] = known
                work.advance()
    return PatchEffect(
        at=at,
        places=tuple(places),
        logit_difference=found[0, 0],
        probability=found[0, 1],
        of_clean=_plain(model, pair, pair.clean),
        of_corrupted=_plain(model, pair, pair.corrupted),
        null=found[1:],
    )


def _patched(model: Model, pair: PatchPair, source: Ids, site: Site, window: int) -> list[list[float]]:
    """Both numbers at every place of a layer: (2, place)."""
    states = run_with_cache(model, list(source), [site])[1][site][0, -window:]
    n = states.shape[1] if site.point == "z" else window
    rows = max(1, _FED // len(pair.corrupted))
    parts = []
    for start in range(0, n, rows):
        places = range(start, min(start + rows, n))
        ids = torch.tensor([pair.corrupted] * len(places), device=model.device)
        edit = _heads_put(states, places) if site.point == "z" else _tokens_put(states, places)
        out = model.backend.forward(ids, mask=None, last_logits_only=True, write={site: edit})
        parts.append(_numbers(pair, out.logits[:, -1]))
    return [[float(x) for part in parts for x in part[i]] for i in range(2)]


def _tokens_put(states: Tensor, places: Sequence[int]) -> Edit:
    """An edit that puts one token's state into each row."""

    def edit(activation: Tensor, where: Positions) -> Tensor:
        changed = activation.clone()
        first = activation.shape[1] - len(states)
        for row, place in enumerate(places):
            changed[row, first + place] = states[place].to(activation)
        return changed

    return edit


def _heads_put(states: Tensor, places: range) -> Edit:
    """An edit that puts one head's output at all tokens of the window into each row."""

    def edit(activation: Tensor, where: Positions) -> Tensor:
        changed = activation.clone()
        for row, head in enumerate(places):
            changed[row, -len(states) :, head] = states[:, head].to(activation)
        return changed

    return edit


def _plain(model: Model, pair: PatchPair, ids: Ids) -> tuple[float, float]:
    given = torch.tensor([list(ids)], device=model.device)
    logits = model.backend.forward(given, mask=None, last_logits_only=True).logits[:, -1]
    difference, probability = _numbers(pair, logits)
    return float(difference[0]), float(probability[0])


def _numbers(pair: PatchPair, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logit difference and probability of the right token (row,)."""
    wide = logits.double()
    return wide[:, pair.right] - wide[:, pair.wrong], wide.softmax(dim=-1)[:, pair.right]


def _key(pair: PatchPair, source: Ids, at: str, layer: int, window: int) -> str:
    told = [pair.corrupted, pair.right, pair.wrong, list(map(int, source)), at, layer, window]
    return f"patch/{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]}"


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _answer_tokens(trace: Trace) -> tuple[int, list[int]]:
    """The first token of the final answer, and all tokens from there on."""
    region = trace.chars.answer
    at = trace.text.rfind(trace.final_answer, region.start, region.stop) if trace.final_answer else -1
    if at < 0 or not len(trace.token_ids):
        raise InputError(f"trace {trace.id!r} does not state its final answer in its answer; choose another trace")
    start = int(np.searchsorted(trace.offsets[:, 1], at, side="right"))
    return start, trace.token_ids[start:].tolist()
