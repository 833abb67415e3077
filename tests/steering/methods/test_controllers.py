"""What steers while it watches: the adaptive strength and budget guidance on a tiny model, and speed pairs cut from traces."""

import inspect
from copy import deepcopy

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Problem, Sampling
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import load_model
from reasonscope.steering.decoding.budget import BudgetGuidance, LengthPredictor, Trust, train_predictor
from reasonscope.steering.methods.adaptive import AdaptiveSteering
from reasonscope.steering.methods.thinking_speed import _speed_pairs, _truncated_pair, extract_speed
from reasonscope.steering.vectors.vector import SteeringVector

SITE = Site("resid_post", 1)
SAMPLING = Sampling(temperature=1.0, max_new_tokens=30)


@pytest.fixture(scope="module")
def model(character_tokenizer):
    return load_model(tiny_model("qwen3"), tokenizer=character_tokenizer)


@pytest.fixture(scope="module")
def vector(model):
    direction = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    return SteeringVector(directions={SITE: direction}, method="test")


def test_a_constant_adaptive_strength_is_constant_steering(model, vector):
    def shift(activation, _):
        return torch.cat([activation[:, :-1], activation[:, -1:] + torch.from_numpy(2 * vector.directions[SITE])], 1)

    prompts, seeds = [[5, 6, 7], [8, 9, 10, 11]], [0, 1]
    expected = generate(model, prompts, SAMPLING, seeds=seeds, write={SITE: shift})
    adaptive = AdaptiveSteering(model, vector, monitored=[0], lowest=2.0, highest=2.0)
    found = generate(
        model, prompts, SAMPLING, seeds=seeds, write=adaptive.edits, on_step=adaptive.on_step, processors=[adaptive]
    )
    assert [c.token_ids.tolist() for c in found] == [c.token_ids.tolist() for c in expected]
    assert {row: len(h) for row, h in adaptive.history.items()} == {
        row: len(c.token_ids) - c.n_prompt_tokens for row, c in enumerate(found)
    }


def test_the_strength_of_a_sequence_does_not_depend_on_its_batch(model, vector):
    def histories(prompts, seeds):
        adaptive = AdaptiveSteering(model, vector, monitored=[0, 1], lowest=-1.0, highest=1.0, step=0.5, width=0.5)
        generate(
            model, prompts, SAMPLING, seeds=seeds, write=adaptive.edits, on_step=adaptive.on_step, processors=[adaptive]
        )
        return adaptive.history

    together = histories([[5, 6, 7], [8, 9, 10, 11]], [0, 1])
    assert together[1] == histories([[8, 9, 10, 11]], [1])[0]
    assert len(set(together[0])) > 1
    with pytest.raises(InputError, match="on_step"):
        generate(model, [[5]], SAMPLING, seeds=[0], write=AdaptiveSteering(model, vector, monitored=[0]).edits)
    with pytest.raises(InputError, match="monitored layers"):
        AdaptiveSteering(model, vector, monitored=[2])


def adapted(model, vector, prompts, **how):
    """What an adaptive steering did on these prompts, and what was written."""
    chosen = {"monitored": [0, 1], "lowest": -1.0, "highest": 1.0, "step": 0.5, "width": 0.5, "window": 3} | how
    adaptive = AdaptiveSteering(model, vector, **chosen)
    seeds = range(len(prompts))
    done = generate(
        model, prompts, SAMPLING, seeds=seeds, write=adaptive.edits, on_step=adaptive.on_step, processors=[adaptive]
    )
    return adaptive, done


def test_an_adaptive_steering_says_how_strong_it_was(model, vector):
    adaptive, _ = adapted(model, vector, [[5, 6, 7], [8, 9, 10, 11]])
    strengths = np.concatenate(list(adaptive.history.values()))
    share, mean = (strengths > -1).mean(), strengths.mean()
    assert 0 < share < 1
    assert adaptive.told() == (
        f"adaptive speed was above its lowest strength (-1) at {share:.0%} of the tokens, at a mean of {mean:.3g}"
    )
    stayed, _ = adapted(model, vector, [[5, 6, 7]], step=0.0)
    assert stayed.told() == "adaptive speed stayed at its lowest strength (-1)"
    assert adaptive.about == {"name": "adaptive-speed", "site": "resid_post.1", "unit": "strength", "provenance": {}}


