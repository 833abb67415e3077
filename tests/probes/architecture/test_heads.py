"""Heads are written as 2.1, and random ones to compare with are other heads, in different sets."""

from collections import Counter

import pytest

from reasonscope.data.errors import InputError
from reasonscope.probes.architecture.heads import Head, random_heads
from reasonscope.steering.ablation.controls import _of_same_layers


def heads(*names):
    return [Head.parse(name) for name in names]


def grid(n_layers, n_heads):
    return [Head(layer=layer, index=i) for layer in range(n_layers) for i in range(n_heads)]


def test_a_head_is_read_as_it_is_written():
    assert Head.parse("3.10") == Head(layer=3, index=10) and str(Head.parse("3.10")) == "3.10"
    for text in ("3", "3.", ".1", "a.1", "-1.0", "1.2.3", "1.²", "1.1234567890"):
        with pytest.raises(InputError, match="is not a head"):
            Head.parse(text)


def test_of_four_heads_every_other_set_is_drawn_once():
    assert sorted(random_heads(heads("1.2"), grid(3, 4))) == [(one,) for one in heads("1.0", "1.1", "1.3")]
    (pair,) = random_heads(heads("1.2", "1.0"), grid(3, 4))
    assert set(pair) == set(heads("1.1", "1.3"))
    across = random_heads(heads("0.0", "2.3"), grid(3, 4))
    wanted = {(f"0.{i}", f"2.{j}") for i in (1, 2, 3) for j in (0, 1, 2)}
    assert {tuple(map(str, sorted(one))) for one in across} == wanted and len(across) == 9


@pytest.mark.parametrize("n_heads", [4, 8, 16])
def test_sets_are_different_and_never_hold_a_chosen_head(n_heads):
    chosen = heads("0.0", "0.1", "2.3")
    sets = random_heads(chosen, grid(3, n_heads), n_controls=20, seed=5)
    assert len({frozenset(one) for one in sets}) == len(sets) == min(20, {4: 3}.get(n_heads, 20))
    assert not {head for one in sets for head in one} & set(chosen)
    assert all(_of_same_layers(chosen, one) for one in sets)
    assert random_heads(chosen, grid(3, n_heads)) == random_heads(chosen, grid(3, n_heads), n_controls=20, seed=0)


def test_a_layer_without_enough_other_heads_takes_from_others():
    chosen = heads("0.0", "0.1", "0.2", "1.0")
    sets = random_heads(chosen, grid(3, 4))
    assert len(sets) == 20 and not any(_of_same_layers(chosen, one) for one in sets)
    assert all(Counter(head.layer for head in one)[1] == 1 for one in sets)  # layer 1 has enough
    (all_others,) = random_heads(heads("0.0", "0.1", "0.2", "1.0"), grid(2, 4))
    assert set(all_others) == set(heads("0.3", "1.1", "1.2", "1.3"))
    with pytest.raises(InputError, match="choose fewer heads"):
        random_heads(heads("0.0", "0.1", "0.2"), grid(1, 4))
