"""Vectors on the user's own calls of the Hugging Face model: the same tokens as with our own loop, and no hook is left."""

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.decoding import generate, left_padded
from reasonscope.probes.generation.recording import record
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import BACKENDS, load_model
from reasonscope.steering import Composed, Scope, Steering, SteeringVector
from reasonscope.steering.vectors.operators import ablate
from reasonscope.steering.vectors.patching import patched

SITE = Site("resid_post", 2)
GREEDY = Sampling(max_new_tokens=10)
PROBLEMS = [
    Problem(id=text, messages=(Message(role="user", content=text),))
    for text in ("The ledger starts at 14. Ann pays in 8. What is the final balance?", "Hello?")
]


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def prompts(model):
    return [model.encode_prompt(problem) for problem in PROBLEMS]


def made(width, seed=0, site=SITE, **fields):
    direction = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return SteeringVector(directions={site: 2 * direction}, method="test", **fields)


def hooks(model):
    return sum(
        hook.__module__.startswith("reasonscope")
        for module in model.hf.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for hook in table.values()
    )


def hf_generated(model, prompts, n=10):
    ids, mask = left_padded(prompts, torch.device("cpu"))
    out = model.hf.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)
    return out[:, ids.shape[1] :]


def until_stop(model, row):
    stops = [i for i, token in enumerate(row) if token in model.stop_ids]
    return row[: stops[0] + 1] if stops else row


@pytest.mark.parametrize("fields", [{}, {"generation_window": (2, 6)}, {"on": "think"}])
def test_generate_of_transformers_steers_the_tokens_that_our_loop_steers(model, prompts, fields):
    vector, scope = made(model.d_model), Scope.of(model, **fields)
    steering = Steering(vector, 1.0, scope)
    ours = generate(model, prompts, GREEDY, seeds=[0, 0], write=steering.edits, on_step=steering.on_step)
    with vector.apply(model, scope=scope) as handle:
        theirs = hf_generated(model, prompts)
    for completion, row in zip(ours, theirs.tolist(), strict=True):
        assert completion.token_ids[completion.n_prompt_tokens :].tolist() == until_stop(model, row)
    assert handle.n_edited > 0 and handle.passes == 10
    assert hooks(model) == 0


def test_a_pass_of_several_generated_tokens_is_steered_at_their_places(model, prompts):
    """As assisted decoding feeds them: three tokens at once, of which the second is in the scope."""
    ids, fed = torch.tensor([prompts[0]]), torch.tensor([[7, 8, 9]])
    whole = torch.cat([ids, fed], dim=1)
    vector = made(model.d_model)
    steering = Steering(vector, 1.0, Scope(generation_window=(1, 2)))
    steering.begin([len(prompts[0])])
    expected = model.backend.forward(whole, mask=None, write=steering.edits).logits[:, -3:]
    with vector.apply(model, scope=Scope(generation_window=(1, 2))) as handle:
        cache = model.hf(ids, use_cache=True).past_key_values
        seen = model.hf(fed, past_key_values=cache).logits
    assert handle.n_edited == 1
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_a_handle_steers_until_it_is_removed(model, prompts):
    ids = torch.tensor([prompts[0]])
    plain = model.hf(ids).logits
    handle = made(model.d_model).patch_activations(model, multiplier=2.0, scope=Scope(prompt_positions=(-1,)))
    steered = model.hf(ids).logits
    handle.remove()
    handle.remove()
    assert handle.n_edited == 1
    assert torch.equal(steered[:, :-1], plain[:, :-1]) and not torch.equal(steered[:, -1], plain[:, -1])
    assert torch.equal(model.hf(ids).logits, plain) and hooks(model) == 0


