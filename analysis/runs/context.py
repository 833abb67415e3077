"""What an analysis works on: a run's traces, the options, and the models, which are loaded when they are first needed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from reasonscope.analysis.attention.rows.served import ServedModel, served_model
from reasonscope.analysis.runs.options import (
    AnalysisOptions,
    LoadsBase,
    LoadsModel,
    ReadsSites,
    ReceiversOptions,
    Writes,
)
from reasonscope.analysis.tokens.mi import gold_text, representations
from reasonscope.data.errors import InputError
from reasonscope.data.progress import say
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.branches import PrefixWriter, SequenceWriter, Writer
from reasonscope.probes.models.model import Model, load_as_recorded, load_model
from reasonscope.probes.models.prompting import as_recorded, load_prompting
from reasonscope.probes.server.completions import server_writer
from reasonscope.probes.vllm.address import check_address
from reasonscope.probes.vllm.identity import check_vectors
from reasonscope.probes.vllm.writer import vllm_writer
from reasonscope.steering.engine.in_engine import in_engine
from reasonscope.steering.recipes.following import follow, recipe_of_run
from reasonscope.steering.recipes.recipe import Recipe

Told = TypeVar("Told", bound=AnalysisOptions, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Study(Generic[Told]):
    """A run under analysis.

    Attributes:
        store: The store of the run.
        traces: The traces to analyse.
        options: The options of the analysis.
        results: The folder of the results that were saved before.
        kept: A folder that keeps what a server writes until the analysis is done; nothing is kept if None.
    """

    store: TraceStore
    traces: Sequence[Trace]
    options: Told
    results: Path
    kept: Path | None = None
    _golds: dict[str, dict[Site, NDArray[Any]]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def model(self: "Study[LoadsModel]") -> Model:
        """The model that wrote the traces, steered as it was then."""
        how = {**_loading(self.options), "revision": self.options.revision}
        model = load_as_recorded(self.store.meta, self._name, how)
        if self.recipe is not None:
            follow(model, self.recipe, (trace.token_ids[: trace.n_prompt_tokens].tolist() for trace in self.store))
        return model

    @cached_property
    def recipe(self) -> Recipe | None:
        """What steered the traces, if anything did."""
        return None if self.store.recipe is None else recipe_of_run(self.store)

    @cached_property
    def base(self: "Study[LoadsBase]") -> Model:
        """The model before its reasoning training."""
        return load_model(self.options.base, **_loading(self.options))

    @cached_property
    def writer(self: "Study[Writes]") -> Writer:
        """What writes continuations: the model here, or a server of it."""
        told = self.options
        if self.recipe is not None:
            return self._steered_writer(self.recipe)
        if told.server is None:
            return PrefixWriter(self.model, batch_size=told.batch_size)
        return server_writer(
            told.server, self.model, served_as=told.served_as, timeout=told.server_timeout, keep=self.kept
        )

    def _steered_writer(self: "Study[Writes]", recipe: Recipe) -> Writer:
        if self.options.server is not None:
            return self._steered_server(recipe, self.options.server)
        if recipe.controls:
            named = ", ".join(part.name for part in recipe.controls)
            say(f"Continuations and forced answers are written without the controller of {recipe.name} ({named}).")
        processors = recipe.decoding_condition(self.model).processors
        return SequenceWriter(self.model, batch_size=self.options.batch_size, processors=processors)

    def _steered_server(self: "Study[Writes]", recipe: Recipe, url: str) -> Writer:
        """vLLM with vllm-lens, which steers continuations as the traces were steered."""
        told = self.options
        prompts = (trace.token_ids[: trace.n_prompt_tokens].tolist() for trace in self.store)
        steering = in_engine(recipe, self.model, prompts)
        how: dict[str, Any] = {"served_as": told.served_as, "timeout": told.server_timeout, "keep": self.kept}
        writer = vllm_writer(url, self.model, steering=steering, trusted=told.trust_server, **how)
        check_vectors(writer)
        return writer

    @cached_property
    def attention(self: "Study[ReceiversOptions]") -> Model | ServedModel:
        """The model whose attention is read, steered as it was: here, or in vLLM."""
        told = self.options
        if told.server is None:
            return self.model
        loading = as_recorded(self.store.meta, {"revision": told.revision}, self._name)
        bare = load_prompting(self._name, **{part: loading[part] for part in ("revision", "thinking", "prompt")})
        prompts = (trace.token_ids[: trace.n_prompt_tokens].tolist() for trace in self.store)
        steering = None if self.recipe is None else in_engine(self.recipe, bare, prompts)
        check_address(told.server, trusted=told.trust_server)
        writer = vllm_writer(
            told.server,
            bare,
            steering=steering,
            trusted=told.trust_server,
            served_as=told.served_as,
            timeout=told.server_timeout,
        )
        check_vectors(writer)
        return served_model(bare, writer)

    @property
    def sites(self: "Study[ReadsSites]") -> tuple[Site, ...]:
        """The chosen sites; without a choice the last residual stream that was stored."""
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

    def gold(self: "Study[Any]", trace: Trace) -> dict[Site, NDArray[Any]]:
        """The states after the answer of a trace, at the chosen sites; each answer is read once."""
        if trace.id not in self._golds:
            text = gold_text(trace, self.options.gold)
            (self._golds[trace.id],) = representations(self.model, [text], self.sites)
        return self._golds[trace.id]

    @property
    def _name(self: "Study[LoadsModel]") -> str:
        name = self.options.model or self.store.meta.get("model", {}).get("name")
        if not name:
            raise InputError(f"{self.store.path} does not say which model wrote it; name one with --model")
        return str(name)

    @property
    def has_model(self: "Study[LoadsModel]") -> bool:
        """Whether a model was named, by the options or by the run."""
        return bool(self.options.model or self.store.meta.get("model", {}).get("name"))


def _loading(how: LoadsModel) -> dict[str, Any]:
    """The arguments of `load_model` that hold for a base model, too."""
    names = ("device", "dtype", "quantise", "threads", "deterministic", "float32_compute")
    return {name: getattr(how, name) for name in names}


def stored(store: TraceStore, id: str, site: Site) -> NDArray[Any]:
    """What was stored of a trace at a site."""
    return store.activations(id, str(site))