def test_finished_text_is_read_with_the_strengths_that_it_was_written_with(model, vector):
    adaptive, done = adapted(model, vector, [[5, 6, 7], [8, 9, 10, 11]])
    lines = adaptive.finish([completion.token_ids for completion in done])
    for row, (completion, line) in enumerate(zip(done, lines, strict=True)):
        assert len(line) == len(completion.token_ids) - 1
        n = completion.n_prompt_tokens
        assert np.isnan(line[: n - 1]).all() and line[n - 1] == -1
        np.testing.assert_array_equal(line[n:], adaptive.history[row][: len(line) - n])
    adaptive.begin([])
    for completion, line in zip(done, lines, strict=True):
        ids = torch.from_numpy(completion.token_ids[None, :-1])
        read = {"mask": torch.ones_like(ids), "read": [SITE]}
        plain = model.backend.forward(ids, **read).activations[SITE]
        moved = model.backend.forward(ids, **read, write=adaptive.edits).activations[SITE]
        expected = torch.from_numpy(np.nan_to_num(line))[:, None] * torch.from_numpy(vector.directions[SITE])
        torch.testing.assert_close((moved - plain)[0], expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(InputError, match="cannot read another text"):
            model.backend.forward(ids + 1, mask=torch.ones_like(ids), write=adaptive.edits)
    again, _ = adapted(model, vector, [[5, 6, 7], [8, 9, 10, 11]])
    seeds, steered = [0, 1], {"write": adaptive.edits, "on_step": adaptive.on_step, "processors": [adaptive]}
    n_edited = adaptive.n_edited
    generate(model, [[5, 6, 7], [8, 9, 10, 11]], SAMPLING, seeds=seeds, **steered)  # it begins afresh
    assert adaptive.history == again.history and adaptive.n_edited == 2 * n_edited


def test_the_strengths_are_the_published_ones_unless_said():
    defaults = inspect.signature(AdaptiveSteering).parameters
    published = {"lowest": -4.0, "highest": 8.0, "step": 2.0, "window": 8, "width": 2.0, "variant": "corrected"}
    assert {name: defaults[name].default for name in published} == published


def test_the_monitored_layers_are_counted_once_each(model, vector):
    twice, _ = adapted(model, vector, [[5, 6, 7]], monitored=[0, 1, 1, 0])
    once, _ = adapted(model, vector, [[5, 6, 7]], monitored=[0, 1])
    published, _ = adapted(model, vector, [[5, 6, 7]], variant="published")
    assert twice.history == once.history != published.history


def asked(name):
    return Problem(id=name, prompt="q", answer="7")


def test_slow_thinking_is_cut_where_it_is_as_long_as_two_fast_steps(written_store, model):
    fast, slow = "aaa\n\nbb\n\nc", "dd\n\ndd\n\ndd\n\ndd\n\ndd"
    store = written_store([(asked("a"), 0, fast, "7"), (asked("b"), 0, slow, "7"), (asked("c"), 0, slow, "8")])
    quick, long, wrong = store
    pair = _truncated_pair(quick, long)
    assert model.tokenizer.decode(pair.fast).endswith(("aaa\n\nbb", "aaa\n\nbb\n\nc"))
    assert abs(len(pair.fast) - len(pair.slow)) <= 3
    with pytest.raises(InputError, match="1 pairs 0 are right on both sides"):
        _speed_pairs([(quick, wrong)])
    vector = extract_speed(model, [pair, pair, _truncated_pair(long, quick)], [SITE], batch_size=2)
    assert vector.norms[SITE] == pytest.approx(1.0)


def test_a_budget_is_learned_from_a_run_and_guides(written_store, model):
    sites = [Site("resid_pre", 0), SITE]
    rows = [(asked(f"p{i}"), 0, "a" * n, "7") for i, n in enumerate((3, 6, 9, 12))] + [(asked("cut"), 0, "aaa", None)]
    store = written_store(rows, sites=[str(site) for site in sites], width=model.d_model)
    first, later = (
        train_predictor(store, sites, vocabulary=model.vocabulary, epochs=epochs, width=16, depth=1)[1]
        for epochs in (1, 30)
    )
    assert later < first
    predictor, _ = train_predictor(store, sites, vocabulary=model.vocabulary, epochs=1, width=16, depth=1)
    guidance = BudgetGuidance(model, predictor, sites, budget=5, trust=Trust(rate=0.0, mode=-1.0))
    prompt = model.encode_prompt(Problem(id="x", prompt="q<think>\n"))
    (plain,) = generate(model, [prompt], SAMPLING, seeds=[0], write=guidance.edits)
    (guided,) = generate(model, [prompt], SAMPLING, seeds=[0], write=guidance.edits, processors=[guidance])
    assert len(plain.token_ids) and np.isfinite(guided.logprobs).all()
    with pytest.raises(InputError, match="no trace closed"):
        train_predictor(store, sites, vocabulary=model.vocabulary, ids=["cut/0"])
    with pytest.raises(InputError, match="at least 1"):
        BudgetGuidance(model, predictor, sites, budget=0)


def test_guidance_acts_after_newlines_of_the_thinking_and_notes_what_is_left(model):
    sites = [Site("resid_pre", 0), SITE]
    torch.manual_seed(0)
    predictor = LengthPredictor(model.d_model, model.vocabulary, width=16, depth=1).eval()
    guidance = BudgetGuidance(model, predictor, sites, budget=9, trust=Trust(rate=0.0, mode=-1.0))
    texts = ("q<think>\n", "a question<think>\nab\n", "q<think>\nab", "q\n")  # the last two have no place to act
    prompts = [model.encode_prompt(Problem(id="x", prompt=text)) for text in texts]
    done = generate(
        model, prompts, SAMPLING, seeds=range(4), write=guidance.edits, on_step=guidance.on_step, processors=[guidance]
    )
    lines = guidance.finish([one.token_ids for one in done])
    newlines = [i for i in range(model.vocabulary) if "\n" in model.tokenizer.decode([i])]
    for one, prompt, line, acts in zip(done, prompts, lines, (True, True, False, False), strict=True):
        assert len(line) == len(one.token_ids) - 1 and np.isnan(line[: len(prompt) - 1]).all()
        assert np.isfinite(line[len(prompt) - 1]) == acts
        assert np.isin(one.token_ids[:-1][np.isfinite(line)], newlines).all()
    n_written = len(model.tokenizer("ab\n", add_special_tokens=False)["input_ids"])
    assert lines[0][len(prompts[0]) - 1] == 9 and lines[1][len(prompts[1]) - 1] == 9 - n_written
    assert guidance.n_edited == guidance.guided == sum(np.isfinite(line).sum() for line in lines)
    assert guidance.told() == f"budget guidance weighted {guidance.guided} draws towards 9 tokens"
    about = {"name": "budget-guidance", "site": "resid_pre.0 to resid_post.1", "unit": "tokens left"}
    assert guidance.about == about | {"provenance": {"budget": 9}}


def test_where_guidance_has_no_place_the_scores_are_the_very_ones(model):
    predictor = LengthPredictor(model.d_model, model.vocabulary, width=16, depth=1).eval()
    guidance = BudgetGuidance(model, predictor, [SITE], budget=9, trust=Trust(rate=0.0, mode=-1.0))
    scores = torch.randn(1, model.vocabulary)
    for text, same in (("q<think>\n", False), ("q<think>\na", True), ("q\n", True)):
        ids = torch.tensor([model.encode_prompt(Problem(id="x", prompt=text))])
        guidance.edits[SITE](torch.randn(1, ids.shape[1], model.d_model), None)
        assert (guidance(ids, scores) is scores) == same


def test_the_predictor_follows_the_scores_to_their_device(model, monkeypatch):
    """A predictor is learned and loaded on the CPU; here the other device is "meta", from which only `to` brings it back."""
    torch.manual_seed(0)
    here = LengthPredictor(model.d_model, model.vocabulary, width=16, depth=1).eval().requires_grad_(False)
    elsewhere = deepcopy(here).to("meta")
    monkeypatch.setattr(elsewhere, "to", {torch.device("cpu"): here}.__getitem__)
    ids, scores = (
        torch.tensor([model.encode_prompt(Problem(id="x", prompt="q<think>\n"))]),
        torch.randn(1, model.vocabulary),
    )
    states, found = torch.randn(1, ids.shape[1], model.d_model), []
    for predictor in (here, elsewhere):
        guidance = BudgetGuidance(model, predictor, [SITE], budget=9, trust=Trust(rate=0.0, mode=-1.0))
        guidance.edits[SITE](states, None)
        found.append(guidance(ids, scores))
    assert torch.equal(*found) and not torch.equal(found[0], scores)
