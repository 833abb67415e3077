import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3Config
from transformers.cache_utils import DynamicSlidingWindowLayer

from reasonscope.probes.generation.cache import ROOM, SMALL, _GrowingLayer, growing_cache


@pytest.fixture(autouse=True, params=[0, SMALL], ids=["in place", "small"])
def small(request, monkeypatch):
    """Whether keys of a few bytes are written in place, too."""
    monkeypatch.setattr("reasonscope.probes.generation.cache.SMALL", request.param)
    return request.param


def fed(n: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    keys = torch.randn(rows, 2, n, 4, generator=torch.Generator().manual_seed(n))
    return keys, keys + 1


def grown(*steps: int) -> tuple[DynamicCache, DynamicCache]:
    """The same tokens in a growing cache and in transformers' own."""
    ours, theirs = growing_cache(), DynamicCache()
    for n in steps:
        ours.update(*fed(n), 0)
        theirs.update(*fed(n), 0)
    return ours, theirs


def same(ours: DynamicCache, theirs: DynamicCache) -> bool:
    mine, other = ours.layers[0], theirs.layers[0]
    assert mine.get_seq_length() == other.get_seq_length()
    return torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)


@pytest.mark.parametrize("steps", [(1,), (5, 1, 1), (7, ROOM + 3, 1), (1,) * (ROOM + 5)])
def test_holds_what_a_dynamic_cache_holds(steps: tuple[int, ...]) -> None:
    assert same(*grown(*steps))


def test_a_token_is_written_in_place(small: int) -> None:
    ours, _ = grown(5)
    before = ours.layers[0].keys
    ours.update(*fed(1), 0)
    assert (ours.layers[0].keys.data_ptr() == before.data_ptr()) == (small == 0)


@pytest.mark.parametrize("change", ["select", "crop", "repeat", "reorder", "crop and select"])
def test_goes_on_after_its_rows_or_tokens_have_changed(change: str) -> None:
    both = grown(5, 1)
    rows = 3
    for cache in both:
        if "crop" in change:
            cache.crop(-2)
        if "select" in change:
            cache.batch_select_indices(torch.tensor([2, 0]))
            rows = 2
        if change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = 6
        if change == "reorder":
            cache.reorder_cache(torch.tensor([2, 1, 0]))
        cache.update(*fed(1, rows), 0)
    assert same(*both)


def test_rows_of_an_empty_cache_may_be_selected() -> None:
    cache = growing_cache()
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 0


def test_windowed_layers_stay_windowed() -> None:
    config = Qwen3Config(
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=8,
        use_sliding_window=True,
    )
    full, windowed = growing_cache(config).layers
    assert isinstance(full, _GrowingLayer)
    assert isinstance(windowed, DynamicSlidingWindowLayer)
