"""What an extraction made, for people and as JSON."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_words, plural
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.experiments.held_out import thinking_states
from reasonscope.steering.experiments.summaries import method_title
from reasonscope.steering.vectors.application import VectorUse
from reasonscope.steering.vectors.vector import SteeringVector

# Traces whose states say how long the stream is at a site.
_NORM_TRACES = 16


def vector_numbers(vector: SteeringVector) -> dict[str, Any]:
    """What a vector says about itself."""
    about = {key: value for key, value in vector.provenance.items() if key not in ("model", "groups")}
    return {
        "method": vector.method,
        "sign": vector.sign,
        "norms": {str(site): norm for site, norm in vector.norms.items()},
        "n_problems": len(vector.provenance.get("groups", ())),
        **about,
    }


def extraction_summary(
    name: str,
    uses: Sequence[VectorUse],
    store: TraceStore,
    ids: Sequence[str],
    *,
    files: Sequence[str] = (),
    next_command: str = "",
) -> Summary:
    """What was extracted, from how much, and how long each vector is beside the states that it will be added to."""
    each = [(use, site) for use in uses for site in use.vector.directions]
    norms = {site: _state_norm(store, ids, site) for site in dict.fromkeys(site for _, site in each)}
    rows = [
        (str(site), in_words(use.vector.norms[site]), in_words(_share(use, site, norms[site])), cosine)
        for (use, site), cosine in zip(each, _cosines_with_the_one_above(each), strict=True)
    ]
    sites = ", ".join(dict.fromkeys(str(site) for _, site in each))
    first = uses[0].vector
    length = "" if len(each) > 1 or rows[0][2] == "–" else f"; its norm is {rows[0][2]} of the state's"
    vectors = "vector" if len(each) == 1 else f"vectors ({len(each)})"
    return Summary(
        finding=f"{method_title(name)} {vectors} at {sites} from {_sources(first)}{length}.",
        columns=("site", "norm", "norm / norm of the state", "cosine with the one above"),
        rows=rows if len(each) > 1 else (),
        notes=[f"A positive strength goes {first.sign}."] if first.sign else [],
        files=files,
        next_command=next_command,
    )


def _state_norm(store: TraceStore, ids: Sequence[str], site: Site) -> float | None:
    """The mean norm of the states at `site` along the thinking of the first traces; None if the run did not store them."""
    if str(site) not in store.sites:
        return None
    states = thinking_states(store, ids[:_NORM_TRACES], site)
    return float(np.linalg.norm(states, axis=1).mean()) if len(states) else None


def _share(use: VectorUse, site: Site, norm: float | None) -> float | None:
    return None if norm is None else use.vector.norms[site] / norm


def _cosines_with_the_one_above(each: Sequence[tuple[VectorUse, Site]]) -> list[str]:
    directions = [use.vector.directions[site] for use, site in each]
    return ["", *(in_words(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))) for a, b in pairwise(directions))]


def _sources(vector: SteeringVector) -> str:
    """`12 problems (112 steps)`, from what the extraction noted."""
    about = vector.provenance
    problems = plural(len(about.get("groups", ())), "problem")
    if "steps" in about:
        return f"{problems} ({sum(about['steps'].values())} steps)"
    return f"{problems} ({about['pairs']} pairs)" if "pairs" in about else problems
