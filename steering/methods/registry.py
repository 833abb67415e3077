"""The steering methods by name: how each makes its vector from a run, and where the vector acts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np

from reasonscope import probes
from reasonscope.data.errors import InputError
from reasonscope.data.progress import say, working
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Problem, Sampling, StepKind, Trace
from reasonscope.data.variants import Variant
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model
from reasonscope.steering.methods.affine_refusal import clamped_refusal
from reasonscope.steering.methods.asc import (
    CompletionPair,
    Verbose,
    extract_asc,
    extract_asc_from_pairs,
    extract_asc_of_traces,
)
from reasonscope.steering.methods.efficiency import extract_efficiency
from reasonscope.steering.methods.pairs import pair_traces
from reasonscope.steering.methods.reasoning_strength import extract_strength
from reasonscope.steering.methods.refusal import answer_contexts, answer_start, extract_refusal, judged_halves
from reasonscope.steering.methods.seal import extract_seal
from reasonscope.steering.methods.thinking_speed import (
    begun_pairs,
    extract_speed,
    extract_speed_of_modes,
    extract_speed_of_traces,
    fast_slow_pairs,
)
from reasonscope.steering.vectors.application import VectorUse, clamped
from reasonscope.steering.vectors.contrast import Read, state_of, vector_of_probe
from reasonscope.steering.vectors.operators import Operator, ablate, add, scaled_add
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class ExtractionData:
    """What a method learns from.

    Attributes:
        model: The model that wrote the traces.
        store: The run, with the activations that the method reads.
        ids: The traces to learn from.
        sites: Sites at which the vectors act; the method's own sites if None.
        verdict: For methods of refusal, the words of the thinking that come right before its verdict on a request; if None, what the
            model's `hints` say, which for most models is nothing.
        pairs: Concise and verbose answers to learn from, for the methods of ASC and of thinking speed; if None, they look in the run for
            problems that were asked both ways.
        fast: For `speed`, the first word that makes the model think fast; if None, what the model's `hints` say, else the paper's "To".
    """

    model: Model
    store: TraceStore
    ids: Sequence[str]
    sites: Sequence[Site] | None = None
    verdict: str | None = None
    fast: str | None = None
    pairs: Sequence[CompletionPair] | None = None

    @property
    def traces(self) -> list[Trace]:
        """The traces to learn from."""
        return [self.store.trace(id) for id in self.ids]

    @property
    def groups(self) -> list[str]:
        """The groups of problems that are learned from."""
        if self.pairs is not None:
            return sorted({pair.id or pair.question for pair in self.pairs})
        return sorted({trace.problem.group for trace in self.traces})


# A method that reads recorded activations leaves the model alone.
Extract: TypeAlias = Callable[[ExtractionData, Sequence[Site]], SteeringVector]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published steering method by name.

    Attributes:
        summary: One line on what it does.
        make: Makes the vectors, each with the tokens at which it acts and its operator.
        strengths: Multipliers to begin a sweep with, in the direction that the paper means.
        takes_pairs: Whether it can learn from pairs of a concise and a verbose answer.

    A paper's layer is taken as a share of the depth. A paper's strengths are kept if they multiply a difference of activations, which
    has the scale of the model. If they multiply a direction of length 1, they mean nothing on another model, and are shares of the
    state's norm here.

    Example:
        source = ExtractionData(model=model, store=store, ids=store.ids)
        uses = METHODS["seal"].parts(source)
        uses[0].vector.save("seal.safetensors")
    """

    summary: str
    make: Callable[[ExtractionData], tuple[VectorUse, ...]]
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    takes_pairs: bool = False

    def parts(self, source: ExtractionData) -> tuple[VectorUse, ...]:
        """Make the vectors from the traces of a run. Each records the groups of problems that it was made from."""
        groups = source.groups if self.takes_pairs else sorted({trace.problem.group for trace in source.traces})
        if source.pairs is not None and not self.takes_pairs:
            takers = ", ".join(name for name, one in METHODS.items() if one.takes_pairs)
            raise InputError(
                f"this method learns from the run, not from pairs; leave them out, or take one of {takers}"
            )
        with working("extracting"):
            made = self.make(source)
        return tuple(
            replace(part, vector=replace(part.vector, provenance={**part.vector.provenance, "groups": groups}))
            for part in made
        )