def test_what_does_not_fit_is_refused_and_leaves_no_hook(model, prompts):
    ids = torch.tensor([prompts[1]])
    foreign = {"model": {"name": "another", "weights": "w"}}
    for vector, error, words in (
        (made(7), InputError, "width 7"),
        (made(model.d_model, site=Site("resid_post", 99)), SiteError, "layers"),
        (made(model.d_model, provenance=foreign), InputError, "differs in weights"),
        (made(model.d_model, provenance={"model": {"architecture": "llama"}}), InputError, "differs in architecture"),
    ):
        with pytest.raises(error, match=words), vector.apply(model):
            pass
    with made(model.d_model, provenance=foreign).for_any_model().apply(model):
        model.hf(ids)
    with (
        pytest.raises(InputError, match="edited no token"),
        made(model.d_model).apply(model, scope=Scope(tokens=frozenset())),
    ):
        model.hf(ids)
    with pytest.raises(InputError, match="input_ids"), made(model.d_model).apply(model):
        model.hf(inputs_embeds=torch.zeros(1, 2, model.d_model))
    with pytest.raises(ZeroDivisionError), made(model.d_model).apply(model):
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_a_strength_that_the_dtype_cannot_hold_is_refused(prompts):
    half = load_model("organism", dtype="float16")
    with pytest.raises(InputError, match="beyond what float16 holds"), made(half.d_model).apply(half, multiplier=1e5):
        half.hf(torch.tensor([prompts[0]]))
    assert hooks(half) == 0


def test_a_cache_of_unknown_words_is_refused(model, prompts):
    ids = torch.tensor([prompts[0]])
    cache = model.hf(ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="before the prompt is fed"), made(model.d_model).apply(model):
        model.hf(ids[:, :1], past_key_values=cache, use_cache=True)
    steering = Steering(made(model.d_model), 1.0, Scope())
    with pytest.raises(InputError, match="on_step"):
        generate(model, prompts, GREEDY, seeds=[0, 0], write=steering.edits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_writes_and_replays_the_same_steered_tokens(backend, model):
    sampling = Sampling(temperature=1.0, max_new_tokens=12, seed=5)
    scope = Scope.of(model, generation_window=(1, 9), exclude_generation_positions=(4,))

    def steered(one):
        steering = Composed(
            Steering(made(one.d_model), 1.0, scope), Steering(made(one.d_model, 1), 1.0, scope, operator=ablate)
        )
        traces = rollouts(one, PROBLEMS, sampling, write=steering.edits, on_step=steering.on_step)
        written = steering.n_edited
        steering.begin([trace.n_prompt_tokens for trace in traces])
        ids, mask = left_padded([trace.token_ids[:-1] for trace in traces], torch.device("cpu"))
        logits = one.backend.forward(ids, mask=mask, write=steering.edits).logits
        assert steering.n_edited == 2 * written  # the replay touches what the generation touched
        return traces, logits

    traces, logits = steered(load_model("organism", backend=backend))
    expected, there = steered(model)
    assert [trace.token_ids.tolist() for trace in traces] == [trace.token_ids.tolist() for trace in expected]
    for row, trace in zip(range(2), traces, strict=True):  # rows of padding mean nothing
        n = len(trace.token_ids) - 1
        torch.testing.assert_close(logits[row, -n:], there[row, -n:], atol=1e-3, rtol=1e-4)


def test_the_first_in_order_acts_first(model, prompts):
    ids, mask = left_padded(prompts[:1], torch.device("cpu"))
    v = made(model.d_model)

    def projection(*steerings):
        out = model.backend.forward(ids, mask=mask, read=[SITE], write=Composed(*steerings).edits)
        direction = torch.from_numpy(v.normalised().directions[SITE])
        return (out.activations[SITE][0] @ direction).abs().max()

    add_then_ablate = projection(Steering(v, 1.0, Scope()), Steering(v, 1.0, Scope(), operator=ablate))
    ablate_then_add = projection(Steering(v, 1.0, Scope(), operator=ablate), Steering(v, 1.0, Scope()))
    assert add_then_ablate < 1e-4 < ablate_then_add


def test_beam_search_is_refused(model, prompts):
    ids = torch.tensor([prompts[0]])
    steering = Steering(made(model.d_model), 0.1, Scope())
    with pytest.raises(InputError, match="num_beams=1"), patched(model, steering, name="v"):
        model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, num_beams=2, do_sample=False)


def test_a_steered_model_records_nothing_that_passes_for_plain(model, tmp_path):
    with made(model.d_model).apply(model, multiplier=0.1) as handle:
        with pytest.raises(InputError, match="attached to the model"):
            record(model, PROBLEMS, tmp_path / "run", sampling=GREEDY)
        model.hf(torch.tensor([[5, 6]]))
    assert handle.n_edited and not (tmp_path / "run").exists()
    kept = made(model.d_model).patch_activations(model)
    kept.remove()
    assert len(record(model, PROBLEMS, tmp_path / "run", sampling=GREEDY).ids) == len(PROBLEMS)
