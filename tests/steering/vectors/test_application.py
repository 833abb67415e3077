"""A use says where and how a vector acts; its random control moves every state as far."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Positions
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Clamp, Scope, SteeringVector, VectorUse, as_intervention, clamped
from reasonscope.steering.methods.asc import extract_asc
from reasonscope.steering.methods.seal import extract_seal
from reasonscope.steering.methods.thinking_speed import extract_speed_of_modes
from reasonscope.steering.vectors.application import check_uses

SITES = [Site("resid_post", layer) for layer in range(2)]
STATES = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
WHERE = Positions(index=torch.arange(5)[None], ids=torch.arange(5)[None])


def made(sites=SITES, **about):
    draws = np.random.default_rng(0).standard_normal((len(sites), 8)).astype(np.float32)
    return SteeringVector(directions=dict(zip(sites, draws, strict=True)), method="test", provenance=about)


def moved(part, multiplier=1.0):
    ((_, edit),) = as_intervention([part], multiplier).edits.items()
    return (edit(STATES, WHERE) - STATES)[0]


def test_a_clamp_at_each_site_goes_to_what_the_extraction_noted():
    levels = {"resid_post.0": 2.0, "resid_post.1": -3.0}
    parts = clamped(made(towards=levels), Scope())
    assert [part.operator.to for part in parts] == [2.0, -3.0]
    for part, site in zip(parts, SITES, strict=True):
        (unit,) = part.vector.normalised().directions.values()
        after = STATES[0] + moved(part)
        torch.testing.assert_close(after @ torch.from_numpy(unit), torch.full((5,), levels[str(site)]))


def test_strengths_multiply_and_moves_are_measured_unless_told_otherwise():
    use = VectorUse(vector=made(SITES[:1]), scope=Scope(), strength=2.0)
    torch.testing.assert_close(moved(use, 3.0), 6 * torch.from_numpy(use.vector.directions[SITES[0]]).expand(5, -1))
    for measure in (True, False):
        steering = as_intervention([use], 3.0) if measure else as_intervention([use], 3.0, measure=False)
        ((_, edit),) = steering.edits.items()
        edit(STATES, WHERE)
        assert {str(site): len(found) for site, found in steering.distances.items()} == (
            {"resid_post.0": 5} if measure else {}
        )


def test_uses_are_checked_before_they_steer():
    model = load_model("organism")
    with pytest.raises(InputError, match="no vector to steer with"):
        check_uses([], model)
    with pytest.raises(InputError, match="a vector of width 8"):
        check_uses([VectorUse(vector=made(), scope=Scope())], model)
    fits = {SITES[0]: np.ones(model.d_model, np.float32)}
    check_uses([VectorUse(vector=replace(made(SITES[:1]), directions=fits), scope=Scope())], model)


def test_a_clamp_of_several_sites_is_refused():
    with pytest.raises(InputError, match="2 sites"):
        VectorUse(vector=made(), scope=Scope(), operator=Clamp(to=1.0))


def test_modes_are_contrasted_at_step_openings(written_store):
    """States are [token id, index, 1, 1]: at separators the id is the same for all, and the index tells brief from default."""
    rows = []
    for i in range(3):
        for mode, thinking in (("brief", "ab\n\ncd\n\ne"), ("default", "abcdefgh\n\nWait, ij\n\nklmnop\n\nq")):
            problem = Problem(id=f"p{i}-{mode}", prompt="q", answer="1", group=f"p{i}", meta={"mode": mode})
            rows.append((problem, 0, thinking, "\\boxed{1}"))
    store = written_store(rows)
    (site,) = sites = [Site("resid_post", 0)]
    at = {}
    for trace in store:
        pieces = [
            store.activations(trace.id, "resid_post.0")[j]
            for j, token in enumerate(trace.token_ids)
            if _blank(trace, j)
        ]
        at.setdefault(trace.problem.meta["mode"], np.mean(pieces, axis=0))
    vector = extract_asc(store, sites, read="separators", verbose="default")
    np.testing.assert_allclose(vector.directions[site], at["brief"] - at["default"], atol=1e-5)
    unit = vector.directions[site] / vector.norms[site]
    assert vector.provenance["towards"]["resid_post.0"] == pytest.approx(float(at["brief"] @ unit), rel=1e-5)
    speed = extract_speed_of_modes(store, sites, read="separators")
    assert speed.directions[site] @ unit == pytest.approx(1.0, abs=1e-5)
    seal = extract_seal(store, site, away_from=("reflection",))
    assert seal.provenance["towards"].keys() == {"resid_post.0"}
    with pytest.raises(InputError, match="in the modes brief and detail"):
        extract_asc(store, sites, read="separators")


def _blank(trace, j):
    start, stop = trace.offsets[j]
    return j in range(*trace.tokens.thinking.slice.indices(10**6)) and "\n\n" in trace.text[start:stop]
