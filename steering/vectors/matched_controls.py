"""Controls of a steering edit: random directions that move states as far as the edit itself, at the same tokens and blocks.

Two things make a random direction an unfair control. Vectors at several blocks agree with one another (neighbouring cosines of .7 to .85),
and independent draws do not, so that their effects cancel: here one random rotation turns all directions together. And a clamp moves a
state only by what is missing, which depends on what the model made of the edits before it: a model that has taken the hint needs little
more, and one that was pushed anywhere else needs much. So the control of such an edit adds, at each place, the mean distance by which the
real edit moved states there in its run (`moves`). Before that run, it can only assume that blocks carry edits on unchanged.

An edit by a share of each state's norm (`scaled_add`, `rotate`) has a control by a share of it too, so that both move large states
farther. Norms depend on what was edited and written before, so the same share moves states of the control a few per cent farther or less
far. A run of the control (`pilot`) says by how much, and its share is scaled by that at each site.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import SiteError
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.vectors.application import VectorUse
from reasonscope.steering.vectors.operators import (
    Clamp,
    MatchedEdit,
    Operator,
    ablate,
    add,
    orthogonal_add,
    rotate,
    scaled_add,
)
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import covariance_matched, rotated_together

_ORDER = {"resid_pre": 0, "attn_out": 1, "mlp_out": 2, "resid_post": 3}


def random_uses(
    uses: Sequence[VectorUse],
    seed: int,
    *,
    states: Mapping[Site, NDArray[Any]] | None = None,
    moves: Sequence[Mapping[Site, float]] = (),
    pilot: Sequence[Mapping[Site, float]] = (),
) -> tuple[VectorUse, ...]:
    """Draw the control of `uses`: random directions that move each state as far, with the same scopes.

    Args:
        uses: The vectors of a method, each with its scope and operator.
        seed: Seed of the rotation, which turns all directions of all uses together and so keeps norms and mutual cosines.
        states: (row, d_model) by site: draw from their covariance instead of evenly. The same rows (tokens) at every site keep the
            directions of the sites in step.
        moves: For each use how far it moved a token, by site, in a run at the multiplier of the control: `moves` of its arm. Edits whose
            size depends on the state (a clamp, `ablate`, `orthogonal_add`) then get a control that moves every token by that distance.
            Without it, the control moves states by what the edit would if blocks carried edits on unchanged; over several blocks of a
            real model that is too far.
        pilot: The `moves` of this control in a run, itself drawn with a pilot or without: `scaled_add` and `rotate` are scaled so that they
            move a token as far as the real ones did, at each site. Without it, they keep the share.

    Returns:
        As many uses; one whose sites need different operators or strengths is split into one for each.

    Raises:
        SiteError: A site has no states to draw from.

    Example:
        (arm,) = experiment.arms(method_conditions("asc", uses, 1.0))
        control = random_uses(uses, seed=0, moves=arm.moves)
        experiment.arms(method_conditions("random", control, 1.0))
    """
    places = [(i, site) for i, use in enumerate(uses) for site in use.vector.directions]
    true = np.stack([uses[i].vector.directions[site] for i, site in places]).astype(np.float64)
    drawn = (
        rotated_together(true, np.random.default_rng(seed))
        if states is None
        else _in_covariance(places, true, states, seed)
    )
    by_use: dict[int, dict[Site, NDArray[np.float32]]] = {}
    for (i, site), direction in zip(places, drawn, strict=True):
        by_use.setdefault(i, {})[site] = direction.astype(np.float32)
    matched = "norm and cosines" if states is None else "norm and covariance"
    random = [
        replace(use, vector=use.vector.as_random(by_use[i], seed=seed, matched=matched)) for i, use in enumerate(uses)
    ]
    chains, moved, tried = _chains(uses), [*moves] or [{}] * len(uses), iter(pilot)
    found = list[VectorUse]()
    for i, use in enumerate(random):
        if is_a_share(use):
            own = {site: by for one in islice(tried, len(use.vector.directions)) for site, by in one.items()}
            found += _scaled(use, moved[i], own)
        else:
            parts = _matched(uses[i], use, {at: c for (n, at), c in chains.items() if n == i}, moved[i])
            found += parts
            next(islice(tried, len(parts), len(parts)), None)  # what these moved says nothing about shares
    return tuple(found)


def needs_a_run(uses: Sequence[VectorUse]) -> bool:
    """Whether it takes a run of `uses` to know how far they move states: whether any edit depends on what was done before it."""
    return any(_depends_on_the_state(use.operator) or is_a_share(use) for use in uses)


def is_a_share(use: VectorUse) -> bool:
    """Whether it moves a state by a share of its norm, so that its control needs a pilot."""
    return use.operator in (scaled_add, rotate)


def _scaled(random: VectorUse, moves: Mapping[Site, float], own: Mapping[Site, float]) -> list[VectorUse]:
    """A use for each site, whose share is scaled from what a control moves at multiplier 1, if it is known, to what the real edit moves."""
    return [
        replace(
            _at(random, site, random.operator),
            strength=random.strength * (abs(moves[site] / own[site]) if site in own else 1.0),
        )
        for site in random.vector.directions
    ]


def _in_covariance(
    places: Sequence[tuple[int, Site]], true: Values, states: Mapping[Site, NDArray[Any]], seed: int
) -> Values:
    if missing := [str(site) for _, site in places if site not in states]:
        raise SiteError(f"no states of {missing[0]} to draw from; give those of every site of the vectors")
    norms = np.linalg.norm(true, axis=1)
    return np.stack(
        [
            covariance_matched(states[site], norm=float(norm), seed=seed)
            for (_, site), norm in zip(places, norms, strict=True)
        ]
    )


def _chains(uses: Sequence[VectorUse]) -> dict[tuple[int, Site], tuple[int, bool]]:
    """For each edit of `uses` whose size depends on the state: the number of its chain (one per scope), and whether it comes first."""
    scopes: list[Scope] = []
    found: dict[tuple[int, Site], tuple[int, bool]] = {}
    places = [
        (i, site) for i, use in enumerate(uses) if _depends_on_the_state(use.operator) for site in use.vector.directions
    ]
    for i, site in sorted(places, key=lambda place: (place[1].layer, _ORDER[place[1].point], place[0])):
        opens = uses[i].scope not in scopes
        if opens:
            scopes.append(uses[i].scope)
        found[i, site] = scopes.index(uses[i].scope), opens
    return found


def _depends_on_the_state(operator: Operator) -> bool:
    return operator in (ablate, orthogonal_add) or isinstance(operator, Clamp)


def _matched(
    use: VectorUse, random: VectorUse, chains: Mapping[Site, tuple[int, bool]], moves: Mapping[Site, float]
) -> list[VectorUse]:
    """The random use, with operators that move states as far as `use` does."""
    if not chains:
        return [random]
    return [
        _by(random, site, moves[site]) if site in moves else _at(random, site, _in_step(use, site, chain, opens))
        for site, (chain, opens) in chains.items()
    ]


def _in_step(use: VectorUse, site: Site, chain: int, opens: bool) -> Operator:
    return MatchedEdit(like=use.operator, read=use.vector.directions[site], chain=chain, opens=opens)


def _by(use: VectorUse, site: Site, distance: float) -> VectorUse:
    """One site of a use, which adds `distance` along its direction at multiplier 1."""
    direction = use.vector.directions[site]
    length = np.linalg.norm(direction.astype(np.float64))
    scaled = (direction * (distance / length)).astype(np.float32)
    return replace(use, vector=replace(use.vector, directions={site: scaled}, norm="raw"), operator=add)


def _at(use: VectorUse, site: Site, operator: Operator) -> VectorUse:
    """One site of a use, with an operator of its own."""
    alone = replace(use.vector, directions={site: use.vector.directions[site]})
    return replace(use, vector=alone, operator=operator)