def _vector(
    extract: Extract,
    scope: Callable[[Model], Scope],
    sites: Callable[[Model], tuple[Site, ...]],
    operator: Operator = add,
) -> Callable[[ExtractionData], tuple[VectorUse, ...]]:
    """One vector, applied by `operator`."""

    def make(source: ExtractionData) -> tuple[VectorUse, ...]:
        vector = extract(source, _sites(source, sites))
        return (VectorUse(vector=vector, scope=scope(source.model), operator=operator),)

    return make


def _clamp(
    extract: Extract, scope: Callable[[Model], Scope], sites: Callable[[Model], tuple[Site, ...]]
) -> Callable[[ExtractionData], tuple[VectorUse, ...]]:
    """One vector, each site clamped to the class that it points to."""
    return lambda source: clamped(extract(source, _sites(source, sites)), scope(source.model))


def _sites(source: ExtractionData, default: Callable[[Model], tuple[Site, ...]]) -> Sequence[Site]:
    """The sites that were asked for; else the method's own, and for a single one that the run lacks the nearest block that it has."""
    if source.sites:
        return source.sites
    wanted = default(source.model)
    stored = [site for site in map(Site.parse, source.store.sites) if site.point == wanted[0].point]
    if len(wanted) > 1 or not stored or wanted[0] in stored:
        return wanted
    nearest = min(stored, key=lambda site: abs(site.layer - wanted[0].layer))
    say(f"the run has no activations at {wanted[0]}, the method's own site; {nearest} is the nearest that it has")
    return [nearest]


def _share_of_depth(model: Model, share: float) -> tuple[Site]:
    """The output of the block at a share of the depth: a paper's layer on a model of another depth."""
    return (Site("resid_post", max(0, round(share * model.n_layers) - 1)),)


def _seal(away_from: Sequence[StepKind], variant: Variant = "corrected") -> Extract:
    def extract(source: ExtractionData, sites: Sequence[Site]) -> SteeringVector:
        return extract_seal(source.store, _single(sites), ids=source.ids, away_from=away_from, variant=variant)

    return extract


def _asc(read: Read, verbose: Verbose = "detail") -> Extract:
    def extract(source: ExtractionData, sites: Sequence[Site]) -> SteeringVector:
        if source.pairs is None:
            return extract_asc(source.store, sites, read=read, verbose=verbose, ids=source.ids)
        if read == "end":  # as published
            return extract_asc_from_pairs(source.model, source.pairs, sites)
        return extract_asc_of_traces(source.model, pair_traces(source.model, source.pairs), sites, read=read)

    return extract


def _speed_of_modes(read: Read) -> Extract:
    def extract(source: ExtractionData, sites: Sequence[Site]) -> SteeringVector:
        if source.pairs is None:
            return extract_speed_of_modes(source.store, sites, read=read, ids=source.ids)
        return extract_speed_of_traces(source.model, pair_traces(source.model, source.pairs), sites, read=read)

    return extract


def _where_it_turns(extract: Callable[[Read], Extract]) -> Callable[[ExtractionData], tuple[VectorUse, ...]]:
    """Read and clamped at the last prompt token, after which the thinking begins, and at the separators, after which each step begins."""
    at_prompt = _clamp(extract("prompt"), lambda _: Scope(prompt_positions=(-1,)), _every("resid_post"))
    at_steps = _clamp(extract("separators"), _separators, _every("resid_post"))
    return lambda source: (*at_prompt(source), *at_steps(source))


def _efficiency(source: ExtractionData, sites: Sequence[Site]) -> SteeringVector:
    return extract_efficiency(source.store, sites, read="thinking_mean", ids=source.ids)


def _strength(source: ExtractionData, sites: Sequence[Site]) -> SteeringVector:
    """From the problems that state a difficulty; requests in the same run have none. If no problem has, the error names one."""
    solved = [trace for trace in source.traces if trace.problem.answer is not None]
    ids = [trace.id for trace in solved if trace.problem.difficulty is not None] or [trace.id for trace in solved]
    return extract_strength(source.store, sites, ids=ids)


def _speed(source: ExtractionData, sites: Sequence[Site]) -> SteeringVector:
    if source.pairs is not None:
        return extract_speed(source.model, begun_pairs(pair_traces(source.model, source.pairs)), sites)
    asked = {trace.problem.id: trace.problem for trace in source.traces if trace.problem.answer is not None}
    problems: list[Problem] = list(asked.values())
    if not problems:
        raise InputError(
            "no problem of this run has a gold answer, so no fast or slow answer is known to be right; record problems with answers"
        )
    sampling = Sampling(**source.store.meta.get("sampling", {}))
    first = source.fast or source.model.hints.get("fast", "To")  # the paper's "To" makes the R1 distillations fast
    return extract_speed(source.model, fast_slow_pairs(source.model, problems, sampling, first=first), sites)


