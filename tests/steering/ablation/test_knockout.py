"""Edges that are cut while a model writes are the same that are cut when the finished text is read again."""

import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.decoding import DecodingStep, generate
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Ablation, Scope
from reasonscope.steering.ablation.controls import _random_edges, _RandomScope
from reasonscope.steering.ablation.knockout import Edges, _masking, _RunningCut, reading_without, writing_without
from reasonscope.steering.ablation.regeneration import regenerate_ablated


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def prompts(model):
    return [model.encode_prompt(problem) for problem in load_problems("ledger", n=3)]


def written_without(model, prompts, edges, n=40):
    sampling = Sampling(max_new_tokens=n)
    with writing_without(model, edges) as cut:
        done = generate(model, prompts, sampling, seeds=[0] * len(prompts), on_step=cut.on_step)
    return done, cut.count


@pytest.mark.parametrize("layers", [None, (2, 3)])
def test_every_written_token_is_the_likeliest_without_the_edges(model, prompts, layers):
    edges = Edges(readers=Scope(generation_window=(3, None)), read=Scope(prompt_window=(4, 20)), layers=layers)
    done, count = written_without(model, prompts, edges)
    plain, _ = written_without(model, prompts, Edges(readers=Scope(tokens=frozenset()), read=Scope()))
    assert count > 0
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(done, plain, strict=True))
    for one in done:
        ids = torch.from_numpy(one.token_ids[None])
        logits = reading_without(model, edges)(ids, torch.ones_like(ids), [one.n_prompt_tokens])[0]
        likeliest = logits.argmax(dim=-1)[one.n_prompt_tokens - 1 : -1]
        assert torch.equal(likeliest, ids[0, one.n_prompt_tokens :])
    assert not any(module._forward_pre_hooks for module in model.hf.modules())


def test_a_row_writes_the_same_alone(model, prompts):
    edges = Edges(readers=Scope(generation_window=(0, None)), read=Scope(prompt_window=(0, 12)))
    together, _ = written_without(model, prompts, edges)
    alone, _ = written_without(model, prompts[:1], edges)
    assert together[0].token_ids.tolist() == alone[0].token_ids.tolist()


def test_the_ablated_model_answers_again_beside_edges_to_other_tokens(model):
    problems = load_problems("ledger", n=2)
    edges = Edges(readers=Scope(generation_window=(0, None)), read=Scope(prompt_window=(0, 12)))
    found = regenerate_ablated(
        model, Ablation(name="blind", edges=edges), [], problems, Sampling(max_new_tokens=30), n_controls=2
    )
    assert [one.name for one in found.random] == ["blind, random 1", "blind, random 2"]
    assert found.arm.measures.keys() == found.random[0].measures.keys() and len(found.answers) == 2
    assert type(found).from_dict(found.to_dict()).to_dict() == found.to_dict()
    nothing = Edges(readers=Scope(tokens=frozenset()), read=Scope())
    with pytest.raises(InputError, match="cut no edge"):
        regenerate_ablated(
            model, Ablation(name="x", edges=nothing), [], problems, Sampling(max_new_tokens=3), n_controls=1
        )


def test_random_tokens_stay_the_same_while_the_text_grows():
    """As many as are named so far; a draw changes only when the named ones become more."""
    named = _RandomScope.like(Scope(prompt_window=(0, 3)), 5)
    ids, n = torch.arange(1, 13)[None], torch.tensor([8])
    grown = [set(named.mask(ids[:, :k], n_prompt=n)[0].nonzero()[:, 0].tolist()) for k in range(8, 13)]
    assert all(len(one) == 3 and not one & {0, 1, 2} for one in grown)
    padded = torch.cat([torch.full((1, 4), -1), ids], dim=1)
    assert set((named.mask(padded, n_prompt=n)[0].nonzero()[:, 0] - 4).tolist()) == grown[-1]
    drawn = _random_edges(Edges(readers=Scope(), read=Scope(prompt_window=(0, 3))), [], n_controls=3, seed=0)
    assert len({one.read.seed for one in drawn}) == 3


def test_a_mask_that_does_not_fit_the_edges_is_refused(model):
    cut = _RunningCut(Edges(readers=Scope(), read=Scope()))
    cut._cut = torch.ones(1, 2, 3, dtype=torch.bool)
    module, fits = model.hf, torch.zeros(1, 1, 2, 3)
    assert (cut.mask(module, (), {"attention_mask": fits})[1]["attention_mask"] < 0).all()
    assert cut.mask(module, (), {"attention_mask": fits[..., :2]})[1]["attention_mask"].shape == (1, 1, 2, 2)
    for mask in ("sdpa", fits[0], torch.zeros(1, 1, 2, 4)):
        with pytest.raises(InputError, match="in the order of the text"):
            cut.mask(module, (), {"attention_mask": mask})
    whole = _masking(torch.ones(1, 3, 3, dtype=torch.bool))
    for mask in (None, torch.zeros(1, 1, 3, 4)):
        with pytest.raises(InputError, match="without a cache"):
            whole(module, (), {"attention_mask": mask})


def test_ids_are_found_whether_they_have_a_name_or_not(model):
    """A model may be called with its ids by name or by place; padding is never read."""
    ids, mask = torch.tensor([[7, 8, 9, 10]]), torch.tensor([[0, 1, 1, 1]])
    cuts = []
    for args, named in (((ids,), {}), ((), {"input_ids": ids})):
        cut = _RunningCut(Edges(readers=Scope(), read=Scope(prompt_window=(0, 2))))
        cut.on_step(DecodingStep(index=0, rows=torch.tensor([0]), ids=ids))
        cut.begin_pass(model.hf, args, {**named, "attention_mask": mask})
        cuts.append(cut._cut[0].tolist())
    assert cuts[0] == cuts[1] and not any(row[0] for row in cuts[0]) and cut.count == sum(map(sum, cuts[0])) > 0
