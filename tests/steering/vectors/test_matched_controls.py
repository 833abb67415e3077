"""A random control moves every state as far as the edit that it is compared with: per block, in total, and for every operator."""

import numpy as np
import pytest
import torch

from reasonscope.data.errors import SiteError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Positions
from reasonscope.steering import Clamp, Scope, SteeringVector, VectorUse, as_intervention, clamped
from reasonscope.steering.vectors.intervention import mean_distances, mean_moves
from reasonscope.steering.vectors.matched_controls import random_uses
from reasonscope.steering.vectors.operators import OPERATORS
from reasonscope.steering.vectors.vector import rotated_together

WIDTH, LAYERS = 64, 6
SITES = [Site("resid_post", layer) for layer in range(LAYERS)]
GENERATOR = torch.Generator().manual_seed(0)
STREAM = torch.randn(LAYERS, 2, 9, WIDTH, generator=GENERATOR).cumsum(0)  # what each block would leave without edits
WHERE = Positions(index=torch.arange(9).expand(2, 9), ids=torch.arange(9).expand(2, 9))


def vector(seed=0, agree=3.0):
    """Directions that agree between blocks, as those of real methods do."""
    rng = np.random.default_rng(seed)
    shared = agree * rng.standard_normal(WIDTH)
    drawn = {site: (shared + rng.standard_normal(WIDTH)).astype(np.float32) for site in SITES}
    return SteeringVector(directions=drawn, method="test", provenance={"towards": {str(s): 2.0 for s in SITES}})


def walked(uses, multiplier=1.0):
    """Distances moved by site, (edit,), when every edit is carried on by the residual stream to the blocks after it."""
    return walk(uses, multiplier).distances


def walk(uses, multiplier=1.0, respond=lambda moved: moved):
    """The intervention after a walk through the blocks; `respond` is what each block makes of the moves before it."""
    intervention = as_intervention(uses, multiplier)
    moved = torch.zeros_like(STREAM[0])
    edits = intervention.edits
    for site, states in zip(SITES, STREAM, strict=True):
        before = states + respond(moved)
        moved = respond(moved) + (edits[site](before, WHERE) - before)
    return intervention


def uses_of(name):
    if name == "clamp":
        return clamped(vector(), Scope())
    return (VectorUse(vector=vector(), scope=Scope(), operator=OPERATORS[name]),)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", ["add", "scaled_add", "ablate", "orthogonal_add", "rotate", "clamp"])
def test_a_control_moves_states_as_far_at_every_block(name, strength):
    true = walked(uses_of(name), strength)
    for seed in range(3):
        control = walked(random_uses(uses_of(name), seed), strength)
        assert control.keys() == true.keys()
        exact = name in ("add", "clamp", "ablate", "orthogonal_add")
        for site in SITES:
            if exact:  # token by token: they do not depend on where the state was moved to
                np.testing.assert_allclose(control[site], true[site], rtol=1e-4, atol=1e-4)
            assert control[site].mean() == pytest.approx(true[site].mean(), rel=0.2)


