"""Patching gives the answer back from where it stands, as TransformerLens finds it, and from nowhere else; unequal texts are refused."""

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.truth import true_sentences
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.families import tiny_model, tiny_of
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model
from reasonscope.steering.ablation.effects import Forgetful
from reasonscope.steering.ablation.patching import PatchPair, _tokens_put, patch_activations


@pytest.fixture(scope="module")
def organism():
    return load_model("organism")


@pytest.fixture(scope="module")
def pair(organism):
    """One number of a ledger's prompt differs."""
    texts = [organism.encode_text(f"Mia has {n} apples. She buys 7 more apples. So Mia has") for n in (14, 15)]
    (place,) = [i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b]
    return PatchPair(
        clean=tuple(texts[0]), corrupted=tuple(texts[1]), right=texts[0][place], wrong=texts[1][place]
    ), place


def test_the_differing_token_gives_everything_back_at_the_input_and_nothing_elsewhere(organism, pair):
    texts, place = pair
    found = patch_activations(organism, texts, unrelated=[texts.corrupted[::-1]])
    clean, corrupted = found.of_clean[0], found.of_corrupted[0]
    assert clean != corrupted and found.places == tuple(range(len(texts.clean)))
    first = found.logit_difference[0]
    assert first[place] == pytest.approx(clean, abs=1e-3)
    np.testing.assert_allclose(
        np.delete(first, place), corrupted, atol=1e-3
    )  # the same token stands there in both texts
    assert found.probability[0, place] == pytest.approx(found.of_clean[1], abs=1e-4)
    last = patch_activations(organism, texts, at="resid_post").logit_difference[-1]
    assert last[-1] == pytest.approx(clean, abs=1e-3)  # the answer is read at the last token after the last block
    assert found.null.shape == (1, 2, organism.n_layers, len(texts.clean))


def test_all_heads_together_are_the_attention(organism, pair):
    """Patching one head moves its own output only: the heads of a layer, patched one by one, are columns of one map."""
    found = patch_activations(organism, pair[0], at="heads")
    assert found.logit_difference.shape == (organism.n_layers, organism.n_heads)
    assert np.isfinite(found.logit_difference).all() and np.ptp(found.logit_difference) > 0


@pytest.mark.parametrize("at", ["resid_pre", "attn_out", "mlp_out", "heads"])
def test_it_finds_what_transformer_lens_finds(character_tokenizer, at):
    pytest.importorskip("transformer_lens")
    from transformer_lens import ActivationCache, patching

    model = load_model(tiny_model("gpt2"), tokenizer=character_tokenizer, backend="transformer_lens")
    bridge = model.backend._bridge
    pair = PatchPair(clean=(3, 9, 27, 14, 6), corrupted=(3, 10, 27, 15, 6), right=20, wrong=21)
    clean, corrupted = (torch.tensor([ids]) for ids in (pair.clean, pair.corrupted))
    _, cache = bridge.run_with_cache(clean)
    assert isinstance(cache, ActivationCache)

    def metric(logits):
        return (logits[:, -1, pair.right] - logits[:, -1, pair.wrong]).mean()

    run = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out,
        "heads": patching.get_act_patch_attn_head_out_all_pos,
    }[at]
    theirs = run(bridge, corrupted, cache, metric)
    plain = load_model(tiny_model("gpt2"), tokenizer=character_tokenizer)
    for ours in (model, plain):
        found = patch_activations(ours, pair, at=at).logit_difference
        np.testing.assert_allclose(found, np.asarray(theirs), atol=2e-4, rtol=1e-3)
    assert np.ptp(np.asarray(theirs)) > 1e-3


def test_what_was_patched_is_not_patched_again(organism, pair, monkeypatch):
    texts, cells = pair[0], Forgetful()
    first = patch_activations(organism, texts, cells=cells)
    assert len(cells) == organism.n_layers
    cells.pop(next(iter(cells)))
    seen = []
    forward = type(organism.backend).forward
    monkeypatch.setattr(
        type(organism.backend), "forward", lambda *a, **k: seen.append(k.get("write")) or forward(*a, **k)
    )
    again = patch_activations(organism, texts, cells=cells)
    np.testing.assert_array_equal(first.logit_difference, again.logit_difference)
    assert sum(bool(write) for write in seen) == 1  # the one layer that was missing


def test_traces_are_read_up_to_the_token_in_which_their_answers_differ(organism):
    found = [
        one
        for one in rollouts(organism, load_problems("ledger", n=6), Sampling(max_new_tokens=200))
        if one.final_answer
    ]
    one, other = next((a, b) for a in found for b in found if a.final_answer != b.final_answer)
    pair = PatchPair.of_traces(one, other)
    for ids, token, trace in ((pair.clean, pair.right, one), (pair.corrupted, pair.wrong, other)):
        assert trace.token_ids[: len(ids)].tolist() == list(ids) and trace.token_ids[len(ids)] == token
        assert trace.tokens.answer.start <= len(ids) < trace.tokens.answer.stop
    found = patch_activations(organism, pair, at="heads", last=4)
    assert np.isfinite(found.logit_difference).all()
    with pytest.raises(InputError, match="no token tells apart"):
        PatchPair.of_traces(one, one)
    if len(pair.clean) != len(pair.corrupted):
        with pytest.raises(InputError, match=r"cannot be paired; .* \(last: 8\)"):
            patch_activations(organism, pair)


