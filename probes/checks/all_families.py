"""Which families of transformers can be read: each is tried on a tiny random model with its own default settings.

A family is what transformers registers for causal language models, and the text towers of those for images and text.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from reasonscope.data.progress import tracked
from reasonscope.probes.architecture.families import random_model
from reasonscope.probes.architecture.layout import BlockLayout, Layout
from reasonscope.probes.architecture.shrinking import VOCAB, class_for, shrunk
from reasonscope.probes.architecture.sites import POINTS
from reasonscope.probes.backends.base import full_mask
from reasonscope.probes.checks.support_table import load_tiny, markdown, one_line, support_table
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import BACKENDS, Model

# What transformers itself may raise for a family that its default settings do not fit.
_ANY = (Exception,)
_LARGEST = 120_000_000  # parameters; beyond, a family has a size that shrinking does not know
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class _FamilyTrial:
    """What was found for one family.

    Attributes:
        family: Its `model_type`.
        points: The points that a block of it has, in any block.
        blocks: What the blocks add to the stream, one line for each kind of block.
        engines: For each engine "" if it reads the family as the native hooks do, or why it does not.
        cached: Whether decoding with the cache gives the logits of one pass; None if it was not tried.
        padded: Whether a left-padded batch gives the logits of each row alone.
        refused: Why the native hooks refuse the family; "" if they do not.
    """

    family: str
    points: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    cached: bool | None = None
    padded: bool | None = None
    refused: str = ""


def _all_families() -> tuple[str, ...]:
    """Every family that transformers registers for causal language models, or for images and text."""
    return tuple(sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}))


def _try_family(family: str, backends: Sequence[str] = BACKENDS) -> _FamilyTrial:
    """Build a tiny model of a family, load it with each engine, and compare."""
    try:
        hf = _tiny(family)
        model = load_tiny(hf, "hooks")
    except _ANY as error:  # a family may fail anywhere in transformers
        return _FamilyTrial(family=family, refused=one_line(error))
    return _FamilyTrial(
        family=family,
        points=tuple(point for point in POINTS if point == "embed" or model.layout.layers_with(point)),
        blocks=tuple(_kinds(model.layout)),
        engines={name: _engine(hf, name) for name in backends if name != "hooks"},
        cached=_agrees(partial(_cached_gap, model)),
        padded=_agrees(partial(_padded_gap, model)),
    )


def _tiny(family: str) -> PreTrainedModel:
    config = shrunk(family)
    with torch.device("meta"):
        size = sum(one.numel() for one in class_for(config).from_config(config).parameters())
    if size > _LARGEST:
        raise MemoryError(f"its smallest settings have {size / 1e6:.0f} million parameters")
    return random_model(config)


def _engine(hf: PreTrainedModel, backend: str) -> str:
    try:
        load_tiny(hf, backend)
    except _ANY as error:  # likewise
        return one_line(error)
    return ""


def _kinds(layout: Layout) -> Iterator[str]:
    """One line for each kind of block, with how many blocks are of it."""
    lines = [_sum(block) for block in layout.of_block]
    for line in dict.fromkeys(lines):
        yield f"{lines.count(line)} × {line}"


def _sum(block: BlockLayout) -> str:
    parts = {"attention": block.attn_out, "mixer": block.mixer_out, "MLP": block.mlp_out}
    found = [f"{name} `{' + '.join(term.path for term in terms)}`" for name, terms in parts.items() if terms]
    return ", ".join(found) or "nothing"


def _agrees(gap: "partial[float]") -> bool | None:
    try:
        return gap() <= _TOLERANCE
    except _ANY:  # a family without a cache, for instance
        return None


def _cached_gap(model: Model) -> float:
    """Largest difference of the logits of one pass, and of one token at a time on the cache."""
    ids = _ids(1, 9)
    whole = model.backend.forward(ids, mask=torch.ones_like(ids)).logits
    part = model.backend.forward(ids[:, :4], mask=full_mask(ids[:, :4], None), use_cache=True)
    gap = _gap(part.logits, whole[:, :4])
    for i in range(4, 9):
        mask = torch.ones_like(ids[:, : i + 1])
        part = model.backend.forward(ids[:, i : i + 1], mask=mask, cache=part.cache, use_cache=True)
        gap = max(gap, _gap(part.logits, whole[:, i : i + 1]))
    return gap


def _padded_gap(model: Model) -> float:
    """Largest difference of the logits of a row in a left-padded batch, and alone."""
    rows = [_ids(1, 9)[0].tolist(), _ids(1, 5, seed=1)[0].tolist()]
    ids, mask = left_padded(rows, model.device)
    batch = model.backend.forward(ids, mask=mask).logits
    gap = 0.0
    for row, one in enumerate(rows):
        alone = model.backend.forward(torch.tensor([one]), mask=torch.ones(1, len(one), dtype=torch.long)).logits[0]
        gap = max(gap, _gap(batch[row, -len(one) :], alone))
    return gap


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


def _ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


FAMILIES_HEADING = "## All families of transformers"
_PACKED_HEADING = "## Packed weights and adapters"


def _families_markdown(trials: Sequence[_FamilyTrial]) -> str:
    """The second part of the document: what was found for each family, and why others are refused."""
    proved = [trial for trial in trials if not trial.refused]
    refused = [trial for trial in trials if trial.refused]
    head = ["family", "blocks", "lacks", "cache", "padding", "nnsight", "TransformerLens"]
    return "\n".join(
        [
            FAMILIES_HEADING,
            "",
            _INTRODUCTION.format(proved=len(proved), tried=len(trials)),
            _cells(head),
            _cells(["---"] * len(head)),
            *(_cells(_row(trial)) for trial in proved),
            "",
            "### Refused",
            "",
            "In the words of whoever refused it: us, or transformers for the family's own default settings made small.",
            "",
            *(f"- {trial.family}: {trial.refused}" for trial in refused),
            "",
            _PACKED,
        ]
    )


_INTRODUCTION = """\
{proved} of {tried} families are read by the native hooks: every family that transformers registers for causal language models, and the
text towers of those for images and text. Each was tried on a tiny random model with the family's default settings, every size made
small; its layout was derived and proved as for any model that you load. "Lacks" names the points that no block has. "Cache" says whether
decoding with the cache gives the logits of one pass, "padding" whether a left-padded batch gives those of each row alone (✗: the
architecture itself mixes rows or counts padding; – it could not be tried). For nnsight and TransformerLens, ✓ means that they load
the family and read the first block of each kind as the hooks do.

