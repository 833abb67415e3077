"""A recipe holds everything that changes tokens: its file brings back the same bits, and what cannot be is one clear line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reasonscope.data.errors import InputError, SiteError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.steering import Scope, SteeringVector, VectorUse, as_intervention
from reasonscope.steering.recipes.description import describe_scope, may_share_a_token, scope_for, scope_in_words
from reasonscope.steering.recipes.recipe import DecodingPart, Recipe, RecipePart
from reasonscope.steering.vectors.operators import OPERATORS, Clamp, MatchedEdit

WRITTEN = Path(__file__).parents[2] / "fixtures" / "written-before-the-move"


def tokens(model, problems, sampling, **how):
    return [trace.token_ids.tolist() for trace in rollouts(model, problems, sampling, **how)]


def by(recipe, model, problems, sampling):
    found = recipe.condition(model)
    return tokens(
        model,
        problems,
        sampling,
        write=found.intervention.edits if found.intervention else None,
        on_step=found.intervention.on_step if found.intervention else None,
        processors=found.processors,
        prefill=found.prefill,
    )


def test_a_file_brings_back_the_same_bits_and_the_same_hash(mixed, tmp_path):
    whole = replace(mixed, decoding=(DecodingPart(name="close-bias", value=2.0),), prefill="So ")
    whole.save(tmp_path / "mixed.recipe.safetensors")
    again = Recipe.load(tmp_path / "mixed.recipe.safetensors")
    assert again.hash == whole.hash and len(again.hash) == 12
    assert (again.name, again.decoding, again.prefill) == (whole.name, whole.decoding, whole.prefill)
    assert again.provenance == whole.provenance and again.provenance["run"] == "runs/mine"
    for ours, theirs in zip(whole.parts, again.parts, strict=True):
        assert (ours.operator, ours.scope, ours.strength) == (theirs.operator, theirs.scope, theirs.strength)
        assert ours.vector.provenance == theirs.vector.provenance
        assert ours.vector.directions.keys() == theirs.vector.directions.keys()
        for site, direction in ours.vector.directions.items():
            assert theirs.vector.directions[site].tobytes() == direction.tobytes()


def test_the_hash_knows_what_changes_tokens_and_nothing_else(everywhere):
    (part,) = everywhere.parts
    assert replace(everywhere, name="other", provenance={}).hash == everywhere.hash
    changed = [
        replace(everywhere, parts=(replace(part, strength=0.6),)),
        replace(everywhere, parts=(replace(part, scope={"on": "think"}),)),
        replace(everywhere, parts=(replace(part, operator={"name": "scaled_add"}),)),
        replace(everywhere, parts=(replace(part, vector=2 * part.vector),)),
        replace(everywhere, prefill="So"),
        replace(everywhere, decoding=(DecodingPart(name="tip", value=3.0),)),
    ]
    assert len({one.hash for one in (everywhere, *changed)}) == 7


@pytest.mark.parametrize("name", ["everywhere", "mixed"])
def test_the_condition_does_what_the_uses_did(name, request, model, problems, sampling):
    recipe = request.getfixturevalue(name)
    uses = [
        VectorUse(vector=part.vector, scope=use.scope, operator=use.operator, strength=part.strength)
        for part, use in zip(recipe.parts, recipe.uses(model), strict=True)
    ]
    steering = as_intervention(uses, 1.0)
    expected = tokens(model, problems, sampling, write=steering.edits, on_step=steering.on_step)
    assert by(recipe, model, problems, sampling) == expected
    assert expected != tokens(model, problems, sampling)


def test_decoding_methods_and_a_prefill_act_with_the_vectors(everywhere, model, problems, sampling):
    closed = replace(everywhere, decoding=(DecodingPart(name="forced-close", value=4.0),), prefill="So ")
    found = by(closed, model, problems, sampling)
    close = model.tokenizer.convert_tokens_to_ids(model.tags.close)
    start = [len(model.encode_prompt(problem, prefill="So ")) for problem in problems]
    assert all(close in ids[n : n + 5] for ids, n in zip(found, start, strict=True))
    begun = replace(everywhere, decoding=(DecodingPart(name="nothinking", value=1.0),))
    assert begun.condition(model).prefill.startswith("Okay")
    with pytest.raises(InputError, match="begins the thinking with 'So ' and with nothinking"):
        replace(begun, prefill="So ").condition(model)


def test_every_published_operator_and_scope_survives_its_description(model, vector_at):
    scopes = [
        Scope(),
        Scope.thinking(model, at_separators=True),
        Scope.of(model, on="close_window"),
        Scope.of(model, on="think", tokens=frozenset({7, 3})),
        Scope.of(model, steps="reflection", variant="published"),
        Scope(prompt_positions=(-1,), generation_window=(0, None)),
        Scope(exclude_generation_window=(0, 10), exclude_prompt_tokens=frozenset({1})),
    ]
    for scope in scopes:
        again = scope_for(describe_scope(scope), model)
        assert replace(again, marks=None, on="all", steps=None) == replace(scope, marks=None, on="all", steps=None)
        assert (again.on, again.steps) == (scope.on, scope.steps)
    vector = vector_at(model, 2)
    for name, operator in OPERATORS.items():
        recipe = Recipe.of([VectorUse(vector=vector, scope=Scope(), operator=operator)])
        assert recipe.parts[0].operator == {"name": name} and recipe.uses(model)[0].operator is operator
    assert scope_in_words({"on": "think", "steps": "separators"}) == "separators of the thinking"
    assert scope_in_words({}) == "every token"


def test_a_use_of_a_random_control_is_refused(model, vector_at):
    matched = MatchedEdit(like=Clamp(to=1.0), read=np.ones(model.d_model, dtype=np.float32))
    with pytest.raises(InputError, match="a recipe holds the operators add"):
        Recipe.of([VectorUse(vector=vector_at(model, 2), scope=Scope(), operator=matched)])


def test_gguf_holds_what_is_added_to_every_token(everywhere, tmp_path):
    pytest.importorskip("gguf")
    everywhere.save(tmp_path / "push.gguf")
    again = Recipe.load(tmp_path / "push.gguf")
    (part,), (ours,) = again.parts, everywhere.parts
    site = Site("resid_post", 2)
    np.testing.assert_array_equal(part.vector.directions[site], np.float32(0.5) * ours.vector.directions[site])
    assert (part.scope, part.operator, part.strength) == ({}, {"name": "add"}, 1.0)


def test_gguf_names_what_it_would_lose(mixed, tmp_path):
    whole = replace(mixed, decoding=(DecodingPart(name="tip", value=3.0),), prefill="So")
    with pytest.raises(InputError) as refused:
        whole.save(tmp_path / "mixed.gguf")
    said = str(refused.value)
    for lost in (
        "tip at 3",
        "the prefill 'So'",
        "clamp to -2.5",
        "every token of the thinking",
        "a strength for each part",
    ):
        assert lost in said
    assert "\n" not in said and not (tmp_path / "mixed.gguf").exists()


def test_merging_keeps_the_order_and_the_sources(everywhere, mixed, model, problems, sampling):
    both = everywhere.merged(mixed)
    assert [part.strength for part in both.parts] == [0.5, 0.5, 0.125]
    assert both.name == "push + mixed" and both.provenance["groups"] == ["a", "b"]
    assert [one["hash"] for one in both.provenance["merged"]] == [everywhere.hash, mixed.hash]
    assert by(both, model, problems, sampling) != by(everywhere, model, problems, sampling)


def test_clamps_of_one_site_on_overlapping_tokens_contradict(mixed, model, vector_at):
    other = Recipe.of(
        [VectorUse(vector=vector_at(model, 3, seed=9), scope=Scope(), operator=Clamp(to=7.0))], name="other"
    )
    with pytest.raises(InputError, match=r"both clamp resid_post.3, to -2.5 and to 7, on tokens that overlap"):
        mixed.merged(other)
    answer = replace(other, parts=(replace(other.parts[0], scope={"on": "answer"}),))
    assert len(mixed.merged(answer).parts) == 3  # no token is in the thinking and in the answer
    with pytest.raises(InputError, match="contradicts itself"):
        Recipe(name="twice", parts=(other.parts[0], replace(other.parts[0], operator={"name": "clamp", "to": 1.0})))


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ({}, {"on": "think"}, True),
        ({"on": "think"}, {"on": "answer"}, False),
        ({"steps": "separators"}, {"on": "close_window"}, False),
        ({"prompt_positions": [-1]}, {"generation_window": [0, None]}, False),
        ({"prompt_positions": [-1], "generation_window": [0, None]}, {"generation_positions": [3]}, True),
    ],
)
def test_scopes_overlap_unless_no_token_can_be_in_both(first, second, overlap):
    assert may_share_a_token(first, second) is may_share_a_token(second, first) is overlap


def test_merging_two_prefills_or_one_decoding_method_twice_is_refused(everywhere):
    first, second = (replace(everywhere, prefill=text) for text in ("So", "Okay"))
    with pytest.raises(InputError, match="both begin the thinking, with 'So' and 'Okay'"):
        first.merged(second)
    none, safe = (
        replace(everywhere, decoding=(DecodingPart(name=name, value=1.0),)) for name in ("nothinking", "safepath")
    )
    with pytest.raises(InputError, match="begins the thinking with nothinking and with safepath; keep one"):
        none.merged(safe)
    tip = replace(everywhere, decoding=(DecodingPart(name="tip", value=3.0),))
    with pytest.raises(InputError, match="asks for tip twice"):
        tip.merged(tip)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": ()}, "recipe 'push' is empty"),
        ({"decoding": (DecodingPart(name="tap", value=1.0),)}, "no decoding method is called 'tap'"),
        (
            {"decoding": (DecodingPart(name="budget-guidance", value=60.0),)},
            "learns with `steer extract budget-guidance`",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(everywhere, change, said):
    with pytest.raises(InputError, match=said) as refused:
        replace(everywhere, **change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scope": {"on": "thinkng"}}, "choose from all, think"),
        ({"scope": {"place": 1}}, "a scope has no field 'place'"),
        ({"scope": {"generation_window": [0]}}, "two \\(start, end or null\\)"),
        ({"operator": {"name": "clamp"}}, "clamp with `to`"),
        ({"operator": {"name": "add", "to": 1.0}}, "choose from add"),
        ({"strength": float("nan")}, "give a finite number"),
    ],
)
def test_a_part_that_cannot_be_is_one_line(everywhere, change, said):
    with pytest.raises(InputError, match=said):
        replace(everywhere.parts[0], **change)


def test_a_recipe_of_another_model_width_or_depth_is_refused(everywhere, model):
    (part,) = everywhere.parts
    elsewhere = {**part.vector.provenance, "model": {**dict(model.fingerprint), "weights": "0" * 64}}
    foreign = replace(part, vector=replace(part.vector, provenance=elsewhere))
    with pytest.raises(InputError, match="was made from 'organism', which differs in weights"):
        replace(everywhere, parts=(foreign,)).check(model)
    site = Site("resid_post", 2)
    wide = SteeringVector(directions={site: np.ones(2 * model.d_model, dtype=np.float32)}, method="seal")
    with pytest.raises(InputError, match=f"width {2 * model.d_model} for organism, whose width is {model.d_model}"):
        Recipe(name="wide", parts=(RecipePart(vector=wide),)).check(model)
    with pytest.raises(InputError, match="needs vectors of one model"):
        Recipe(name="both", parts=(part, RecipePart(vector=wide)))
    deep = SteeringVector(directions={Site("resid_post", 40): np.ones(model.d_model, dtype=np.float32)}, method="seal")
    with pytest.raises(SiteError, match=r"resid_post\.40"):
        Recipe(name="deep", parts=(RecipePart(vector=deep),)).check(model)


def test_other_files_are_refused_in_one_line(everywhere, tmp_path):
    with pytest.raises(InputError, match=r"holds a vector alone, without the tokens and the operator"):
        Recipe.load(WRITTEN / "steering" / "seal.safetensors")
    with pytest.raises(InputError, match="does not exist; give the file of a recipe"):
        Recipe.load(tmp_path / "none")
    path = tmp_path / "push.recipe.safetensors"
    everywhere.save(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # one bit of one direction
    path.write_bytes(raw)
    with pytest.raises(InputError, match="it was altered"):
        Recipe.load(path)


def test_an_old_control_vector_opens_as_a_recipe_for_every_token():
    pytest.importorskip("gguf")
    recipe = Recipe.load(WRITTEN / "steering" / "seal.gguf")
    assert recipe.provenance["method"] == "seal" and recipe.parts[0].scope == {}


def test_the_summary_says_what_acts_where_and_from_what(mixed):
    found = mixed.summary()
    assert mixed.hash in found.finding and "2 problems of runs/mine" in found.finding
    assert found.rows[0][:4] == ("clamp to -2.5", "every token of the thinking", "resid_post.3", "0.5")
    assert found.rows[1][1:4] == (
        "last prompt token, every generated token",
        "resid_post.1 to resid_post.2 (2)",
        "0.125",
    )
