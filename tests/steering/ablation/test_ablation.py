"""Ablations take away what they name and nothing else; their effects are compared with random ones; invalid plans are refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.intervals import Estimate
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Ablation, Scope, ablation_effect
from reasonscope.steering.ablation import effects as ablation_module
from reasonscope.steering.ablation.controls import _RandomScope
from reasonscope.steering.ablation.interventions import AblationIntervention, reference_states
from reasonscope.steering.ablation.knockout import Edges, _without_edges
from reasonscope.steering.ablation.plan import read_plan
from reasonscope.steering.ablation.regeneration import regenerate_ablated


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def traces(model):
    found = rollouts(model, load_problems("requests", n=6), Sampling(max_new_tokens=160))
    whole = [trace for trace in found if len(trace.tokens.answer) and len(trace.tokens.thinking)]
    assert len(whole) >= 2
    return whole[:2]


@pytest.fixture(scope="module")
def ids(traces):
    return torch.from_numpy(traces[0].token_ids[None, :40])


def seen(model, ids, ablation, *sites, bank=None):
    replacing = AblationIntervention(model, ablation, bank)
    out = model.backend.forward(ids, mask=torch.ones_like(ids), read=sites, write=replacing.edits)
    return out.activations


def test_a_head_is_zeroed_before_the_output_projection_and_the_others_stay(model, ids):
    z, out = Site("z", 1), Site("attn_out", 1)
    _, plain = run_with_cache(model, ids, [z, out])
    after = seen(model, ids, Ablation(name="h", heads=(Head(layer=1, index=2),)), z, out)
    assert (after[z][:, :, 2] == 0).all()
    rest = [head for head in range(model.n_heads) if head != 2]
    assert torch.equal(after[z][:, :, rest], plain[z][:, :, rest])
    weight, _ = model.layout.output_weights(model.hf, 1)
    torch.testing.assert_close(plain[out] - after[out], plain[z][:, :, 2] @ weight[2], atol=1e-4, rtol=1e-3)


def test_means_and_draws_come_from_the_reference(model, ids, traces):
    site = Site("mlp_out", 2)
    bank = reference_states(model, traces[:2], [site])
    assert len(bank[site]) == sum(len(trace.token_ids) - 1 for trace in traces[:2])
    mean = seen(model, ids, Ablation(name="m", mlps=(2,), how="mean"), site, bank=bank)[site]
    torch.testing.assert_close(mean[0, 5], bank[site].mean(dim=0))
    drawn = seen(model, ids, Ablation(name="r", mlps=(2,), how="resample"), site, bank=bank)[site][0]
    assert all((bank[site] == row).all(dim=1).any() for row in drawn[:5])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_layer_that_is_zeroed_hands_its_input_on(model, ids):
    before, after = Site("resid_pre", 3), Site("resid_post", 3)
    states = seen(model, ids, Ablation(name="l", layers=(3,), scope=Scope(prompt_window=(4, 9))), before, after)
    torch.testing.assert_close(states[after][:, 4:9], states[before][:, 4:9])
    assert not torch.allclose(states[after][:, 9:], states[before][:, 9:])


def test_a_token_that_is_taken_away_is_gone_for_all_that_follow(model, ids):
    site = Site("resid_post", 0)
    _, plain = run_with_cache(model, ids, [site])
    after = seen(model, ids, Ablation(name="t", tokens=Scope(prompt_positions=(7,))), Site("resid_pre", 0), site)
    assert (after[Site("resid_pre", 0)][0, 7] == 0).all()
    assert torch.equal(after[site][:, :7], plain[site][:, :7]) and not torch.equal(
        after[site][:, 8:], plain[site][:, 8:]
    )


def test_edges_that_are_cut_carry_nothing(model, ids):
    probs = Site("attn_probs", 1)
    edges = Edges(readers=Scope(prompt_window=(20, None)), read=Scope(prompt_window=(5, 10)))
    cut = edges.cut(ids, torch.tensor([ids.shape[1]]))
    assert cut.sum() == 20 * 5
    _, plain = run_with_cache(model, ids, [probs])
    with _without_edges(model, cut):
        _, without = run_with_cache(model, ids, [probs])
    assert (without[probs][:, :, 20:, 5:10] == 0).all() and (plain[probs][:, :, 20:, 5:10] > 0).any()
    torch.testing.assert_close(without[probs].sum(dim=-1), torch.ones_like(plain[probs].sum(dim=-1)))
    assert not any(module._forward_pre_hooks for module in model.hf.modules())
    # what stands at the reader cannot depend on what was cut, where each layer is cut off and nothing in between carries it on
    other = ids.clone()
    other[0, 8] = (other[0, 8] + 1) % model.vocabulary
    blind = Edges(readers=Scope(prompt_window=(9, None)), read=Scope(prompt_positions=(8,)))
    with _without_edges(model, blind.cut(ids, torch.tensor([ids.shape[1]]))):
        assert torch.equal(model.hf(ids).logits[:, 9:], model.hf(other).logits[:, 9:])


def test_effects_are_compared_with_random_ones(model, traces):
    thinking = Edges(readers=Scope.of(model, on="answer"), read=Scope.of(model, on="think"))
    layers = Ablation(name="layers", layers=(1, 2), scope=Scope.of(model, on="think"))
    found = {}
    for ablation in (
        Ablation(name="heads", heads=(Head(layer=1, index=0), Head(layer=3, index=2))),
        layers,
        Ablation(name="answers do not see the thinking", edges=thinking),
        Ablation(name="tokens", tokens=Scope.of(model, on="think", generation_window=(0, 9)), how="mean"),
    ):
        found[ablation.name] = one = ablation_effect(model, traces, ablation)
        assert one.smallest_p == 1 / (1 + one.n_disjoint) <= one.p_value <= 1
        assert one.effect.low <= one.effect.value <= one.effect.high and one.n_edited > 0
        assert one.side_effects["kl_thinking"].value > -1e-6  # no less than rounding
    # three other heads in each of two layers; two of the four other layers; and more sets of tokens than are drawn
    assert {name: len(one.null) for name, one in found.items()} == {
        "heads": 9,
        "layers": 6,
        "answers do not see the thinking": 20,
        "tokens": 20,
    }
    # of these, sets that share no head or layer: one head of each layer at a time, and two layers at a time
    assert [found[name].n_disjoint for name in ("heads", "layers", "tokens")] == [3, 2, 20]
    assert {name: one.control for name, one in found.items()} == {
        "heads": "as many random heads of the same layers",
        "layers": "as many random other layers",
        "answers do not see the thinking": "edges to as many random tokens",
        "tokens": "as many random tokens of the same traces",
    }
    assert found["layers"].side_effects["kl_thinking"].value > 0.01
    assert found["layers"].null == ablation_effect(model, traces, layers).null  # the seed decides the controls


def test_every_measure_is_that_of_the_two_models_next_token(model, traces):
    ablation = Ablation(name="layers", layers=(1, 2))
    found = ablation_effect(model, traces, ablation)
    sums = np.zeros((2, 2))  # nll and KL of answer and thinking
    counts = np.zeros(2)
    for trace in traces:
        ids = torch.from_numpy(trace.token_ids[None])
        one = torch.ones_like(ids)
        plain = model.backend.forward(ids, mask=one).logits[0].double().log_softmax(-1)
        writes = AblationIntervention(model, ablation, None).edits
        changed = model.backend.forward(ids, mask=one, write=writes).logits[0].double().log_softmax(-1)
        answer = np.arange(trace.tokens.answer.start, trace.tokens.answer.stop)
        for i, places in enumerate((answer, trace.thinking_positions)):
            rows, wrote = torch.from_numpy(places - 1), torch.from_numpy(trace.token_ids[places])
            p, q = plain[rows], changed[rows]
            sums[0, i] += float((p - q)[torch.arange(len(rows)), wrote].sum())
            sums[1, i] += float((p.exp() * (p - q)).sum())
            counts[i] += len(rows)
    (nll, nll_thinking), (kl, kl_thinking) = sums / counts
    assert found.effect.value == pytest.approx(nll, rel=1e-3)
    measures = {"nll_thinking": nll_thinking, "kl_answer": kl, "kl_thinking": kl_thinking}
    assert {name: one.value for name, one in found.side_effects.items()} == pytest.approx(measures, rel=1e-3)


@pytest.mark.parametrize("n_heads", [4, 8, 16, 28])
def test_a_head_like_any_other_is_rarely_significant(monkeypatch, n_heads):
    """Under a true null p ≤ .05 comes in at most 5 % of cases, and never where too few other heads exist."""
    rng, found = np.random.default_rng(n_heads), []
    parts = SimpleNamespace(answer="answer", thinking="thinking")
    traces = [SimpleNamespace(tokens=parts, problem=SimpleNamespace(group=group)) for group in "ab"]
    blocks = [SimpleNamespace(n_heads=n_heads)] * 3
    model = SimpleNamespace(layout=SimpleNamespace(of_block=blocks, layers_with=lambda point: (0, 1, 2)))
    monkeypatch.setattr(ablation_module, "_splits", lambda *_: {})
    unknown, effects = Estimate(value=0.0, low=0.0, high=0.0), np.zeros(n_heads)

    def measured(model, read, readings, *_):
        values = [float(effects[one.ablation.heads[0].index]) for one in readings]
        found = {"side_effects": {}, "n_edited": 1, "distance": None, "losses": {}}
        return [SimpleNamespace(effect=replace(unknown, value=v), **found) for v in values]

    monkeypatch.setattr(ablation_module, "_measure", measured)
    for seed in range(2000):
        effects[:] = rng.standard_normal(n_heads)
        one = Ablation(name="one", heads=(Head(layer=0, index=seed % n_heads),))
        found.append(
            ablation_effect(
                model,
                traces,
                one,
                n_matched=0,
                seed=seed,
            )
        )
    n_controls = min(20, n_heads - 1)
    assert {len(one.null) for one in found} == {n_controls} and {one.smallest_p for one in found} == {
        1 / (1 + n_controls)
    }
    p = np.array([one.p_value for one in found])
    rate = 1 / (1 + n_controls) if n_controls >= 19 else 0.0
    assert abs((p <= 0.05).mean() - rate) < 0.016  # 3.3 standard errors
    assert (p == p.min()).mean() == pytest.approx(1 / (1 + n_controls), abs=0.035)


def test_the_control_of_tokens_are_as_many_others(model, ids):
    named = Scope(prompt_window=(3, 8))
    drawn = [_RandomScope.like(named, seed).mask(ids)[0] for seed in range(4)]
    assert all(mask.sum() == 5 and not mask[3:8].any() for mask in drawn)
    assert len({tuple(mask.tolist()) for mask in drawn}) == 4


def test_what_cannot_be_ablated_is_refused(model, traces):
    with pytest.raises(InputError, match="names nothing"):
        Ablation(name="x")
    with pytest.raises(InputError, match="give one of heads"):
        Ablation(name="x", mlps=(1,), layers=(1,))
    with pytest.raises(InputError, match="resample"):
        Ablation(name="x", mlps=(1,), how="shuffle")
    with pytest.raises(InputError, match="heads 0 to"):
        AblationIntervention(model, Ablation(name="x", heads=(Head(layer=0, index=99),)))
    with pytest.raises(SiteError, match="layers"):
        AblationIntervention(model, Ablation(name="x", mlps=(99,)))
    with pytest.raises(InputError, match="reference_states"):
        AblationIntervention(model, Ablation(name="x", mlps=(1,), how="mean"))
    with pytest.raises(InputError, match="at least 20"):
        ablation_effect(model, traces, Ablation(name="x", mlps=(1,)), n_controls=3)
    with pytest.raises(InputError, match="of 1 traces only 1 have an answer, of one group of problems"):
        ablation_effect(model, traces[:1], Ablation(name="x", mlps=(1,)))
    with pytest.raises(InputError, match="too few others"):
        ablation_effect(model, traces, Ablation(name="x", mlps=tuple(range(model.n_layers - 1))))
    with pytest.raises(InputError, match="edited nothing"):
        ablation_effect(model, traces, Ablation(name="x", mlps=(1,), scope=Scope(tokens=frozenset())))
    with pytest.raises(InputError, match="leaves no other token"):
        ablation_effect(model, traces, Ablation(name="x", tokens=Scope()))
    everything = tuple(Head(layer=layer, index=i) for layer in range(model.n_layers) for i in range(model.n_heads))
    with pytest.raises(InputError, match="choose fewer heads"):
        ablation_effect(model, traces, Ablation(name="x", heads=everything))


PLAN = """
n_controls: 25
ablations:
  - {name: heads, heads: ["1.0", "3.2"], how: mean, scope: {on: think}}
  - {name: words, tokens: {on: think, words: [Wait]}}
  - {name: blind, edges: {readers: {on: answer}, read: {on: think, exclude_generation_positions: [0]}, layers: [2]}}
