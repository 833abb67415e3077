"""The steering methods by name: how each makes its vector from a run, and where the vector acts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

from reasonscope.data.errors import InputError
from reasonscope.data.store import TraceStore
from reasonscope.data.trace import Kind
from reasonscope.probes.model import Model
from reasonscope.probes.sites import Site
from reasonscope.steering.operators import Operator, add
from reasonscope.steering.scope import Scope
from reasonscope.steering.seal import Variant, extract_seal
from reasonscope.steering.vector import SteeringVector

# (model, store, ids of the traces to learn from, sites). A method that reads recorded activations leaves the model alone.
Extract: TypeAlias = Callable[[Model, TraceStore, Sequence[str], Sequence[Site]], SteeringVector]


@dataclass(frozen=True, kw_only=True)
class Method:
    """`extract` makes the vector, `sites` says where unless told otherwise, `scope` and `operator` how it is applied.

    `summary` is one line; `strengths` are multipliers to begin a sweep with, in the direction that the paper means.
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


def _seal(away_from: Sequence[Kind], variant: Variant = "corrected") -> Extract:
    def extract(_: Model, store: TraceStore, ids: Sequence[str], sites: Sequence[Site]) -> SteeringVector:
        if len(sites) != 1:
            raise InputError(f"SEAL acts at one site, not at {', '.join(map(str, sites))}; name one")
        return extract_seal(store, sites[0], ids=ids, away_from=away_from, variant=variant)

    return extract


def share_of_depth(model: Model, share: float) -> tuple[Site]:
    """The output of the block at a share of the depth: what a paper's layer is on a model of another depth."""
    return (Site("resid_post", max(0, round(share * model.n_layers) - 1)),)


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
    }
)


def method(name: str) -> Method:
    """Raises InputError for a name that no method has."""
    if name not in METHODS:
        raise InputError(f"no steering method is called {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
