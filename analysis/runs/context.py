"""A run to analyse: its traces, what may be said of how, and the models, loaded when they are first asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from reasonscope.analysis.tokens.mi import Gold, gold_text, representations
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Sentence, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.branches import PrefixWriter, Writer
from reasonscope.probes.generation.server import server_writer
from reasonscope.probes.models.model import Model, load_model


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an analysis may be told; each takes what it needs."""

    model: str | None = None
    device: str = "cpu"
    deterministic: bool = False
    float32_compute: bool = False
    server: str | None = None
    served_as: str | None = None
    server_timeout: float = 600.0
    sites: str = ""
    gold: Gold = "reference"
    block: int = 500
    samples: int = 8
    rollouts: int = 100
    half_width: float = 0.1
    max_new_tokens: int = 1024
    temperature: float = 0.7
    batch_size: int = 32
    seed: int = 0
    probe: Path | None = None
    base: str = "organism-base"
    ablate: bool = False
    share: float = 0.03
    at_close: bool = False
    n_controls: int = 20
    asked: int = 40
    k: int = 4
    top: int = 5
    keys: int = 8
    vector: Path | None = None
    strength: float = 1.0
    at_separators: bool = True


@dataclass(frozen=True, kw_only=True)
class Study:
    """A run to analyse: its store, the traces chosen, the options; the model is loaded when it is first asked for.

    What a server writes is kept in the folder `kept` until the analysis is done, where one is given.
    """

    store: TraceStore
    traces: Sequence[Trace]
    options: Options
    results: Path
    progress: Callable[[str], None] = field(default=lambda _: None)
    kept: Path | None = None
    _golds: dict[str, dict[Site, NDArray[Any]]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def model(self) -> Model:
        name = self.options.model or self.store.meta.get("model", {}).get("name")
        if not name:
            raise InputError(f"{self.store.path} does not say which model wrote it; name one with --model")
        return self._load(str(name))

    @cached_property
    def writer(self) -> Writer:
        if self.options.server is None:
            return PrefixWriter(self.model, batch_size=self.options.batch_size)
        return server_writer(
            self.options.server,
            self.model,
            served_as=self.options.served_as,
            timeout=self.options.server_timeout,
            keep=self.kept,
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        """The chosen sites, else the residual stream behind the last block that was stored."""
        stored = [Site.parse(site) for site in self.store.sites]
        if self.options.sites:
            wanted = [Site.parse(site.strip()) for site in self.options.sites.split(",")]
            if missing := [str(site) for site in wanted if site not in stored]:
                raise InputError(
                    f"{self.store.path} does not hold {', '.join(missing)}; it holds {', '.join(map(str, stored))}"
                )
            return tuple(wanted)
        residual = [site for site in stored if site.point == "resid_post"]
        return (max(residual, key=lambda site: site.layer),) if residual else ()

    def gold(self, trace: Trace) -> dict[Site, NDArray[Any]]:
        """What stands at the chosen sites behind the answer of a trace; each is cut_trace once."""
        if trace.id not in self._golds:
            self.progress(f"answer of {trace.id}")
            text = gold_text(trace, self.options.gold)
            (self._golds[trace.id],) = representations(self.model, [text], self.sites)
        return self._golds[trace.id]

    @cached_property
    def base(self) -> Model:
        return self._load(self.options.base)

    def _load(self, name: str) -> Model:
        how = self.options
        return load_model(name, device=how.device, deterministic=how.deterministic, float32_compute=how.float32_compute)

    @property
    def has_model(self) -> bool:
        return bool(self.options.model or self.store.meta.get("model", {}).get("name"))


def trace_sentences(trace: Trace) -> list[Sentence]:
    """The sentences of a trace as the app shows them: the published ones, the grammar's own where its truth is known, else ours."""
    return list(cut_trace(trace).sentences)


def stored(store: TraceStore, id: str, site: Site) -> NDArray[Any]:
    """What was stored of a trace at a site."""
    return store.activations(id, str(site))
