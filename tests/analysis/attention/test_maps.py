"""What the closing tag attends to, and what is attended to again: both equal the dense attention, and a shuffle does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reasonscope.analysis.attention.blocks import read_attention
from reasonscope.analysis.attention.close_attention import close_attention
from reasonscope.analysis.attention.recurrence import _RecurrenceReader, recurrence
from reasonscope.analysis.attention.rows.functionals import RowMeans
from reasonscope.analysis.causal.suppression import suppression_matrix
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import cut_hash, cut_trace
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.trace import Problem, Span
from reasonscope.probes.architecture.families import VOCAB
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import load_model

THINKING = "The ledger starts at 12. First, Bob pays in 5. 12 + 5 = 17. The final answer is 17."


def dense(model, ids):
    """Attention (layer, head, query, key) by the model's own eager code."""
    fed = torch.tensor([ids])
    sites = [Site("attn_probs", layer) for layer in range(model.n_layers)]
    seen = model.backend.forward(fed, mask=torch.ones_like(fed), read=sites).activations
    return torch.stack([seen[site][0] for site in sites]).double().numpy()


def looks(attention, rows, alpha):
    """Last look and longest pause by loops over queries and keys: attention (query, key)."""
    last = np.maximum(np.arange(rows.stop), rows.start - 1)
    interval = np.zeros(rows.stop, dtype=int)
    for query in range(rows.start, rows.stop):
        for key in range(query + 1):
            if attention[query, key] > alpha:
                interval[key] = max(interval[key], query - last[key])
                last[key] = query
    return last, interval


@pytest.fixture(scope="module")
def organism():
    return load_model("organism")


def told(organism, thinking, close="\n</think>\n\n"):
    return trace_from_text(
        id="a/0", problem=Problem(id="a", prompt="Add."), prompt="Add.\n<think>\n", completion=f"{thinking}{close}17",
        tokenizer=organism.tokenizer_backend,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt_oss"])
def test_both_readers_equal_the_dense_attention(tiny, family):
    model, rows = tiny(family), Span(9, 33)
    ids = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    attention = dense(model, ids)
    alpha = 1.001 * float(np.median(attention.mean(axis=1)[:, 32, :33]))  # random weights look nearly evenly; off a tie
    means, again = RowMeans(rows, model.n_layers, model.n_heads), _RecurrenceReader(rows, model.n_layers, alpha=alpha)

    def read(block):
        means(block)
        again(block)

    read_attention(model, ids, read, block=7)
    np.testing.assert_allclose(means.result(), attention[:, :, 9:33, :33].mean(axis=2), atol=1e-6)
    found = again.result()
    for layer in range(model.n_layers):
        last, interval = looks(attention[layer].mean(axis=0), rows, alpha)
        assert found.last[layer].tolist() == last.tolist() and found.interval[layer].tolist() == interval.tolist()
    assert 0 < (found.interval > 0).mean() < 1, "else nothing would have been told apart"


def test_a_token_comes_back_after_a_pause_and_a_shuffle_does_not_know_of_it(blocks):
    n = 30
    attention = np.eye(n)
    attention[12, 2] = attention[25, 2] = 1.0  # looked at at its own place, at 12 and at 25
    for shuffle in (None, torch.Generator().manual_seed(0)):
        reader = _RecurrenceReader(Span(0, n), 1, alpha=0.5, shuffle=shuffle)
        for block in blocks([[attention]]):
            reader(block)
        found = reader.result()
        if shuffle is None:
            assert found.interval[0, 2] == 13 and found.last[0, 2] == 25 and found.interval.sum() == 13
    assert found.interval.sum() > 13, "looks at random places come back by chance alone"


def test_the_close_window_looks_at_sentences(organism):
    trace = told(organism, THINKING)
    found = close_attention(organism, trace)
    window = trace.tokens.close_window
    rows = dense(organism, trace.token_ids[: window.stop].tolist())[:, :, window.slice].mean(axis=(0, 1, 2))
    np.testing.assert_allclose(found.arrays["tokens"], rows[trace.tokens.thinking.slice], atol=1e-6)
    assert found.arrays["heads"].shape == (organism.n_layers, organism.n_heads, len(found.values))
    assert found.null.low[0] == found.null.high[0] < found.values.max(), "some sentence is looked at more than evenly"


def test_a_sentence_without_tokens_has_no_attention_and_keeps_its_place(organism):
    trace = told(organism, THINKING)
    known = cut_trace(trace).sentences
    whole = close_attention(organism, trace)
    assert whole.provenance["cut"] == cut_hash(known) and len(whole.values) == len(known)
    bare = replace(known[1], tokens=Span(known[1].tokens.start, known[1].tokens.start))
    cut = [known[0], bare, *known[2:]]
    found = close_attention(organism, trace, cut)
    kept = [i for i in range(len(known)) if i != 1]
    np.testing.assert_array_equal(found.values[kept], whole.values[kept])
    assert np.isnan(found.values[1]) and "without tokens" in found.reason
    assert found.provenance["cut"] == cut_hash(cut)
    effects = suppression_matrix(organism, trace, sentences=cut)
    assert effects.values.shape == effects.arrays["kl"].shape == (len(known), len(known))
    assert np.isnan(effects.values[1]).all() and np.isnan(effects.values[:, 1]).all()
    assert np.isfinite(effects.values[3, 2]) and np.isfinite(effects.values[2, 0] * effects.values[3, 0])


def test_recurrence_is_counted_in_the_thinking_by_layer(organism):
    trace = told(organism, THINKING)
    found = recurrence(organism, trace)
    assert found.values.shape == (organism.n_layers, trace.n_thinking_tokens)
    recurring = [row["recurring"] for row in found.numbers["by_layer"]]
    np.testing.assert_allclose([one["value"] for one in recurring], (found.values > 1).mean(axis=1))
    assert np.isnan([one["ci"] for one in recurring]).all(), "no sentences, so no interval over them"
    assert all(0 <= row["recurring"] <= 1 for row in found.numbers["by_layer_null"])
    known = recurrence(organism, trace, sentences(trace)).numbers["by_layer"]
    inside = [low <= one["value"] <= high for row in known for one in row.values() for low, high in [one["ci"]]]
    assert all(inside) and known[-1]["recurring"]["ci"][0] < known[-1]["recurring"]["ci"][1]
    never = recurrence(organism, trace, sentences(trace), alpha=0.999).numbers["by_layer"][0]["percentile_80"]
    assert never["value"] is None and np.isnan(never["ci"]).all()


def test_what_has_no_close_or_no_thinking_is_a_state(organism):
    assert "no end to look back from" in close_attention(organism, told(organism, THINKING, close="")).reason
    assert not recurrence(organism, told(organism, "")).measured
    for wrong in (lambda: RowMeans(Span(3, 3), 1, 1), lambda: _RecurrenceReader(Span(0, 3), 1, alpha=1.0)):
        with pytest.raises(InputError):
            wrong()
