"""What each backend can do with the families that tests use, tried on tiny models against the native hooks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reasonscope.data.errors import ReasonscopeError, SiteError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.families import FAMILIES, VOCAB, tiny_model
from reasonscope.probes.architecture.sites import POINTS, Point, Site
from reasonscope.probes.backends.base import Positions
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.model import BACKENDS, Model, load_model

TOLERANCE = 1e-5
_WRITABLE: tuple[Point, ...] = tuple(point for point in POINTS if point != "attn_probs")
# What the code of an engine raises if it cannot do something.
_FAILURES = (ReasonscopeError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
_ENGINES = ("torch", "transformers", "transformer-lens", "nnsight")
_LENGTHS = (9, 6, 2)
_NEW_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class _SupportTrial:
    """Largest absolute `difference` to the native hooks, or the `error` of the engine; neither if the family lacks the point."""

    difference: float | None = None
    error: str | None = None

    @property
    def mark(self) -> str:
        """✓ (within TOLERANCE), ✗, or – (nothing to try)."""
        if self.difference is None and self.error is None:
            return "–"
        return "✓" if self.difference is not None and self.difference <= TOLERANCE else "✗"


@dataclass(frozen=True, kw_only=True)
class SupportRow:
    """The trials of one backend on one family: `load`, and those of TRIALS."""

    backend: str
    family: str
    trials: Mapping[str, _SupportTrial]


def _read_difference(point: Point, model: Model, reference: Model) -> float | None:
    """Largest absolute difference of the logits and of the activations at `point` in all layers; None if the family lacks the point."""
    sites = _sites(model, point)
    if not sites:
        return None
    ids = _batch(model)
    ours, theirs = (m.backend.forward(ids, mask=torch.ones_like(ids), read=sites) for m in (model, reference))
    return max(_gap(ours.logits, theirs.logits), *(_gap(ours.activations[s], theirs.activations[s]) for s in sites))


def _write_difference(point: Point, model: Model, reference: Model) -> float | None:
    """The same after an edit at `point` in the last layer that has it, read there and at the end."""
    sites = _sites(model, point)
    if not sites:
        return None
    ids, last = _batch(model), Site("resid_post", model.n_layers - 1)
    read = tuple(dict.fromkeys((sites[-1], last)))
    ours, theirs = (
        m.backend.forward(ids, mask=torch.ones_like(ids), read=read, write={sites[-1]: _tilt})
        for m in (model, reference)
    )
    return max(_gap(ours.logits, theirs.logits), *(_gap(ours.activations[s], theirs.activations[s]) for s in read))


def _generation_difference(model: Model, reference: Model) -> float:
    """The same for greedy decoding with the cache, edited and recorded, of prompts of several lengths; inf if tokens differ."""
    middle, last = Site("resid_post", 1), Site("resid_post", model.n_layers - 1)
    sampling = Sampling(temperature=0.0, max_new_tokens=_NEW_TOKENS)
    ours, theirs = (
        generate(m, _prompts(), sampling, seeds=[0] * len(_LENGTHS), read=[last], write={middle: _tilt})
        for m in (model, reference)
    )
    if any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    return max(_gap(a.activations[last], b.activations[last]) for a, b in zip(ours, theirs, strict=True))


def _ragged_difference(model: Model, reference: Model) -> float:
    """Each row of a left-padded batch against the native hooks on that row alone: logits and the output of the last block."""
    last = Site("resid_post", model.n_layers - 1)
    ids, mask = left_padded(_prompts(), model.device)
    batch = model.backend.forward(ids, mask=mask, read=[last])
    gaps = []
    for row, prompt in enumerate(_prompts()):
        one = torch.tensor([prompt], device=model.device)
        alone = reference.backend.forward(one, mask=torch.ones_like(one), read=[last])
        gaps.append(_gap(batch.logits[row, -len(prompt) :], alone.logits[0]))
        gaps.append(_gap(batch.activations[last][row, -len(prompt) :], alone.activations[last][0]))
    return max(gaps)


TRIALS: Mapping[str, Callable[[Model, Model], float | None]] = MappingProxyType(
    {f"read {point}": partial(_read_difference, point) for point in POINTS}
    | {f"write {point}": partial(_write_difference, point) for point in _WRITABLE}
    | {"cached generation": _generation_difference, "ragged batch": _ragged_difference}
)


def support_table(families: Sequence[str] = FAMILIES, backends: Sequence[str] = BACKENDS) -> list[SupportRow]:
    """Run all trials: one row per backend and family."""
    models = {family: tiny_model(family) for family in families}
    references = {family: load_tiny(hf, "hooks") for family, hf in models.items()}
    return [_row(backend, family, models[family], references[family]) for backend in backends for family in families]


def _row(backend: str, family: str, hf: PreTrainedModel, reference: Model) -> SupportRow:
    try:
        model = load_tiny(hf, backend)
    except _FAILURES as error:
        failed = _SupportTrial(error=one_line(error))
        return SupportRow(backend=backend, family=family, trials=dict.fromkeys(("load", *TRIALS), failed))
    trials = {name: _try_out(trial, model, reference) for name, trial in TRIALS.items()}
    return SupportRow(backend=backend, family=family, trials={"load": _SupportTrial(difference=0.0), **trials})


def _try_out(trial: Callable[[Model, Model], float | None], model: Model, reference: Model) -> _SupportTrial:
    """Run one trial; an exception of the engine becomes its error."""
    try:
        return _SupportTrial(difference=trial(model, reference))
    except _FAILURES as error:
        return _SupportTrial(error=one_line(error))


def markdown(rows: Sequence[SupportRow]) -> str:
    """The document: a table with marks for reading and writing, and below it each failure in the words of the engine."""
    header = ["backend", "family", "load", *POINTS, "cached generation", "ragged batch", "largest difference"]
    lines = [
        _INTRODUCTION,
        _versions(),
        _cells(header),
        _cells(["---"] * len(header)),
        *(_cells(_marks(row)) for row in rows),
        "",
    ]
    failures = [
        f"- {row.backend}, {row.family}, {name}: {trial.error or f'differs by {trial.difference:.1e}'}"
        for row in rows
        for name, trial in row.trials.items()
        if trial.mark == "✗"
    ]
    return "\n".join([*lines, "## Failures", "", *(failures or ["None."]), ""])


def _marks(row: SupportRow) -> list[str]:
    points = [
        f"{row.trials[f'read {point}'].mark} / {row.trials[f'write {point}'].mark if point in _WRITABLE else '–'}"
        for point in POINTS
    ]
    differences = [trial.difference for trial in row.trials.values() if trial.difference is not None]
    marks = [row.trials[name].mark for name in ("cached generation", "ragged batch")]
    largest = f"{max(differences):.0e}" if differences else "–"
    return [f"`{row.backend}`", row.family, row.trials["load"].mark, *points, *marks, largest]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_INTRODUCTION = f"""\