@pytest.mark.parametrize("multiplier", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("name", ["ablate", "orthogonal_add", "clamp"])
def test_with_measured_moves_a_control_moves_states_as_far_whatever_the_blocks_do(name, multiplier):
    """Here blocks undo nearly all of an edit along the true directions, and double any other: without measuring, the control is too far."""
    true = torch.from_numpy(np.stack(list(vector().directions.values())))
    basis = torch.linalg.qr(true.T)[0]

    def respond(moved):
        along = moved @ basis @ basis.T
        return 0.1 * along + 2 * (moved - along)

    uses = uses_of(name)
    real = walk(uses, multiplier, respond)
    told = mean_distances(real)
    for seed in range(3):
        drawn = random_uses(uses, seed, moves=mean_moves(real))
        control = walk(drawn, multiplier, respond)
        assert mean_distances(control) == pytest.approx(told, rel=1e-4)
        assert sum(mean_distances(control).values()) == pytest.approx(sum(told.values()), rel=1e-4)
        before = mean_distances(walk(random_uses(uses, seed), multiplier, respond))
        if name == "clamp" and multiplier > 0:
            assert before != pytest.approx(told, rel=0.1)


@pytest.mark.parametrize("multiplier", [0.3, -0.3])
@pytest.mark.parametrize("name", ["scaled_add", "rotate"])
def test_shares_of_the_norm_are_scaled_by_what_one_control_moved(name, multiplier):
    """Blocks carry on less of what is along the true directions; large states are still moved farther than small ones."""
    true = torch.from_numpy(np.stack(list(vector().directions.values())))
    basis = torch.linalg.qr(true.T)[0]

    def respond(moved):
        along = moved @ basis @ basis.T
        return 0.8 * along + 1.05 * (moved - along)

    clamps, uses = clamped(vector(1), Scope(prompt_positions=(0,))), uses_of(name)
    for given in (uses, (*clamps, *uses)):
        moves = mean_moves(real := walk(given, multiplier, respond))
        pilot = walk(random_uses(given, 0, moves=moves), multiplier, respond)
        assert mean_distances(pilot) != pytest.approx(mean_distances(real), rel=0.05)
        for seed in range(3):
            pilot = walk(random_uses(given, seed, moves=moves), multiplier, respond)
            for _ in range(3):
                drawn = random_uses(given, seed, moves=moves, pilot=mean_moves(pilot))
                pilot = walk(drawn, multiplier, respond)
            assert mean_distances(pilot) == pytest.approx(mean_distances(real), rel=0.01)
        spread = [values.std() / values.mean() for values in pilot.distances.values()]
        assert min(spread) > 0.02


def test_measured_controls_keep_the_signs_of_the_moves():
    """A clamp that takes states back at a block has a control that takes them back there: along its own direction."""
    own = vector()
    uses = clamped(own, Scope())
    moves = tuple({site: (-1.0) ** i * (i + 1)} for i, site in enumerate(SITES))
    drawn = random_uses(uses, 0, moves=moves)
    found = np.stack([use.vector.directions[site] for use, site in zip(drawn, SITES, strict=True)]).astype(np.float64)
    true = np.stack([own.directions[site] for site in SITES]).astype(np.float64)
    meant = true / np.linalg.norm(true, axis=1, keepdims=True) * [[next(iter(one.values()))] for one in moves]
    np.testing.assert_allclose(found @ found.T, meant @ meant.T, rtol=1e-3, atol=1e-4)


def test_vectors_at_one_site_count_alike_in_the_distance():
    """The last prompt token was moved by 6 and three others by 2 each: 4 on average, whatever the length of the text."""
    directions = {SITES[0]: np.eye(WIDTH, dtype=np.float32)[0]}
    moves = [(Scope(prompt_positions=(0,)), 6.0), (Scope(prompt_positions=(1, 2, 3)), 2.0)]
    uses = [
        VectorUse(vector=SteeringVector(directions=directions, method="t") * by, scope=scope) for scope, by in moves
    ]
    intervention = as_intervention(uses, 1.0)
    intervention.edits[SITES[0]](STREAM[0], WHERE)
    assert mean_distances(intervention) == pytest.approx({SITES[0]: 4.0})
    assert [dict(one) for one in mean_moves(intervention)] == [{SITES[0]: pytest.approx(by)} for _, by in moves]


def test_directions_turn_together_and_elsewhere():
    made = vector()
    drawn = made.random_like(3)
    own, other = (np.stack([v.directions[site] for site in SITES]) for v in (made, drawn))
    np.testing.assert_allclose(other @ other.T, own @ own.T, rtol=1e-4)
    cosines = (own * other).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(other, axis=1)
    assert np.abs(cosines).max() < 0.5


def test_the_rotation_is_uniform():
    """Of 2,000 draws of one direction in three dimensions the first coordinate is uniform on [-1, 1] (Archimedes)."""
    rng = np.random.default_rng(0)
    first = np.array([rotated_together(np.array([[1.0, 0.0, 0.0]]), rng)[0, 0] for _ in range(2000)])
    found = np.abs(np.sort(first) - np.linspace(-1, 1, 2000)).max() / 2
    assert found < 1.36 / np.sqrt(2000)


def test_clamps_of_two_scopes_do_not_share_what_they_moved():
    first, rest = Scope(prompt_positions=(0,)), Scope(prompt_positions=(1, 2, 3))
    uses = (*clamped(vector(), first), *clamped(vector(1), rest))
    true, control = walked(uses), walked(random_uses(uses, 0))
    for site in SITES:
        np.testing.assert_allclose(control[site], true[site], rtol=1e-4, atol=1e-4)


def test_one_intervention_does_not_disturb_another():
    control = random_uses(clamped(vector(), Scope()), 0)
    alone = walked(control)
    one, two = as_intervention(control, 1.0), as_intervention(control, 1.0)
    moved = torch.zeros_like(STREAM[0])
    for site, states in zip(SITES, STREAM, strict=True):
        before = states + moved
        after = one.edits[site](before, WHERE)
        two.edits[site](states[:1], Positions(index=WHERE.index[:1], ids=WHERE.ids[:1]))
        moved = moved + (after - before)
    for site in SITES:
        np.testing.assert_allclose(one.distances[site], alone[site], rtol=1e-6)
    assert mean_distances(one)[SITES[0]] == pytest.approx(alone[SITES[0]].mean())


def test_with_states_the_directions_have_their_covariance_and_stay_in_step():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, WIDTH)) * np.linspace(0.01, 3, WIDTH)
    states = {site: rows + 0.1 * rng.standard_normal(rows.shape) for site in SITES}
    (use,) = random_uses(uses_of("add"), 0, states=states)
    drawn = np.stack([use.vector.directions[site] for site in SITES])
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    assert (unit @ unit.T).min() > 0.8
    assert np.abs(drawn[:, WIDTH // 2 :]).mean() > 2 * np.abs(drawn[:, : WIDTH // 2]).mean()
    with pytest.raises(SiteError, match=r"resid_post\.0"):
        random_uses(uses_of("add"), 0, states={})


def test_a_clamp_to_where_the_state_is_moves_nothing():
    states = torch.zeros(1, 4, WIDTH)
    uses = (
        VectorUse(
            vector=SteeringVector(directions={SITES[0]: vector().directions[SITES[0]]}, method="t"),
            scope=Scope(),
            operator=Clamp(to=0.0),
        ),
    )
    for one in (uses, random_uses(uses, 1)):
        after = as_intervention(one, 1.0).edits[SITES[0]](
            states, Positions(index=torch.arange(4)[None], ids=torch.arange(4)[None])
        )
        torch.testing.assert_close(after, states)


def test_a_control_says_what_was_matched():
    states = {site: np.random.default_rng(0).standard_normal((50, WIDTH)) for site in SITES}
    for drawn_from, matched in ((None, "norm and cosines"), (states, "norm and covariance")):
        (control, *_) = random_uses(uses_of("add"), 3, states=drawn_from)
        assert (control.vector.provenance["matched"], control.vector.provenance["seed"]) == (matched, 3)


def test_edits_of_one_scope_are_a_chain_in_the_order_of_the_stream():
    """Whatever the order of the uses: before a block, after its attention, after its MLP, after the block."""
    points = ("resid_post", "mlp_out", "attn_out", "resid_pre")
    direction = np.ones(WIDTH, dtype=np.float32)
    uses = [
        VectorUse(
            vector=SteeringVector(directions={Site(point, layer): direction}, method="test"),
            scope=Scope(),
            operator=OPERATORS["ablate"],
        )
        for layer in (1, 0)
        for point in points
    ]
    for n in range(len(points)):
        for given in (uses[:4][n:], uses[n:]):
            found = random_uses(given, 0)
            opening = [site for use in found if use.operator.opens for site in use.vector.directions]
            assert opening == [Site("resid_pre", min(site.layer for use in given for site in use.vector.directions))]
    for pair in (points[:2], points[1:3], points[2:]):  # neighbours in the stream, the later one given first
        found = random_uses([use for use in uses[:4] for site in use.vector.directions if site.point in pair], 0)
        assert [use.operator.opens for use in found] == [False, True]
