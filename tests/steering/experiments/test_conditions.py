"""Conditions that share a batch write what they would write alone, each on its own rows."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Positions
from reasonscope.probes.generation.decoding import DecodingStep, generate
from reasonscope.probes.generation.recording import record
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import PromptOptions, as_recorded
from reasonscope.steering import (
    AdaptiveSteering,
    CloseTag,
    Composed,
    Scope,
    Steering,
    SteeringExperiment,
    SteeringVector,
    VectorUse,
    as_intervention,
    clamped,
)
from reasonscope.steering.decoding.prefills import prefill
from reasonscope.steering.engine.arms import _asking
from reasonscope.steering.experiments import experiment as bench_of_rows
from reasonscope.steering.experiments.conditions import (
    BatchedConditions,
    Condition,
    method_conditions,
    random_conditions,
)
from reasonscope.steering.recipes.answers import answer_with
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.thinking import WrittenThinking

SAMPLING = Sampling(temperature=1.0, max_new_tokens=30)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def problems():
    """Prompts of different lengths, so that the shorter ones are padded."""
    return load_problems("ledger:brief", n=2) + load_problems("requests", n=1)


@pytest.fixture(scope="module")
def vector(model):
    draws = np.random.default_rng(0).standard_normal((2, model.d_model)).astype(np.float32)
    return SteeringVector(directions={Site("resid_post", i + 1): draws[i] for i in range(2)}, method="test")


def conditions(model, vector):
    """Of every sort: some with steering, some with processors, one with both, one that ends within a few tokens, one with nothing."""
    separators, other = Scope.thinking(model, at_separators=True), vector.random_like(1)
    adaptive = AdaptiveSteering(model, other, monitored=[0], window=2)
    closing = CloseTag(thinking=WrittenThinking.of(model), bias=2.0)
    return [
        Condition(name="everywhere", intervention=Steering(vector, 3.0, Scope())),
        Condition(name="begun", prefill=prefill("nothinking", model)),
        Condition(name="closing", processors=(closing,)),
        Condition(name="adaptive", intervention=adaptive, processors=(adaptive,)),
        Condition(name="as it is"),
        Condition(
            name="two",
            intervention=Composed(
                Steering(vector, -2.0, separators), Steering(other, 4.0, Scope(prompt_positions=(-1,)))
            ),
            processors=(closing,),
        ),
    ]


def test_each_writes_what_it_writes_alone_and_touches_its_own_rows(model, problems, vector):
    together, alone = conditions(model, vector), conditions(model, vector)
    side_by_side = BatchedConditions(together)
    both = {"write": side_by_side.edits, "on_step": side_by_side.on_step, "processors": [side_by_side]}
    prefills = [one.prefill for one in together]
    written = rollouts(model, problems, SAMPLING, batch_size=64, prefill=prefills, **both)
    assert len({trace.n_prompt_tokens for trace in written}) > 3 and len({len(t.token_ids) for t in written}) > 3
    for i, (mine, one) in enumerate(zip(together, alone, strict=True)):
        acting = one.intervention
        steered = {"write": acting.edits, "on_step": acting.on_step} if acting else {}
        expected = rollouts(model, problems, SAMPLING, prefill=one.prefill, processors=one.processors, **steered)
        for a, b in zip(written[i * len(problems) : (i + 1) * len(problems)], expected, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids, err_msg=one.name)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        if acting:
            assert mine.intervention.n_edited == acting.n_edited > 0
    assert together[0].intervention.n_edited > together[5].intervention.n_edited


def test_adaptive_steering_tells_how_far_it_moved_each_token_and_its_controls_move_as_far(model, problems, vector):
    experiment = SteeringExperiment(model, problems, SAMPLING, on_given_text=False)
    adaptive = AdaptiveSteering(model, vector, monitored=[0, 1], lowest=-1.0, highest=2.0, step=0.5, window=3)
    with pytest.raises(InputError, match="not moved any token yet"):
        adaptive.steady()
    (arm,) = experiment.arms([Condition(name="adaptive", intervention=adaptive, processors=(adaptive,))])
    for site, direction in vector.directions.items():
        told, length = adaptive.distances[site], np.linalg.norm(direction)
        assert len(told) == arm.n_edited
        assert {1.0, 0.5, 2.0} <= set(np.round(told / length, 3)) <= {0.0, 0.5, 1.0, 1.5, 2.0}
        assert arm.distances[site] == pytest.approx(told.mean())
    assert arm.distance == pytest.approx(sum(arm.distances.values()))
    numbers = arm.to_dict()
    assert numbers["distance"] == arm.distance
    assert numbers["distances"] == {str(site): moved for site, moved in arm.distances.items()}

    controls = experiment.arms(method_conditions("steady", [adaptive.steady()], 1.0, n_controls=2))
    assert [control.name for control in controls] == ["steady", "random 1, steady", "random 2, steady"]
    for control in controls:
        assert control.distances == pytest.approx(arm.distances, rel=1e-4)
    true, *random = [arm.distances.keys() for arm in controls]
    assert true == random[0] == vector.directions.keys()


def test_the_steady_form_of_adaptive_steering_keeps_its_sign_and_its_tokens(model, problems, vector):
    against = AdaptiveSteering(model, vector, monitored=[0], lowest=-1.5, highest=-1.5)
    experiment = SteeringExperiment(model, problems, SAMPLING, on_given_text=False)
    run, steady = experiment.run("against", against, processors=[against]), against.steady()
    for site, direction in vector.directions.items():
        np.testing.assert_allclose(steady.vector.directions[site], -1.5 * direction, rtol=1e-3)
    alike = experiment.run("alike", as_intervention([steady], 1.0))
    assert [trace.text for trace in alike.traces] == [trace.text for trace in run.traces]
    assert alike.n_edited == run.n_edited


def test_a_distance_that_was_not_measured_is_not_printed_as_zero(model, problems, vector):
    experiment = SteeringExperiment(model, problems, Sampling(max_new_tokens=4), on_given_text=False)
    unmeasured = Condition(name="unmeasured", intervention=Steering(vector, 1.0, Scope()))
    (arm,) = experiment.arms([unmeasured])
    assert np.isnan(arm.distance) and arm.to_dict()["distance"] is None
    assert experiment.base_arm.distance == 0 and experiment.base_arm.to_dict()["distances"] == {}


def test_an_experiment_runs_the_base_with_the_first_conditions(model, problems, vector, heard):
    experiment = SteeringExperiment(model, problems, Sampling(max_new_tokens=4), batch_size=3, on_given_text=False)
    wanted = [Condition(name=f"s = {s}", intervention=Steering(vector, s, Scope())) for s in (0.0, 9.0, 0.0)]
    plain, moved, again = experiment.run_all(wanted)
    (steering,) = [work for work in heard if work.what == "steering"]
    assert (steering.total, steering.done, steering.detail) == (4, 4, "s = 0.0")  # the last alone: three rows at a time
    assert [work.total for work in heard if work.what == "writing"] == [3 * len(problems), len(problems)]
    np.testing.assert_array_equal(plain.values["compression"], experiment.base.values["compression"])
    np.testing.assert_array_equal(again.values["compression"], experiment.base.values["compression"])
    assert plain.n_edited == again.n_edited > 0 and moved.n_edited > 0
    with pytest.raises(InputError, match="two conditions share one intervention"):
        experiment.run_all([wanted[0], wanted[0]])


def test_a_bench_takes_as_many_rows_as_there_is_room_for(model, problems, monkeypatch):
    sampling, asked = Sampling(temperature=0, max_new_tokens=4), []
    longest = max(len(model.encode_prompt(problem)) for problem in problems)
    wide = SteeringExperiment(model, problems, sampling)
    whole = wide.base

    def few(model, tokens, *, most):
        asked.append((tokens, most))
        return 2

    monkeypatch.setattr(bench_of_rows, "max_rows_that_fit", few)
    narrow = SteeringExperiment(model, problems, sampling)
    assert [one.token_ids.tolist() for one in narrow.traces] == [one.token_ids.tolist() for one in wide.traces]
    for name, values in whole.values.items():
        np.testing.assert_allclose(narrow.base.values[name], values, rtol=1e-4, err_msg=name)
    assert asked == [(longest + 4, 256)]


def test_a_decoding_loop_of_its_own_runs_beside_the_others(model, problems, vector):
    experiment = SteeringExperiment(model, problems, SAMPLING, on_given_text=False)
    loop = lambda prompts, seeds: generate(model, prompts, SAMPLING, seeds=seeds)  # noqa: E731
    steered = Condition(name="steered", intervention=Steering(vector, 3.0, Scope()))
    own, moved = experiment.run_all([Condition(name="own", decode=loop), steered])
    assert [one.text for one in own.traces] == [one.text for one in experiment.traces]
    alone = SteeringExperiment(model, problems, SAMPLING, on_given_text=False).run("x", Steering(vector, 3.0, Scope()))
    assert [one.text for one in moved.traces] == [one.text for one in alone.traces]
    with pytest.raises(InputError, match="decoding loop of its own"):
        Condition(name="both", decode=loop, prefill="So")


def test_a_method_comes_with_random_vectors_of_its_norm(vector):
    conditions = method_conditions("seal", [VectorUse(vector=vector, scope=Scope())], 0.5, n_controls=2)
    assert [one.name for one in conditions] == ["seal", "random 1, seal", "random 2, seal"]
    assert {one.multiplier for one in conditions} == {0.5}
    drawn = [one.intervention.interventions[0].vector for one in conditions]
    assert drawn[0] is vector
    for seed, one in enumerate(drawn[1:], start=1):
        for site, direction in vector.random_like(seed).directions.items():
            np.testing.assert_array_equal(one.directions[site], direction)


def test_random_conditions_take_the_moves_of_the_arm(vector):
    """Clamped controls add, along directions of their own, the distances that were measured."""
    site = next(iter(vector.directions))
    one = replace(vector, directions={site: vector.directions[site]}, provenance={"towards": {str(site): 3.0}})
    drawn = random_conditions("seal", clamped(one, Scope()), 0.5, n_controls=2, moves=[{site: 8.0}])
    assert [one.name for one in drawn] == ["random 1, seal", "random 2, seal"]
    for condition in drawn:
        (part,) = condition.intervention.interventions
        assert part.multiplier == 0.5 and np.linalg.norm(part.vector.directions[site]) == pytest.approx(8.0, rel=1e-5)


def test_unequal_parts_are_refused(vector):
    with pytest.raises(InputError, match="no condition"):
        BatchedConditions([])
    step = DecodingStep(index=0, rows=torch.arange(3), ids=torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(InputError, match="3 rows cannot be split evenly between 2"):
        BatchedConditions([Condition(name="a"), Condition(name="b")]).on_step(step)


def test_what_nobody_changes_stays_the_very_tensor(vector):
    idle = BatchedConditions(
        [Condition(name="none"), Condition(name="zero", intervention=Steering(vector, 0.0, Scope()))]
    )
    ids = torch.ones(2, 3, dtype=torch.long)
    idle.on_step(DecodingStep(index=0, rows=torch.arange(2), ids=ids))
    states = torch.ones(2, 3, vector.width)
    where = Positions(index=torch.arange(3).expand(2, 3), ids=ids)
    assert idle.edits[Site("resid_post", 1)](states, where) is states


@pytest.fixture(scope="module")
def forgetful(model):
    """The model with a template that leaves it to the model to open the tag."""
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\\n", "")
    return replace(model, tokenizer=tokenizer)


def arm_of_hooks(model, problems):
    return SteeringExperiment(model, problems, SAMPLING).base.traces


def plain_answers(model, problems):
    vector = SteeringVector(directions={Site("resid_post", 1): np.ones(model.d_model, dtype=np.float32)}, method="any")
    recipe = Recipe.of([VectorUse(vector=vector, scope=Scope())], name="any")
    return [pair.plain for pair in answer_with(recipe, model, problems, SAMPLING).pairs]


@pytest.mark.parametrize("ask", [arm_of_hooks, plain_answers])
@pytest.mark.parametrize("how", [{"think": False}, {"open_tag": True}, {}])
def test_a_run_is_asked_again_as_it_was(forgetful, problems, tmp_path, how, ask):
    run = record(forgetful, problems, tmp_path / "run", sampling=SAMPLING, **how)
    asked = replace(forgetful, prompt=as_recorded(run.meta, {})["prompt"])
    for trace in ask(asked, problems):
        recorded = run.trace(trace.id)
        assert trace.token_ids.tolist() == recorded.token_ids.tolist()
        assert (trace.n_prompt_tokens, trace.state) == (recorded.n_prompt_tokens, recorded.state)
    for problem, sample, prompt in _asking(asked, problems, 1, ""):  # of an arm that vLLM writes
        trace = run.trace(f"{problem.id}/{sample}")
        assert prompt == trace.token_ids[: trace.n_prompt_tokens].tolist()


@pytest.mark.parametrize("how", [{"think": False}, {"open_tag": True}])
def test_what_counts_the_written_thinking_does_not_depend_on_how_prompts_are_begun(forgetful, how):
    begun = replace(forgetful, prompt=PromptOptions(**how))
    assert WrittenThinking.of(begun) == WrittenThinking.of(forgetful)