Moshi's own decoder gives other logits with its cache than in one pass, by two thirds of their norm, in transformers alone and in float64
too; so read what it wrote in one pass, as `record` does.
"""

_PACKED = """\
## Packed weights and adapters

Tried by hand on SmolLM2-135M-Instruct, on a CPU: `verify` passes, and heads and neurons are read. "Off" is the distance of the logits from
those of the plain float32 weights, as a share of their norm; "batch" how far a left-padded batch is from single rows, at the worst token.

| weights | packages | off | batch | limit |
| --- | --- | --- | --- | --- |
| LoRA adapter, merged | peft 0.21.2 | 9e-07 from the adapter of peft | 6e-07 | 0.001 |
| `--quantise 4bit` (NormalFloat) | bitsandbytes 0.50.2 | 0.095 | 0.012 | 0.1 |
| `--quantise 8bit` (LLM.int8) | bitsandbytes 0.50.2 | 0.031 | 0.12 | 0.3 |
| compressed-tensors, 4-bit weights in groups of 64 | compressed-tensors 0.20.1 | – | 1e-06 | 0.1 |
| compressed-tensors, 8-bit weights and activations | compressed-tensors 0.20.1 | 0.053 | 0.11 | 0.3 |

The packed experts (MXFP4) of a tiny gpt-oss are unpacked bit by bit on a CPU, and `verify` passes (2e-07 in float32).

Not tried: any of these on a GPU; GPTQ, whose package asks for a newer torch than the one that is tested here; AWQ and fp8,
whose kernels need a GPU. They load as transformers loads them, and the limits of `verify` follow what the configuration says.
"""


def _row(trial: _FamilyTrial) -> list[str]:
    lacking = [point for point in POINTS if point not in trial.points]
    marks = ["–" if one is None else "✓" if one else "✗" for one in (trial.cached, trial.padded)]
    engines = ["✗" if trial.engines.get(name, "-") else "✓" for name in ("nnsight", "transformer_lens")]
    return [trial.family, "; ".join(trial.blocks), ", ".join(lacking), *marks, *engines]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    trials = [_try_family(family) for family in tracked(_all_families(), "trying", "families")]
    page = Path(*(sys.argv[1:] or ["docs/support.md"]))
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    by_hand = "".join(before.partition(_PACKED_HEADING)[1:])  # measured where the packages are
    document = f"{markdown(support_table())}\n{_families_markdown(trials)}\n{by_hand}"
    page.write_text(document, encoding="utf-8")