def _refusal_reference(source: ExtractionData, _: Sequence[Site]) -> SteeringVector:
    made, held_out = judged_halves(source.traces)
    opens = made.following(answer_start)
    made_from = (answer_contexts(made.harmful), answer_contexts(made.harmless))
    chosen_on = (answer_contexts(held_out.harmful), answer_contexts(held_out.harmless))
    return extract_refusal(source.model, *made_from, *chosen_on, opens)


def _refusal_at_every_layer(source: ExtractionData, sites: Sequence[Site]) -> SteeringVector:
    """The one chosen direction at each of `sites`: projected out after every block, it stays out."""
    chosen = _refusal_reference(source, sites)
    (direction,) = chosen.directions.values()
    return replace(chosen, directions=dict.fromkeys(sites, direction))


def _refusal(level: Literal["towards", "away"]) -> Callable[[ExtractionData], tuple[VectorUse, ...]]:
    def make(source: ExtractionData) -> tuple[VectorUse, ...]:
        if source.sites:
            raise InputError("the layer of the refusal direction is chosen by what it does; leave --sites out")
        verdict = source.verdict or source.model.hints.get("verdict")
        return clamped_refusal(source.model, source.traces, level, verdict=verdict)

    return make


def _length_probe(source: ExtractionData, _: Sequence[Site]) -> SteeringVector:
    """The normal of a probe of log(1 + thinking tokens), towards shorter, as long as the standard deviation of its projections."""
    traces = [trace for trace in source.traces if trace.problem.answer is not None]
    probe = probes.length(source.store, traces).probe
    read = np.array([state_of(source.store, trace, probe.site, "prompt") @ probe.direction for trace in traces])
    return replace(-vector_of_probe(probe, norm=float(read.std())), sign="towards shorter thinking")


def _single(sites: Sequence[Site]) -> Site:
    if len(sites) != 1:
        raise InputError(f"SEAL acts at one site, and {', '.join(map(str, sites))} are {len(sites)}; name one")
    return sites[0]


def _blocks(model: Model, first: float, last: float) -> tuple[Site, ...]:
    """The outputs of the blocks from one share of the depth to another."""
    low, high = round(first * model.n_layers), round(last * model.n_layers)
    return tuple(Site("resid_post", layer) for layer in range(min(low, high - 1), high))


def _every(point: str) -> Callable[[Model], tuple[Site, ...]]:
    return lambda model: tuple(Site.parse(f"{point}.{layer}") for layer in range(model.n_layers))


def _everywhere(_: Model) -> Scope:
    return Scope()


def _last_of_each_pass(_: Model) -> Scope:
    """What a hook on the last position of every forward pass edits: the end of the prompt, and everything generated."""
    return Scope(prompt_positions=(-1,), generation_window=(0, None))


