"""Attention heads, and random heads to compare them with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from reasonscope.data.errors import InputError
from reasonscope.data.random_sets import Pool, distinct_sets

if TYPE_CHECKING:  # without torch, which layouts need
    from reasonscope.probes.architecture.layout import Layout


@dataclass(frozen=True, kw_only=True, order=True)
class Head:
    """An attention head of a block; written "2.1" for head 1 of block 2.

    Attributes:
        layer: The block, counted from 0.
        index: The head within the block, counted from 0.

    Example:
        head = Head(layer=2, index=1)
        assert head == Head.parse("2.1") and str(head) == "2.1"
    """

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "layer.head", as `str` writes it. Raises InputError for anything else."""
        layer, dot, index = text.partition(".")
        if not (dot and _is_number(layer) and _is_number(index)):
            raise InputError(
                f'{text!r:.60} is not a head; write layer.head, for instance "3.10" for head 10 of block 3'
            )
        return cls(layer=int(layer), index=int(index))


def random_heads(
    heads: Sequence[Head], among: Sequence[Head], *, n_controls: int = 20, seed: int = 0
) -> list[tuple[Head, ...]]:
    """Random sets of as many other heads of each layer `among` all heads of the model: the control of a score of `heads`.

    Layers without enough other heads take what they lack from other layers. Gives all sets if they are fewer than `n_controls`; their
    number bounds the p-value (`smallest_p`). Raises InputError if the model has fewer other heads than `heads`.
    """
    chosen = set(heads)
    free = [head for head in among if head not in chosen]
    if len(free) < len(chosen):
        raise InputError(
            f"{len(chosen)} of {len(among)} heads leave only {len(free)} others to compare with; choose fewer heads"
        )
    return distinct_sets(_pools(chosen, free), n_controls, seed=seed)


def all_heads(layout: "Layout") -> list[Head]:
    """Every attention head of a model, by layer; blocks without attention have none."""
    return [Head(layer=i, index=j) for i in layout.layers_with("z") for j in range(layout.of_block[i].n_heads)]


def _pools(chosen: set[Head], free: Sequence[Head]) -> list[Pool[Head]]:
    """One pool per layer that has enough other heads, and one of all other layers for the rest."""
    of_layer = {layer: [head for head in free if head.layer == layer] for layer in {head.layer for head in free}}
    wanted = Counter(head.layer for head in sorted(chosen))
    pools = [Pool(members=own, size=n) for layer, n in wanted.items() if len(own := of_layer.get(layer, [])) >= n]
    lacking = len(chosen) - sum(pool.size for pool in pools)
    if not lacking:
        return pools
    taken = {head for pool in pools for head in pool.members}
    rest = [head for head in free if head not in taken]
    if len(rest) < lacking:
        return [Pool(members=free, size=len(chosen))]
    return [*pools, Pool(members=rest, size=lacking)]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
