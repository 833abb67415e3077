"""Neurons, experts, directions and latents: what is named goes, by its own formula; a move as far is as far, and turned."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError, SiteError
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.layout import chosen_experts
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Ablation, Recipe, RecipePart, SteeringVector
from reasonscope.steering.ablation.controls import random_ablations
from reasonscope.steering.ablation.dictionaries import Dictionary, Latents
from reasonscope.steering.ablation.directions import Directions
from reasonscope.steering.ablation.interventions import AblationIntervention, MatchedMove, _projected, _turn
from reasonscope.steering.ablation.targets import Neuron
from reasonscope.steering.methods.expert_routing import Expert

SITE = Site("resid_post", 2)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def ids(model):
    return torch.tensor([model.encode_text("Mia has 14 apples. She buys 7 more apples.")])


def states(model, ids, intervention, *sites):
    write = None if intervention is None else intervention.edits
    return model.backend.forward(ids, mask=torch.ones_like(ids), read=sites, write=write).activations


def dictionary_file(folder, model, *, n=12, seed=0, **more):
    rng = np.random.default_rng(seed)
    d = model.d_model
    weights = {
        "W_enc": rng.standard_normal((d, n)),
        "b_enc": rng.standard_normal(n),
        "W_dec": rng.standard_normal((n, d)),
        "b_dec": rng.standard_normal(d),
        **more,
    }
    path = folder / "sae_weights.safetensors"
    save_file({name: np.ascontiguousarray(array, dtype=np.float32) for name, array in weights.items()}, path)
    return path


def test_neurons_are_zeroed_and_the_others_stay(model, ids):
    site = Site("mlp_post", 3)
    plain = states(model, ids, None, site)[site]
    named = Ablation(name="n", neurons=(Neuron(layer=3, index=5), Neuron(layer=3, index=9)))
    after = states(model, ids, AblationIntervention(model, named), site)[site]
    assert (after[..., [5, 9]] == 0).all()
    rest = [i for i in range(plain.shape[-1]) if i not in (5, 9)]
    assert torch.equal(after[..., rest], plain[..., rest])
    others = random_ablations(model, named, n_controls=20)
    assert len(others) == 20 and all(len(one.neurons) == 2 for one in others)
    assert not any(set(one.neurons) & set(named.neurons) for one in others)


def test_an_expert_is_never_chosen_and_the_next_one_takes_its_place(character_tokenizer):
    model = load_model(tiny_model("qwen3_moe"), tokenizer=character_tokenizer)
    ids, site = torch.tensor([[5, 6, 7, 8, 9, 10]]), Site("router", 0)
    router = model.layout.block(model.hf, 0).get_submodule(model.layout.of_block[0].router)
    gone = Ablation(name="e", experts=(Expert(0, 1),))
    before, after = (
        chosen_experts(router, states(model, ids, one, site)[site].flatten(0, 1))
        for one in (None, AblationIntervention(model, gone))
    )
    assert (before == 1).any() and not (after == 1).any() and before.shape == after.shape
    assert {one.experts for one in random_ablations(model, gone)} == {(Expert(0, i),) for i in (0, 2, 3)}
    with pytest.raises(InputError, match=r"expert 4 at router\.0: this block has experts 0 to 3"):
        AblationIntervention(model, Ablation(name="e", experts=(Expert(0, 4),)))
    with pytest.raises(SiteError, match="router"):
        AblationIntervention(model, Ablation(name="e", experts=(Expert(1, 0),)))
    with pytest.raises(InputError, match="how: zero"):
        Ablation(name="e", experts=(Expert(0, 1),), how="mean")


@pytest.mark.parametrize("kind", ["probe", "recipe", "vector"])
def test_a_direction_is_projected_out_whatever_file_it_comes_from(model, ids, tmp_path, kind):
    rng, path = np.random.default_rng(1), tmp_path / "direction.safetensors"
    direction = rng.standard_normal(model.d_model).astype(np.float32)
    vector = SteeringVector(directions={SITE: direction}, method="made")
    if kind == "probe":
        LinearProbe(
            coef=direction.astype(np.float64), intercept=0.0, site=SITE, task="binary", method="made", model={}
        ).save(path)
    elif kind == "recipe":
        Recipe(name="made", parts=(RecipePart(vector=vector),)).save(path)
    else:
        vector.save(path)
    found = Directions.load(path)
    unit = torch.from_numpy(direction / np.linalg.norm(direction))
    plain = states(model, ids, None, SITE)[SITE]
    after = states(model, ids, AblationIntervention(model, Ablation(name="d", directions=found)), SITE)[SITE]
    torch.testing.assert_close(after @ unit, torch.zeros_like(after @ unit), atol=1e-3, rtol=0)
    torch.testing.assert_close(after, plain - (plain @ unit)[..., None] * unit, atol=1e-3, rtol=1e-4)
    half = AblationIntervention(model, Ablation(name="d", directions=found, strength=0.5))
    torch.testing.assert_close(states(model, ids, half, SITE)[SITE], (plain + after) / 2, atol=1e-3, rtol=1e-4)
    bank = {SITE: torch.randn(50, model.d_model, generator=torch.Generator().manual_seed(0))}
    mean = AblationIntervention(model, Ablation(name="d", directions=found, how="mean"), bank)
    kept = states(model, ids, mean, SITE)[SITE]
    torch.testing.assert_close(
        (kept @ unit).flatten(), (bank[SITE].mean(0) @ unit).expand(ids.shape[1]), atol=1e-3, rtol=0
    )


def test_latents_take_away_what_they_write_and_leave_the_error(model, ids, tmp_path):
    dictionary = Dictionary.load(dictionary_file(tmp_path, model))
    latents = Latents(dictionary=dictionary, site=SITE, chosen=(2, 7))
    plain = states(model, ids, None, SITE)[SITE]
    after = states(model, ids, AblationIntervention(model, Ablation(name="l", latents=latents)), SITE)[SITE]
    active = (plain @ torch.from_numpy(dictionary.w_enc) + torch.from_numpy(dictionary.b_enc)).relu()
    written = active[..., [2, 7]] @ torch.from_numpy(dictionary.w_dec)[[2, 7]]
    assert (active[..., [2, 7]] > 0).any()
    torch.testing.assert_close(after, plain - written, atol=1e-2, rtol=1e-3)


def test_a_dictionary_may_have_thresholds_or_keep_the_top_only(model, tmp_path):
    rows = torch.randn(6, model.d_model, generator=torch.Generator().manual_seed(0))
    path = dictionary_file(tmp_path, model)
    plain = Dictionary.load(path).latents(rows)
    top = Dictionary.load(path, top=3).latents(rows)
    assert ((top > 0).sum(dim=1) <= 3).all() and torch.equal(top[top > 0], plain[top > 0])
    path.with_name("cfg.json").write_text(json.dumps({"k": 2, "apply_b_dec_to_input": True}), encoding="utf-8")
    by_settings = Dictionary.load(path)
    assert (by_settings.top, by_settings.centred) == (2, True)
    jump = Dictionary.load(dictionary_file(tmp_path, model, threshold=np.full(12, 5.0)), top=None)
    assert ((jump.latents(rows) == 0) | (jump.latents(rows) > 5)).all()


def test_a_dictionary_of_another_shape_or_file_is_refused_in_one_line(model, tmp_path):
    with pytest.raises(InputError, match=r"W_enc has to be \(d_model, latent\)"):
        Dictionary.load(dictionary_file(tmp_path, model, W_dec=np.zeros((model.d_model, 12))))
    with pytest.raises(InputError, match="has no W_dec"):
        save_file(
            {"W_enc": np.zeros((2, 3)), "b_enc": np.zeros(3), "b_dec": np.zeros(2)}, tmp_path / "half.safetensors"
        )
        Dictionary.load(tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        Dictionary.load(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="latents 0 to 11"):
        Latents(dictionary=Dictionary.load(dictionary_file(tmp_path, model)), site=SITE, chosen=(12,))
    narrow = Dictionary(
        w_enc=np.zeros((3, 2), np.float32), b_enc=np.zeros(2, np.float32), w_dec=np.zeros((2, 3), np.float32), b_dec=np.zeros(3, np.float32)
    )  # fmt: skip
    with pytest.raises(InputError, match=r"a dictionary of width 3 at resid_post\.2"):
        AblationIntervention(model, Ablation(name="l", latents=Latents(dictionary=narrow, site=SITE, chosen=(0,))))
    thin = Directions.of({SITE: [np.ones(3)]}, source="thin")
    with pytest.raises(InputError, match=r"thin: width 3 at resid_post\.2, but the states of this model are 128 wide"):
        AblationIntervention(model, Ablation(name="d", directions=thin))
    with pytest.raises(InputError, match="has length 0"):
        Directions.of({SITE: [np.zeros(4)]})


@pytest.mark.parametrize(
    "target",
    [
        {"heads": (Head(layer=1, index=2), Head(layer=3, index=0))},
        {"mlps": (2,)},
        {"neurons": (Neuron(layer=2, index=1),)},
        {"directions": Directions.of({SITE: [np.eye(128)[3]], Site("resid_post", 4): [np.ones(128)]})},
    ],
    ids=lambda target: next(iter(target)),
)
def test_a_move_as_far_is_as_far_at_every_token_and_elsewhere(model, ids, target):
    ablation = Ablation(name="a", **target, strength=0.7)
    true = AblationIntervention(model, ablation)
    sites = list(ablation.parts)
    plain = states(model, ids, None, *sites)
    after = states(model, ids, true, *sites)
    control = MatchedMove(model, ablation, like=true, draw=1)
    moved = states(model, ids, control, *sites)
    for site in sites:
        assert float(true.moved[site].min()) > 0
        torch.testing.assert_close(control.moved[site], true.moved[site], rtol=1e-3, atol=1e-4)
    first = sites[0]
    module = model.layout.module(model.hf, first)
    ours, theirs = (_projected(module, first, (one[first] - plain[first])[0]) for one in (after, moved))
    torch.testing.assert_close(ours.norm(dim=-1), theirs.norm(dim=-1), rtol=1e-3, atol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert float(cosines.abs().max()) < 0.6


def test_turning_keeps_lengths_and_angles():
    rows = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0))
    turned = _turn(rows, 4)
    torch.testing.assert_close(turned.flatten(1) @ turned.flatten(1).T, rows.flatten(1) @ rows.flatten(1).T)
    assert torch.equal(turned, _turn(rows, 4)) and not torch.allclose(turned, _turn(rows, 5))


def test_tokens_without_a_move_stay_where_they_are(model, ids):
    site = Site("mlp_out", 2)
    scoped = Ablation(name="a", mlps=(2,))
    _, plain = run_with_cache(model, ids, [site])
    true = AblationIntervention(model, scoped)
    states(model, ids, true, site)
    true.moved[site] = torch.zeros_like(true.moved[site])
    after = states(model, ids, MatchedMove(model, scoped, like=true), site)[site]
    torch.testing.assert_close(after, plain[site])