def test_texts_go_on_with_what_the_answers_share_and_are_told_apart_by_the_next_token(organism):
    clean, corrupted = (organism.encode_text(f"Mia has {n} apples. So Mia has") for n in (14, 15))
    right, wrong = (organism.tokenizer.encode(text, add_special_tokens=False) for text in (" 14", " 15"))
    shared = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b)
    pair = PatchPair.of_texts(organism, clean, corrupted, (" 14", " 15"))
    assert pair.clean == (*clean, *right[:shared]) and pair.corrupted == (*corrupted, *right[:shared])
    assert (pair.right, pair.wrong) == (right[shared], wrong[shared])
    for answers in (("", " 15"), (" 14", "")):
        with pytest.raises(InputError, match="has no token"):
            PatchPair.of_texts(organism, clean, corrupted, answers)
    with pytest.raises(InputError, match="do not differ in a token"):  # one begins as the other
        PatchPair.of_texts(organism, clean, corrupted, (" 14", " 14 apples"))


def test_texts_that_cannot_be_paired_are_refused(organism):
    long, short = (organism.encode_text(text) for text in ("Mia has 14 apples.", "Mia has 14"))
    pair = PatchPair(clean=tuple(long), corrupted=tuple(short), right=5, wrong=6)
    with pytest.raises(InputError, match="give texts of equal length"):
        patch_activations(organism, pair)
    with pytest.raises(InputError, match="last: 99"):
        patch_activations(organism, pair, last=99)
    with pytest.raises(InputError, match="give longer ones"):
        patch_activations(organism, pair, last=3, unrelated=[long[:2]])
    with pytest.raises(InputError, match="choose from resid_pre"):
        patch_activations(organism, pair, at="nowhere", last=2)
    with pytest.raises(InputError, match="do not differ in a token"):
        PatchPair.of_texts(organism, long, long, (" 12", " 12"))


def test_a_number_comes_back_from_the_sentence_that_it_depends_on(organism):
    """Of two changed numbers, one in a sentence that the grammar says a later result depends on, the other elsewhere."""
    model, found, rng = organism, [], np.random.default_rng(0)
    digits = [i for i in range(model.vocabulary) if model.tokenizer.decode([i]).strip().isdigit()]
    for trace in rollouts(model, load_problems("ledger", n=12, seed=5), Sampling(max_new_tokens=200)):
        known, depends = true_sentences(trace)
        places = [
            [p for p in range(one.tokens.start, one.tokens.stop) if trace.token_ids[p] in digits] for one in known
        ]
        for target, sources in enumerate(depends):
            true = [i for i in sources if places[i]]
            other = [i for i in range(target) if places[i] and i not in sources]
            if not (true and other and places[target]):
                continue
            end, at = places[target][-1], [places[one[-1]][-1] for one in (true, other)]
            clean = trace.token_ids[:end].tolist()
            corrupted = [int(rng.choice(digits)) if i in at else id for i, id in enumerate(clean)]
            logits = model.backend.forward(torch.tensor([clean, corrupted]), mask=None, last_logits_only=True).logits[
                :, -1
            ]
            right, wrong = logits.argmax(dim=-1).tolist()
            if right != trace.token_ids[end] or wrong == right:
                continue
            site = Site("resid_pre", 2)
            states = run_with_cache(model, clean, [site])[1][site][0]
            write = {site: _tokens_put(states, at)}
            patched = model.backend.forward(
                torch.tensor([corrupted] * 2), mask=None, last_logits_only=True, write=write
            )
            difference = [float(row[right] - row[wrong]) for row in (*logits, *patched.logits[:, -1])]
            found.append([(one - difference[1]) / (difference[0] - difference[1]) for one in difference[2:]])
    true, other = np.array(found).T
    assert len(found) >= 6
    assert (true > other).all() and np.median(true) > 0.1 and np.abs(other).max() < 0.05


def test_a_model_without_attention_has_no_heads_to_patch(character_tokenizer):
    model = load_model(tiny_of("mamba"), tokenizer=character_tokenizer)
    pair = PatchPair(clean=(3, 9, 27), corrupted=(3, 10, 27), right=5, wrong=6)
    with pytest.raises(SiteError, match="z"):
        patch_activations(model, pair, at="heads")
    assert np.isfinite(patch_activations(model, pair, at="resid_post").logit_difference).all()
