"""Controls of an ablation: as many others of the same kind and layers, never the ablated ones, all different, and called what they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Ablation, Scope
from reasonscope.steering.ablation.controls import _random_edges, _RandomScope, control_words, random_ablations
from reasonscope.steering.ablation.dictionaries import Dictionary, Latents
from reasonscope.steering.ablation.directions import Directions
from reasonscope.steering.ablation.knockout import Edges
from reasonscope.steering.ablation.targets import Neuron
from reasonscope.steering.methods.expert_routing import Expert

SITE = Site("resid_post", 1)


@pytest.fixture(scope="module")
def model(character_tokenizer):
    return load_model(tiny_model("qwen3"), tokenizer=character_tokenizer)


@pytest.fixture(scope="module")
def mixture(character_tokenizer):
    return load_model(tiny_model("qwen3_moe"), tokenizer=character_tokenizer)


def texts(*lengths):
    """Traces of so many tokens, all of them different, the first three of each in the prompt."""
    return [
        SimpleNamespace(token_ids=np.arange(100 * i, 100 * i + n), n_prompt_tokens=3) for i, n in enumerate(lengths)
    ]


def blocks(n_layers, without=()):
    """Of a model only what the controls ask for: its number of layers, and those that have an attention or an MLP."""
    layers = [layer for layer in range(n_layers) if layer not in without]
    return SimpleNamespace(n_layers=n_layers, layout=SimpleNamespace(layers_with=lambda point: layers))


@pytest.mark.parametrize("kind", ["mlps", "layers"])
def test_other_layers_are_all_sets_or_as_many_as_asked(kind):
    def drawn(own, n_layers=8, **how):
        return [
            set(getattr(one, kind))
            for one in random_ablations(blocks(n_layers), Ablation(name="x", **{kind: own}), **how)
        ]

    assert sorted(map(min, drawn((2,)))) == [0, 1, 3, 4, 5, 6, 7]  # seven others: all of them
    two = drawn((2, 5), 20)
    assert len(two) == len({frozenset(one) for one in two}) == 20 and all(len(one) == 2 for one in two)
    assert not any(one & {2, 5} for one in two)
    assert drawn((2, 5), 20, seed=0) == two != drawn((2, 5), 20, seed=1)
    assert len(drawn((2, 5), 20, n_controls=7)) == 7
    assert drawn((0, 1), 4) == [{2, 3}]
    with pytest.raises(InputError, match=f"3 of 5 {kind} leave too few others"):
        drawn((0, 1, 2), 5)


def test_a_block_without_an_mlp_is_not_a_control_of_an_mlp():
    hybrid = blocks(6, without=(1, 4))
    assert {one.mlps for one in random_ablations(hybrid, Ablation(name="x", mlps=(0,)))} == {(2,), (3,), (5,)}
    assert {one.layers for one in random_ablations(hybrid, Ablation(name="x", layers=(0,)))} == {
        (layer,) for layer in range(1, 6)
    }


def test_other_neurons_and_experts_are_of_the_same_layers(model, mixture):
    own = (Neuron(layer=0, index=3), Neuron(layer=0, index=4), Neuron(layer=1, index=0))
    drawn = random_ablations(model, Ablation(name="x", neurons=own))
    assert len({one.neurons for one in drawn}) == 20
    for one in drawn:
        assert [neuron.layer for neuron in one.neurons] == [0, 0, 1] and not set(one.neurons) & set(own)
        assert len(set(one.neurons)) == 3 and list(one.neurons) == sorted(one.neurons)
    assert drawn == random_ablations(model, Ablation(name="x", neurons=own), seed=0)
    assert drawn != random_ablations(model, Ablation(name="x", neurons=own), seed=1)
    one_of_four = random_ablations(mixture, Ablation(name="x", experts=(Expert(0, 1),)))
    assert {one.experts for one in one_of_four} == {(Expert(0, i),) for i in (0, 2, 3)}
    assert [
        one.experts for one in random_ablations(mixture, Ablation(name="x", experts=(Expert(0, 0), Expert(0, 1))))
    ] == [(Expert(0, 2), Expert(0, 3))]
    with pytest.raises(InputError, match=r"3 of 4 at router\.0 leave only 1 others"):
        random_ablations(mixture, Ablation(name="x", experts=tuple(Expert(0, i) for i in range(3))))


def test_other_latents_are_those_that_fire():
    """Latents 0 to 5 of ten fire on some state, and 6 to 9 on none."""
    weights = np.eye(10, dtype=np.float32)
    dictionary = Dictionary(
        w_enc=weights, b_enc=np.zeros(10, np.float32), w_dec=weights, b_dec=np.zeros(10, np.float32)
    )
    states = torch.zeros(3000, 10)
    for i in range(6):
        states[500 * i, i] = 1.0
    states[:, 6:] = -1.0

    def drawn(*chosen, bank=None):
        ablation = Ablation(name="x", latents=Latents(dictionary=dictionary, site=SITE, chosen=chosen))
        return [one.latents.chosen for one in random_ablations(None, ablation, bank=bank)]

    assert set(drawn(0, bank={SITE: states})) == {(i,) for i in range(1, 6)}
    assert set(drawn(0)) == {(i,) for i in range(1, 10)}
    assert set(drawn(0, bank={Site("resid_post", 0): states})) == {(i,) for i in range(1, 10)}
    assert drawn(0, 1, 2, bank={SITE: states}) == [(3, 4, 5)]
    with pytest.raises(InputError, match="4 latents leave only 2 others that fire"):
        drawn(0, 1, 2, 3, bank={SITE: states})


def test_directions_have_no_others():
    basis = Directions(basis={SITE: np.eye(4)[:, :1]})
    assert random_ablations(None, Ablation(name="x", directions=basis)) == []


def test_random_tokens_differ_in_some_trace_and_are_as_many():
    traces = texts(9, 5)
    named = Scope(generation_window=(0, 2))
    for one in (Ablation(name="t", tokens=named), Ablation(name="e", edges=Edges(readers=Scope(), read=named))):
        drawn = random_ablations(None, one, traces)
        masks = [masks_of(other.tokens or other.edges.read, traces) for other in drawn]
        assert len(masks) == len(set(masks)) == 20
        for mask in masks:
            assert [sum(part) for part in mask] == [2, 2] and not any(any(part[3:5]) for part in mask)
        assert masks != [
            masks_of(other.tokens or other.edges.read, traces) for other in random_ablations(None, one, traces, seed=1)
        ]
    only = random_ablations(None, Ablation(name="t", tokens=named), texts(5))  # two of three are taken: three ways
    assert len(only) == 3
    assert len(random_ablations(None, Ablation(name="t", tokens=named), traces, n_controls=4)) == 4
    assert random_ablations(None, Ablation(name="t", tokens=Scope()), traces) == []
    assert len(random_ablations(None, Ablation(name="t", tokens=named), texts(60), n_controls=70)) == 70


def masks_of(scope, traces):
    found = []
    for trace in traces:
        ids, n_prompt = torch.from_numpy(trace.token_ids[None]), torch.tensor([trace.n_prompt_tokens])
        found.append(tuple(scope.mask(ids, n_prompt=n_prompt)[0].tolist()))
    return tuple(found)


def test_without_traces_random_edges_differ_in_their_seed():
    edges = Edges(readers=Scope(), read=Scope(prompt_window=(0, 3)), layers=(1,))
    drawn = _random_edges(edges, [], n_controls=3, seed=0)
    assert len({one.read.seed for one in drawn}) == 3 and {one.layers for one in drawn} == {(1,)}
    assert drawn[0].read.describe_draw() == {"seed": drawn[0].read.seed, "instead_of": {"prompt_window": [0, 3]}}


def test_every_other_token_is_drawn_as_often():
    named, ids = Scope(prompt_positions=(2,)), torch.arange(1, 9)[None]
    places = [int(_RandomScope.like(named, seed).mask(ids)[0].nonzero()) for seed in range(1400)]
    counts = np.bincount(places, minlength=8)
    assert counts[2] == 0 and abs(counts[[0, 1, 3, 4, 5, 6, 7]] - 200).max() < 45


def test_the_last_columns_of_a_draw_are_those_of_the_whole():
    drawn, ids = _RandomScope.like(Scope(prompt_positions=(2, 3)), 0), torch.arange(1, 9)[None]
    whole = drawn.mask(ids)
    for last in (1, 3, 8):
        assert torch.equal(drawn.mask(ids, last=last), whole[:, -last:])


def test_a_draw_is_the_same_in_any_batch():
    """The first text has other tokens of the region left, the second has not."""
    scope = Scope(tokens=frozenset({1}))
    ids = torch.tensor([[1, 5, 6, 7, 1, 8], [1, 1, 1, 1, 9, 1]])
    for seed in range(5):
        drawn = _RandomScope.like(scope, seed)
        alone = torch.cat([drawn.mask(row[None]) for row in ids])
        assert torch.equal(drawn.mask(ids), alone) and alone.sum(dim=1).tolist() == [2, 5]


def test_a_control_is_named_for_what_it_is():
    """Heads of other layers, or tokens that were removed too, make a weaker control, and its name says so."""
    heads = Ablation(name="h", heads=(Head(layer=0, index=0), Head(layer=1, index=0)))
    same = Ablation(name="r", heads=(Head(layer=0, index=1), Head(layer=1, index=3)))
    other = Ablation(name="r", heads=(Head(layer=0, index=1), Head(layer=0, index=3)))
    assert control_words(heads, [same], []) == "as many random heads of the same layers"
    assert control_words(heads, [same, other], []) == "as many random heads, of other layers too"
    plain = {
        "mlps": (1,), "layers": (1,), "neurons": (Neuron(layer=0, index=1),), "experts": (Expert(0, 1),),
    }  # fmt: skip
    said = {kind: control_words(Ablation(name="x", **{kind: named}), [], []) for kind, named in plain.items()}
    assert said == {
        "mlps": "as many random other MLPs",
        "layers": "as many random other layers",
        "neurons": "as many random neurons of the same layers",
        "experts": "as many random experts of the same layers",
    }
    for few, said in (
        (2, "as many random tokens of the same traces"),
        (5, "removed ones among them if too few others are left"),
    ):
        ablation = Ablation(name="t", tokens=Scope(generation_window=(0, few)))
        traces = texts(8)
        drawn = [Ablation(name="r", tokens=_RandomScope.like(ablation.tokens, 0))]
        assert control_words(ablation, drawn, traces).endswith(said)
        edges = Ablation(name="e", edges=Edges(readers=Scope(), read=ablation.tokens))
        cut = [Ablation(name="r", edges=Edges(readers=Scope(), read=drawn[0].tokens))]
        assert control_words(edges, cut, traces).startswith("edges to as many random tokens")
        assert ("removed ones" in control_words(edges, cut, traces)) == (few == 5)
