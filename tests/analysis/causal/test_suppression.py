"""Suppressing a sentence after a shared prefix equals the model's own full pass under a 4-D mask, in every family."""

import numpy as np
import pytest
import torch

from reasonscope.analysis.causal.suppression import Untouched, normalised, suppression_effect, suppression_matrix
from reasonscope.analysis.results import Result
from reasonscope.data.errors import InputError
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem, Span
from reasonscope.probes.architecture.families import FAMILIES
from reasonscope.probes.backends.hooks import eager_attention
from reasonscope.probes.evaluation.divergence import kl_divergence
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.unembedding import Unembedding, kl_from_hidden

N = 30
SPANS = [Span(3, 6), Span(6, 15), Span(16, 18), Span(18, 30)]
BY_LAYER = {"qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_oss"}  # these take a mask for each kind of layer


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 90, (N,), generator=torch.Generator().manual_seed(4)).tolist()


def dense_mask(span, window):
    query, key = torch.arange(N)[:, None], torch.arange(N)
    seen = (key <= query) & (key > query - (window or N)) & ~((key >= span.start) & (key < span.stop))
    seen |= ~seen.any(dim=-1, keepdim=True) & (key == query)
    return torch.zeros(N, N).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def full_pass(model, ids, span):
    """Next-token log-probabilities at temperature 0.6 of one whole eager pass that may not look at `span`."""
    window = getattr(model.hf.config, "sliding_window", None)
    mask = dense_mask(span, window)
    if model.layout.model_type in BY_LAYER:
        mask = {"full_attention": dense_mask(span, None), "sliding_attention": mask}
    with torch.no_grad(), eager_attention(model.hf):
        logits = model.hf(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0]
    return (logits / 0.6).log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_changes_no_number(tiny, ids, family):
    model = tiny(family)
    fed = torch.tensor([ids])
    p = (model.backend.forward(fed, mask=torch.ones_like(fed)).logits[0] / 0.6).log_softmax(-1)
    expected = np.stack([(p.exp() * (p - full_pass(model, ids, span))).sum(-1).numpy() for span in SPANS])
    found = suppression_effect(model, ids, SPANS, batch=3)
    for i, target in enumerate(SPANS):
        for j in range(i):
            mean = expected[j, target.start - 1 : target.stop - 1].mean()
            assert found.kl[i, j] == pytest.approx(mean, abs=1e-5)
    assert np.isnan(found.kl[np.triu_indices(len(SPANS))]).all()


def test_chunks_of_the_vocabulary_change_no_divergence(tiny, ids):
    model = tiny("gemma2")
    untouched = Untouched.of(model, ids)
    unembedding = Unembedding.of(model)
    other = untouched.hidden + 0.3 * torch.randn(2, N, model.d_model, generator=torch.Generator().manual_seed(1))
    p, q = ((unembedding.logits(x) / 0.7).log_softmax(-1) for x in (untouched.hidden, other))
    with torch.no_grad():
        found = kl_from_hidden(unembedding, untouched.hidden, other, temperature=0.7, chunk=17, rows=7)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, kl_divergence(p, q), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="temperature"):
        kl_from_hidden(unembedding, untouched.hidden, other, temperature=0)


def test_a_target_that_every_source_moves_has_a_mean_of_zero():
    found = normalised(np.log([[np.nan, np.nan, np.nan], [0.5, np.nan, np.nan], [9.0, 1.0, np.nan]]))
    assert found[2, :2].sum() == pytest.approx(0) and found[2, 0] > 0 and found[1, 0] == 0


@pytest.fixture(scope="module")
def organism_trace():
    model = load_model("organism")
    thinking = "Okay, the start is 14. Then 14 + 8 = 22. So it is 22. Then 22 + 8 = 30. So it is 30. That is all."
    text = f"<think>\n{thinking}\n</think>\n\nThe final balance is 30."
    prompt = model.encode_text("Question.\n")
    return model, build(model, prompt, text)


def build(model, prompt, text):
    ids = np.array([*prompt, *model.tokenizer.encode(text, add_special_tokens=False)])
    return build_trace(
        id="t",
        problem=Problem(id="t", prompt="Question.\n"),
        token_ids=ids,
        n_prompt_tokens=len(prompt),
        tokenizer=model.tokenizer_backend,
        finish_reason="stop",
        model={},
    )


def test_the_result_has_its_null_and_survives_a_file(organism_trace, tmp_path):
    model, trace = organism_trace
    found = suppression_matrix(model, trace, n_controls=2)
    n = found.numbers["n_sentences"]
    assert found.values.shape == (n, n) and n >= 3
    assert found.null is not None and np.isfinite(found.null.high).all()
    assert Result.load(found.save(tmp_path / "s.safetensors")).arrays["kl"].shape == (n, n)


def test_controls_hide_other_tokens_before_the_sentence_and_as_many(organism_trace, monkeypatch):
    model, trace = organism_trace
    hidden, divergences = [], Untouched.divergences

    def spied(self, suppressed, **how):
        hidden.append(suppressed)
        return divergences(self, suppressed, **how)

    monkeypatch.setattr(Untouched, "divergences", spied)
    found = suppression_matrix(model, trace, n_controls=2)
    true, *controls = hidden
    assert len(controls) == 2 and not torch.equal(*controls)
    start, with_control = int(true[0].int().argmax()), 0
    for sets in controls:
        for own, drawn in zip(true, sets, strict=False):
            first, n = int(own.int().argmax()), int(own.sum())
            assert not drawn[first:].any() and not drawn[:start].any()
            assert int(drawn.sum()) == (n if first - start >= n else 0)
            with_control += int(drawn.any())
    assert 0 < with_control < 2 * len(true)  # the first sentence has none before it
    of_two = suppression_matrix(model, trace, sentences=trace_sentences(trace)[:2], n_controls=2)
    assert found.null is not None
    assert of_two.null is None and "no sentence has as many tokens" in of_two.null_missing


@pytest.mark.parametrize(
    "text", ["The final balance is 22.", "<think>\n</think>\n\n22.", "<think>\nOne only.\n</think>\n\n22."]
)
def test_too_few_sentences_are_a_state(organism_trace, text):
    model, _ = organism_trace
    trace = build(model, model.encode_text("Question.\n"), text)
    found = suppression_matrix(model, trace)
    assert not found.measured and "a source needs a later target" in found.reason