# What each backend can do

Written by `make support`; change the code, not this file. Every cell of the first table was tried on a tiny random model
of the family, in float32 on a CPU, and compared with the native hooks: ✓ equal within {TOLERANCE:.0e}, ✗ not, – the family lacks the point.
A cell of a point shows read / write; attention weights are read-only, because the model does not use them again. "Cached
generation" decodes prompts of several lengths with an edit in place; "ragged batch" compares each row of a left-padded batch
with that row alone. The rows of `hooks` show that it refuses nothing; its numbers are tested against the models themselves.
"""


def _versions() -> str:
    return "Versions: " + ", ".join(f"{name} {_version(name)}" for name in _ENGINES) + ".\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def load_tiny(hf: PreTrainedModel, backend: str) -> Model:
    """A tiny model that is fed ids only, so a tokenizer without a vocabulary is enough."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))
    return load_model(hf, backend=backend, tokenizer=tokenizer)


def _sites(model: Model, point: Point) -> list[Site]:
    """`point` in every layer that has it; a mixture of experts may have dense blocks in between."""
    sites = []
    for layer in range(model.n_layers):
        site = Site(point, layer)
        try:
            model.layout.module(model.hf, site)
        except SiteError:
            continue
        sites.append(site)
    return sites


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in _LENGTHS]


def _batch(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB, (2, _LENGTHS[0]), generator=generator).to(model.device)


def _tilt(activation: Tensor, _: Positions) -> Tensor:
    """An edit that a norm does not undo, unlike a constant or a scale."""
    return activation / 2 + torch.linspace(-1, 1, activation.shape[-1], device=activation.device)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def one_line(error: BaseException) -> str:
    """An error in the words of whoever raised it, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
