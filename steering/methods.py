"""The steering methods by name: how each makes its vector from a run, and where the vector acts."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from reasonscope.data.behaviour import behaviour
from reasonscope.data.errors import InputError
from reasonscope.data.store import TraceStore
from reasonscope.data.trace import Kind, Problem, Sampling, Trace
from reasonscope.probes.length import length_probe
from reasonscope.probes.model import Model
from reasonscope.probes.sites import Site
from reasonscope.steering.asc import extract_asc
from reasonscope.steering.contrast import Read, state_of, vector_of_probe
from reasonscope.steering.efficiency import extract_efficiency
from reasonscope.steering.operators import Operator, ablate, add, scaled_add
from reasonscope.steering.refusal import Contexts, answer_contexts, extract_refusal
from reasonscope.steering.scope import Scope
from reasonscope.steering.seal import Variant, extract_seal
from reasonscope.steering.speed import extract_speed, fast_slow_pairs
from reasonscope.steering.strength import extract_strength
from reasonscope.steering.vector import SteeringVector

# (model, store, ids of the traces to learn from, sites). A method that reads recorded activations leaves the model alone.
Extract: TypeAlias = Callable[[Model, TraceStore, Sequence[str], Sequence[Site]], SteeringVector]


@dataclass(frozen=True, kw_only=True)
class Method:
    """`extract` makes the vector, `sites` says where unless told otherwise, `scope` and `operator` how it is applied.

    `summary` is one line; `strengths` are multipliers to begin a sweep with, in the direction that the paper means. A paper's layer is
    taken as a share of the depth. Its strengths are kept where they multiply a difference of activations, which has the model's own
    scale; where they multiply a direction of length 1 they mean nothing on another model, and are a share of the state's norm here.
    """

    summary: str
    extract: Extract
    scope: Callable[[Model], Scope]
    sites: Callable[[Model], tuple[Site, ...]]
    operator: Operator = add
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)

    def vector(
        self, model: Model, store: TraceStore, ids: Sequence[str], sites: Sequence[Site] | None = None
    ) -> SteeringVector:
        """The vector from the traces `ids` of a run; it says which groups of problems it was made from."""
        made = self.extract(model, store, ids, sites or self.sites(model))
        groups = sorted({store.trace(id).problem.group for id in ids})
        return replace(made, provenance={**made.provenance, "groups": groups})


def share_of_depth(model: Model, share: float) -> tuple[Site]:
    """The output of the block at a share of the depth: what a paper's layer is on a model of another depth."""
    return (Site("resid_post", max(0, round(share * model.n_layers) - 1)),)


def _seal(away_from: Sequence[Kind], variant: Variant = "corrected") -> Extract:
    def extract(_: Model, store: TraceStore, ids: Sequence[str], sites: Sequence[Site]) -> SteeringVector:
        return extract_seal(store, _single(sites), ids=ids, away_from=away_from, variant=variant)

    return extract


def _asc(read: Read) -> Extract:
    return lambda _, store, ids, sites: extract_asc(store, sites, read=read, ids=ids)


def _efficiency(_: Model, store: TraceStore, ids: Sequence[str], sites: Sequence[Site]) -> SteeringVector:
    return extract_efficiency(store, sites, read="thinking_mean", ids=ids)


def _strength(_: Model, store: TraceStore, ids: Sequence[str], sites: Sequence[Site]) -> SteeringVector:
    return extract_strength(store, sites, ids=ids)


# The paper's "To" makes the R1 distillations fast. The organism's brief thinking, and it alone, begins with "After".
_FAST_WORDS = {"organism": "After"}


def _speed(model: Model, store: TraceStore, ids: Sequence[str], sites: Sequence[Site]) -> SteeringVector:
    asked = {trace.problem.id: trace.problem for trace in map(store.trace, ids) if trace.problem.answer is not None}
    problems: list[Problem] = list(asked.values())
    if not problems:
        raise InputError("no problem of this run has a gold answer, so no pair of fast and slow is known to be right")
    sampling = Sampling(**store.meta.get("sampling", {}))
    pairs = fast_slow_pairs(model, problems, sampling, first=_FAST_WORDS.get(model.name, "To"))
    return extract_speed(model, pairs, sites)