_separators = partial(Scope.thinking, at_separators=True)
# Layer 20 of 28, counted as Hugging Face's hidden states: the output of block 19.
_paper_layer = partial(_share_of_depth, share=20 / 28)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "seal": Method(
            summary="execution against reflection and transition (SEAL, arXiv 2504.07986)",
            make=_vector(_seal(("reflection", "transition")), _separators, _paper_layer),
        ),
        "seal-clamp": Method(
            summary="SEAL's direction (reflection only), but each state is moved no further than execution is",
            make=_clamp(_seal(("reflection",)), _separators, _paper_layer),
            strengths=(0.5, 0.75, 1.0),
        ),
        "seal-reflection": Method(
            summary="execution against reflection alone",
            make=_vector(_seal(("reflection",)), _separators, _paper_layer),
        ),
        "seal-transition": Method(
            summary="execution against transition alone",
            make=_vector(_seal(("transition",)), _separators, _paper_layer),
        ),
        "seal-published": Method(
            summary="as in SEAL's released code, applied with a negative multiplier",
            make=_vector(_seal(("reflection", "transition"), "published"), _separators, _paper_layer),
            strengths=(-0.5, -1.0, -2.0),
        ),
        "asc": Method(
            takes_pairs=True,
            summary="concise against verbose answers, read at the end of the text (ASC, arXiv 2507.04742); from --pairs",
            make=_vector(_asc("end"), _last_of_each_pass, _paper_layer),
            strengths=(0.14, 0.27, 0.5),
        ),
        "asc-thinking": Method(
            takes_pairs=True,
            summary="ASC, read along the thinking and applied only there",
            make=_vector(_asc("thinking_mean"), Scope.thinking, _paper_layer),
        ),
        "asc-clamp": Method(
            takes_pairs=True,
            summary="moves states to where brief thinking has them, at the start of the thinking and of its steps; from --pairs",
            make=_where_it_turns(partial(_asc, verbose="default")),
            strengths=(0.5, 1.0),
        ),
        "speed": Method(
            takes_pairs=True,
            summary="fast against slow thinking (arXiv 2507.03704); strengths are shares of the state's norm (not so in the paper)",
            make=_vector(_speed, _last_of_each_pass, partial(_blocks, first=18 / 28, last=27 / 28), scaled_add),
            strengths=(0.05, 0.1, 0.2),
        ),
        "speed-clamp": Method(
            takes_pairs=True,
            summary="moves states along the axis of thinking speed; from --pairs",
            make=_where_it_turns(_speed_of_modes),
            strengths=(0.5, 1.0),
        ),
        "strength": Method(
            summary="what a harder problem adds before the thinking begins (arXiv 2506.08390); adding it lengthens",
            make=_vector(_strength, _everywhere, _every("resid_pre")),
            strengths=(0.05, 0.1, 0.2),
        ),
        "efficiency": Method(
            summary="shortest against longest correct answer (arXiv 2506.15647, which names no layer or token); needs several samples",
            make=_vector(_efficiency, Scope.thinking, _paper_layer),
        ),
        "refusal": Method(
            summary="moves states to where harmful requests are, after verdict and closing tag (arXiv 2411.09003): the model refuses",
            make=_refusal("towards"),
            strengths=(1.0,),
        ),
        "refusal-ablate": Method(
            summary="moves states to where benign requests are: the model complies",
            make=_refusal("away"),
            strengths=(1.0,),
        ),
        "refusal-published": Method(
            summary="adds the refusal direction at its layer and every token, as published (arXiv 2406.11717); reversed, subtracts it",
            make=_vector(_refusal_reference, _everywhere, _every("resid_pre")),
            strengths=(1.0,),
        ),
        "refusal-ablate-published": Method(
            summary="projects it out after every block, as published; reversed, it doubles what lies along it",
            make=_vector(_refusal_at_every_layer, _everywhere, _every("resid_post"), ablate),
            strengths=(1.0,),
        ),
        "length-probe": Method(
            summary="the normal of a length probe, towards shorter thinking; 1 is a standard deviation of its projections",
            make=_vector(_length_probe, _last_of_each_pass, _paper_layer),
            strengths=(1.0, 2.0, 4.0),
        ),
    }
)


def method(name: str) -> Method:
    """The method of that name. Raises InputError for any other."""
    if name not in METHODS:
        raise InputError(f"no steering method is called {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def extract(
    name: str,
    store: TraceStore,
    model: Model,
    *,
    ids: Sequence[str] | None = None,
    sites: Sequence[Site] | None = None,
    verdict: str | None = None,
    fast: str | None = None,
    pairs: Sequence[CompletionPair] | None = None,
) -> tuple[VectorUse, ...]:
    """Extract the vectors of a published method from a run, as `reasonscope steer extract NAME` does.

    Args:
        name: One of `METHODS`, such as `"seal"`.
        store: The run to learn from, with the activations that the method reads.
        model: The model that wrote the run.
        ids: Traces to learn from; all of them if None. Keep the problems that you will judge on out of these.
        sites: Sites at which the vectors act; the method's own sites if None.
        verdict: Words of the thinking that the verdict on a request follows (methods of refusal).
        fast: First word that makes the model think fast (`speed`); the paper's "To" if None.
        pairs: Concise and verbose answers (`make_pairs`, `load_pairs`), for the methods of ASC and of thinking speed.

    Returns:
        The vectors, each with its token scope and operator: what `dose_response` and `as_intervention` take.

    Raises:
        InputError: The method does not exist, or the traces lack what it learns from.

    Example:
        uses = rs.steering.extract("seal", store, model)
        rs.Recipe.of(uses).save("seal.recipe.safetensors")
    """
    source = ExtractionData(
        model=model,
        store=store,
        ids=store.ids if ids is None else ids,
        sites=sites,
        verdict=verdict,
        fast=fast,
        pairs=pairs,
    )
    return method(name).parts(source)