"""


def test_a_plan_says_what_to_do(model, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN, encoding="utf-8")
    plan = read_plan(path, model)
    heads, words, blind = plan.ablations
    assert plan.n_controls == 25 and plan.traces is None
    assert (heads.heads, heads.how, heads.scope.on) == ((Head.parse("1.0"), Head.parse("3.2")), "mean", "think")
    decoded = {model.tokenizer.decode([token]).strip() for token in words.tokens.tokens}
    assert decoded == {"Wait"}
    assert blind.edges.layers == (2,) and blind.edges.read.exclude_generation_positions == (0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot read the plan"),
        (
            "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)),
            "alias [*]a0",
        ),
        ("&a [*a]", "alias [*]a"),
        ("- 1", "give names with values"),
        ("ablations: []", "has no ablations"),
        ("ablations: [{heads: ['1.0']}]", "ablation 1 has no name"),
        ("ablations: [{name: x, head: 1}]", "unknown name 'head'"),
        ("ablations: [{name: x, heads: [1.10]}]", "in quotes"),
        ("ablations: [{name: x, heads: ['1']}]", "ablation 1: '1' is not a head"),
        ("ablations: [{name: x, tokens: {words: ['no such word at all']}}]", "more than one token"),
        ("ablations: [{name: x, tokens: {where: 3}}]", "unknown name 'where'"),
        ("ablations: [{name: x, tokens: {prompt_window: [1, 2, 3]}}]", "is not a window"),
    ],
)
def test_an_invalid_plan_is_refused(model, tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_plan(path, model)


def drawn_tokens(scope, ids):
    """The places that forty controls of `scope` remove, each as many as the scope names."""
    masks = [_RandomScope.like(scope, seed).mask(torch.tensor([ids]))[0].tolist() for seed in range(40)]
    assert {sum(mask) for mask in masks} == {int(scope.mask(torch.tensor([ids])).sum())}
    return {place for mask in masks for place, removed in enumerate(mask) if removed}


def test_where_a_region_has_too_few_other_tokens_any_of_the_text_are_drawn():
    few = Scope(tokens=frozenset({1}))
    assert drawn_tokens(few, [1, 1, 0, 3, 4, -1]) == {2, 3, 4}  # others of the text, id 0 too, and no padding
    assert drawn_tokens(few, [1, 1, 1, 0, 2, -1]) == {0, 1, 2, 3, 4}


def test_controls_that_hold_removed_tokens_are_called_so(model, traces):
    """Of a text, all that was generated is more than half, so that as many others are not left."""
    few, most = (Ablation(name="t", tokens=Scope(generation_window=(0, end))) for end in (3, None))
    assert ablation_effect(model, traces[:2], few).control == "as many random tokens of the same traces"
    assert "removed ones among them" in ablation_effect(model, traces[:2], most).control


def test_what_was_written_again_is_kept_with_its_controls(model, traces):
    sampling = Sampling(temperature=0.0, max_new_tokens=4)
    problems = [trace.problem for trace in traces]
    found = regenerate_ablated(model, Ablation(name="m", mlps=(4,)), traces, problems, sampling, n_controls=2)
    told = found.to_dict()
    assert told["name"] == "m" and [one["name"] for one in told["random"]] == ["m, random 1", "m, random 2"]
    assert told["excess_over_random"].keys() == found.excess.keys() and "tokens" in found.excess


def test_the_effect_is_the_loss_of_the_answer(model, traces):
    ablation = Ablation(name="m", mlps=(4,))
    found = ablation_effect(model, traces, ablation)
    losses, n = [], []
    for trace in traces:
        ids = torch.from_numpy(trace.token_ids[None])
        plain, out = (
            model.backend.forward(ids, mask=torch.ones_like(ids), write=write).logits[0].log_softmax(-1)
            for write in (None, AblationIntervention(model, ablation).edits)
        )
        at = np.arange(trace.tokens.answer.start, trace.tokens.answer.stop)
        losses.append(float((plain - out)[at - 1, trace.token_ids[at]].sum()))
        n.append(len(at))
    assert found.effect.value == pytest.approx(sum(losses) / sum(n), rel=1e-3, abs=1e-5)
    assert found.control == "as many random other MLPs"


def test_traces_without_a_difficulty_are_on_neither_side_of_a_split():
    def traces(*difficulties):
        return [SimpleNamespace(problem=SimpleNamespace(difficulty=one), n_thinking_tokens=9) for one in difficulties]

    found = {name: rows.tolist() for name, rows in ablation_module._parts_of(traces(1.0, None, 3.0, 2.0))}
    assert found == {"difficulty up to 2": [0, 3], "difficulty above 2": [2]}
    # Most are as hard as the hardest: the cut is below them, so that none of the parts is empty.
    hardest = {name: rows.tolist() for name, rows in ablation_module._parts_of(traces(1.0, 3.0, 3.0, 2.0, 3.0))}
    assert hardest == {"difficulty up to 2": [0, 3], "difficulty above 2": [1, 2, 4]}
    assert not dict(ablation_module._parts_of(traces(None, None))) and not dict(
        ablation_module._parts_of(traces(1.0, None, 1.0))
    )
