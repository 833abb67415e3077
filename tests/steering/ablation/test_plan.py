"""Plans know every target, sweep over layers and strengths, and name the entry that is wrong."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError, SiteError
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Ablation, Scope, SteeringVector
from reasonscope.steering.ablation.controls import _RandomScope
from reasonscope.steering.ablation.plan import Patch, Side, read_plan
from reasonscope.steering.ablation.targets import Neuron
from reasonscope.steering.recipes.description import describe_scope


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture
def folder(tmp_path, model):
    d = model.d_model
    directions = {Site("resid_post", 3): np.ones(d, np.float32)}
    SteeringVector(directions=directions, method="made").save(tmp_path / "vector.safetensors")
    weights = {"W_enc": (d, 5), "b_enc": (5,), "W_dec": (5, d), "b_dec": (d,)}
    save_file({name: np.ones(shape, np.float32) for name, shape in weights.items()}, tmp_path / "sae.safetensors")
    narrow = {Site("resid_post", 3): np.ones(7, np.float32)}
    SteeringVector(directions=narrow, method="made").save(tmp_path / "narrow.safetensors")
    return tmp_path


def read(folder, model, text, **more):
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return read_plan(path, model, **more)


def test_a_plan_names_every_target(folder, model):
    plan = read(
        folder,
        model,
        """
        n_matched: 3
        ablations:
          - {name: neurons, neurons: ["3.17", "3.40"], strength: 0.5}
          - {name: direction, directions: vector.safetensors, how: mean}
          - {name: moved, directions: {file: vector.safetensors, site: resid_post.1}}
          - {name: latents, latents: {file: sae.safetensors, site: resid_post.2, chosen: [0, 4], top: 2}}
          - {name: ranked, heads: "from:analyse/heads@top2"}
        patches:
          - {name: traces, clean: a/0, corrupted: {trace: b/0}, at: heads, last: 4, n_controls: 1}
          - name: texts
            clean: {prompt: "1 + 1 =", answer: " 2"}
            corrupted: {question: "1 + 2 =", prefill: "So", answer: " 3"}
        """,
        heads_from=lambda name: [Head.parse("1.2"), Head.parse("2.0")],
    )
    neurons, direction, moved, latents, ranked = plan.ablations
    assert plan.n_matched == 3 and neurons.neurons == (Neuron(layer=3, index=17), Neuron(layer=3, index=40))
    assert neurons.strength == 0.5 and direction.how == "mean"
    assert [list(one.directions.basis) for one in (direction, moved)] == [
        [Site("resid_post", 3)],
        [Site("resid_post", 1)],
    ]
    assert (latents.latents.chosen, latents.latents.dictionary.top) == ((0, 4), 2)
    assert ranked.heads == (Head.parse("1.2"), Head.parse("2.0"))
    traces, texts = plan.patches
    assert traces == Patch(
        name="traces", clean=Side(trace="a/0"), corrupted=Side(trace="b/0"), at="heads", last=4, n_controls=1
    )
    assert texts.corrupted == Side(question="1 + 2 =", prefill="So", answer=" 3") and texts.at == "resid_pre"


def test_an_entry_is_swept_over_layers_or_strengths(folder, model):
    plan = read(
        folder,
        model,
        """
        sweep: {strength: [0.5, 1]}
        ablations:
          - {name: by layer, mlps: [layer], sweep: {layer: [1, 4]}}
          - {name: heads, heads: ["layer.3"], sweep: {layer: [0]}}
          - {name: one MLP, mlps: [2]}
          - {name: direction, directions: {file: vector.safetensors, site: resid_post.layer}, sweep: {layer: [2]}}
        """,
    )
    assert [one.name for one in plan.ablations] == [
        "by layer, layer 1", "by layer, layer 4", "heads, layer 0", "one MLP, strength 0.5", "one MLP, strength 1",
        "direction, layer 2",
    ]  # fmt: skip
    assert [one.mlps for one in plan.ablations[:2]] == [(1,), (4,)] and plan.ablations[2].heads == (Head.parse("0.3"),)
    assert [one.strength for one in plan.ablations[3:5]] == [0.5, 1.0]
    assert list(plan.ablations[5].directions.basis) == [Site("resid_post", 2)]
    assert (plan.sweeps["by layer"].over, plan.sweeps["by layer"].values) == ("layer", (1.0, 4.0))
    assert plan.sweeps["one MLP"].names == ("one MLP, strength 0.5", "one MLP, strength 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ablations: [{name: x, heads: ['9.0']}]", "the model has 6 layers"),
        ("ablations: [{name: x, heads: ['1.9']}]", "head 9 at z.1: this block has heads 0 to 3"),
        ("ablations: [{name: x, neurons: ['1.99999']}]", "neuron 99999 at mlp_post.1"),
        ("ablations: [{name: x, experts: ['1.0']}]", "router"),
        ("ablations: [{name: x, mlps: [9]}]", "the model has 6 layers"),
        (
            "ablations: [{name: x, directions: narrow.safetensors}]",
            "width 7 at resid_post.3, but the states of this model are 128",
        ),
        ("ablations: [{name: x, directions: none.safetensors}]", "none.safetensors does not exist"),
        ("ablations: [{name: x, directions: sae.safetensors}]", "sae.safetensors"),
        (
            "ablations: [{name: x, latents: {file: vector.safetensors, site: resid_post.1, chosen: [0]}}]",
            "has no W_enc",
        ),
        ("ablations: [{name: x, latents: {file: sae.safetensors, site: resid_post.1, chosen: [5]}}]", "latents 0 to 4"),
        ("ablations: [{name: x, latents: {file: sae.safetensors, site: resid_post.1}}]", "no latent is named"),
        ("ablations: [{name: x, latents: {file: sae.safetensors, chosen: [0]}}]", "names no site"),
        ("ablations: [{name: x, latents: {site: resid_post.1, chosen: [0]}}]", "names no file"),
        ("ablations: [{name: x, heads: 'from:analyse/heads@top3'}]", "no run is given"),
        ("ablations: [{name: x, edges: {readers: {}, read: {}, layers: [9]}}]", "the model has 6 layers"),
        ("ablations: [{name: x, mlps: [1], strength: -1}]", "a strength of -1"),
        ("ablations: [{name: x, mlps: [1], sweep: {layer: [1]}}]", "no field says `layer`"),
        ("ablations: [{name: x, mlps: [1], sweep: {width: [1]}}]", "unknown name 'width'"),
        ("ablations: [{name: x, mlps: [layer], sweep: {layer: [1], strength: [1]}}]", "either layer or strength"),
        ("ablations: [{name: x, mlps: [1]}, {name: x, mlps: [2]}]", "two entries are called 'x'"),
        ("{traces: 0, ablations: [{name: x, mlps: [1]}]}", "traces: 0; give 1 or more"),
        ("{problems: -1, ablations: [{name: x, mlps: [1]}]}", "problems: -1; give 0 or more"),
        ("patches: [{name: x, clean: a/0, corrupted: b/0, n_controls: -1}]", "n_controls: -1; give 0 or more"),
        ("patches: [{name: x, clean: a/0}]", "has no corrupted"),
        ("patches: [{name: x, clean: a/0, corrupted: {prompt: hello, answer: b}}]", "a trace on both sides"),
        ("patches: [{name: x, clean: {prompt: a}, corrupted: {prompt: b}}]", "has no answer"),
        (
            "patches: [{name: x, clean: {prompt: a, trace: b}, corrupted: {prompt: b}}]",
            "one of trace, prompt and question",
        ),
    ],
)
def test_an_entry_that_cannot_be_is_refused_in_one_line(folder, model, text, message):
    with pytest.raises((InputError, SiteError)) as refused:
        read(folder, model, text)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_tokens_of_a_scope_may_be_words(folder, model):
    text = 'ablations: [{name: x, heads: ["1.2"], scope: {words: ["Wait", "So"], generation_window: [0]}}]'
    (found,) = read(folder, model, text).ablations
    words = {model.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Wait", "So")}
    assert words <= found.scope.tokens and found.scope.generation_window == (0, None)
    with pytest.raises(InputError, match="xylophones"):
        read(folder, model, text.replace("Wait", "xylophones"))


def test_an_ablation_says_what_it_removes_and_all_that_changes_what_it_does(folder, model):
    heads = Ablation(name="x", heads=(Head.parse("1.2"),), how="resample", strength=0.5)
    assert heads.members == (Head.parse("1.2"),)
    assert heads.describe() == {"heads": ["1.2"], "how": "resample", "strength": 0.5, "scope": describe_scope(Scope())}
    text = "ablations: [{name: l, latents: {file: sae.safetensors, site: resid_post.2, chosen: [0, 4]}}]"
    (latents,) = read(folder, model, text).ablations
    assert latents.members == (0, 4)
    scope = Scope(generation_window=(0, None))
    drawn = [Ablation(name="x", tokens=_RandomScope.like(scope, seed)).describe()["tokens"] for seed in (1, 2)]
    assert drawn[0] != drawn[1] and drawn[0]["random"]["instead_of"] == describe_scope(scope)
    with pytest.raises(InputError, match="choose zero, mean or resample"):
        Ablation(name="x", heads=(Head.parse("1.2"),), how="noise")