def _refusal(model: Model, store: TraceStore, ids: Sequence[str], _: Sequence[Site]) -> SteeringVector:
    """Half of the groups make the candidates, the other half chooses among them."""
    traces = [trace for trace in map(store.trace, ids) if isinstance(trace.problem.meta.get("harmful"), bool)]
    groups = sorted({trace.problem.group for trace in traces})
    random.Random(0).shuffle(groups)
    first = set(groups[: len(groups) // 2])

    def contexts(refused: bool, made: bool) -> Contexts:
        wanted = ("refused", True) if refused else ("complied", False)
        return answer_contexts(
            trace
            for trace in traces
            if (behaviour(trace), trace.problem.meta["harmful"]) == wanted and (trace.problem.group in first) is made
        )

    opens = {_first_answer_token(trace) for trace in traces if behaviour(trace) == "refused"}
    return extract_refusal(
        model,
        contexts(True, True),
        contexts(False, True),
        contexts(True, False),
        contexts(False, False),
        sorted(opens),
    )


def _refusal_at_every_layer(
    model: Model, store: TraceStore, ids: Sequence[str], sites: Sequence[Site]
) -> SteeringVector:
    """The one direction chosen, at each of `sites`: what is projected out behind every block stays out."""
    chosen = _refusal(model, store, ids, sites)
    (direction,) = chosen.directions.values()
    return replace(chosen, directions=dict.fromkeys(sites, direction))


def _length_probe(_: Model, store: TraceStore, ids: Sequence[str], sites: Sequence[Site]) -> SteeringVector:
    """The normal of a probe of log(1 + thinking tokens), as long as the standard deviation of what it reads, towards shorter."""
    traces = [trace for trace in map(store.trace, ids) if trace.problem.answer is not None]
    probe = length_probe(store, traces).probe
    read = np.array([state_of(store, trace, probe.site, "prompt") @ probe.direction for trace in traces])
    return -vector_of_probe(probe, norm=float(read.std()))


def _first_answer_token(trace: Trace) -> int:
    return int(trace.token_ids[trace.tokens.answer.start])


def _single(sites: Sequence[Site]) -> Site:
    if len(sites) != 1:
        raise InputError(f"SEAL acts at one site, not at {', '.join(map(str, sites))}; name one")
    return sites[0]


def _blocks(model: Model, first: float, last: float) -> tuple[Site, ...]:
    """Behind the blocks from a share of the depth to another."""
    low, high = round(first * model.n_layers), round(last * model.n_layers)
    return tuple(Site("resid_post", layer) for layer in range(min(low, high - 1), high))


def _every(point: str) -> Callable[[Model], tuple[Site, ...]]:
    return lambda model: tuple(Site.parse(f"{point}.{layer}") for layer in range(model.n_layers))


def _everywhere(_: Model) -> Scope:
    return Scope()


def _last_of_each_pass(_: Model) -> Scope:
    """What a hook on the last position of every forward pass touches: the end of the prompt, and all that is generated."""
    return Scope(prompt_positions=(-1,), generation_window=(0, None))


_separators = partial(Scope.thinking, at_separators=True)
# Layer 20 of 28, counted as Hugging Face's hidden states: the output of block 19.
_paper_layer = partial(share_of_depth, share=20 / 28)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "seal": Method(
            summary="execution against reflection and transition (SEAL, arXiv 2504.07986)",
            extract=_seal(("reflection", "transition")),
            scope=_separators,
            sites=_paper_layer,
        ),
        "seal-reflection": Method(
            summary="execution against reflection alone",
            extract=_seal(("reflection",)),
            scope=_separators,
            sites=_paper_layer,
        ),
        "seal-transition": Method(
            summary="execution against transition alone",
            extract=_seal(("transition",)),
            scope=_separators,
            sites=_paper_layer,
        ),
        "seal-reference": Method(
            summary="as SEAL's released code makes it; its multiplier is negative",
            extract=_seal(("reflection", "transition"), "reference"),
            scope=_separators,
            sites=_paper_layer,
            strengths=(-0.5, -1.0, -2.0),
        ),
        "asc": Method(
            summary="concise against verbose, at the end of the text (ASC, arXiv 2507.04742); needs the modes brief and detail",
            extract=_asc("end"),
            scope=_last_of_each_pass,
            sites=_paper_layer,
            strengths=(0.14, 0.27, 0.5),
        ),
        "asc-thinking": Method(
            summary="the same, read along the thinking and applied there alone",
            extract=_asc("thinking_mean"),
            scope=Scope.thinking,
            sites=_paper_layer,
        ),
        "speed": Method(
            summary="fast against slow thinking (arXiv 2507.03704); strengths are shares of the state's norm, the paper's are not",
            extract=_speed,
            scope=_last_of_each_pass,
            sites=partial(_blocks, first=18 / 28, last=27 / 28),
            operator=scaled_add,
            strengths=(0.05, 0.1, 0.2),
        ),
        "strength": Method(
            summary="what a harder problem adds before thinking begins (arXiv 2506.08390); adding it lengthens",
            extract=_strength,
            scope=_everywhere,
            sites=_every("resid_pre"),
            strengths=(0.05, 0.1, 0.2),
        ),
        "efficiency": Method(
            summary="shortest against longest correct (arXiv 2506.15647, which says neither layer nor where it reads); needs samples",
            extract=_efficiency,
            scope=Scope.thinking,
            sites=_paper_layer,
        ),
        "refusal": Method(
            summary="adds the refusal direction (arXiv 2406.11717) at its layer; reversed it subtracts it",
            extract=_refusal,
            scope=_everywhere,
            sites=_every("resid_pre"),
            strengths=(1.0,),
        ),
        "refusal-ablate": Method(
            summary="projects the refusal direction out behind every block; reversed it doubles what lies along it",
            extract=_refusal_at_every_layer,
            scope=_everywhere,
            sites=_every("resid_post"),
            operator=ablate,
            strengths=(1.0,),
        ),
        "length-probe": Method(
            summary="the normal of a probe of thinking tokens, towards shorter; 1 is a standard deviation of what the probe reads",
            extract=_length_probe,
            scope=_last_of_each_pass,
            sites=_paper_layer,
            strengths=(1.0, 2.0, 4.0),
        ),
    }
)


def method(name: str) -> Method:
    """Raises InputError for a name that no method has."""
    if name not in METHODS:
        raise InputError(f"no steering method is called {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
