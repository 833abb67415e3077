"""As many rows as there is room for: by hand on the tiny Qwen3, halved until they fit, never none."""

import pytest

from reasonscope.probes.architecture.families import N_LAYERS, VOCAB, tiny_of
from reasonscope.probes.generation import cache
from reasonscope.probes.generation.cache import ROOM, SHARE, max_rows_that_fit
from reasonscope.probes.models.model import load_model

TOKENS = 40
QWEN3 = N_LAYERS * 2 * 2 * 12 * 4 * (TOKENS + ROOM) + 24 * VOCAB  # keys and values of 2 heads of 12 in float32
# Latents of 16 and a shared rotated key of 4 are all that latent attention keeps.
DEEPSEEK = N_LAYERS * (16 + 4) * 4 * (TOKENS + ROOM) + 24 * VOCAB


@pytest.mark.parametrize(("family", "of_row"), [("qwen3", QWEN3), ("deepseek_v3", DEEPSEEK)])
def test_rows_are_halved_until_they_fit(family, of_row, model_of, monkeypatch):
    for free, rows in ((32 * of_row, 32), (32 * of_row - 1, 16), (9 * of_row, 8), (0, 1)):
        monkeypatch.setattr(cache, "_free", lambda device, free=free: free / SHARE)
        assert max_rows_that_fit(model_of(family), TOKENS, most=32) == rows


def test_this_host_has_room_for_a_tiny_model(model_of):
    assert max_rows_that_fit(model_of("qwen3"), TOKENS, most=100) == 100


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "mamba"])
def test_recurrent_states_take_room_once(family, tokenizer, monkeypatch):
    model = load_model(tiny_of(family), tokenizer=tokenizer)
    short, long = (sum(cache._row_bytes(model, tokens).values()) for tokens in (0, TOKENS))
    attention = len(model.layout.layers_with("attn_out"))
    assert short > 24 * model.vocabulary and (long > short) == bool(attention)
