"""The report of a sweep: strength 0 is the unsteered run; each strength is compared with the reverse and random vectors."""

import math

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import load_model
from reasonscope.steering import (
    CloseTag,
    Condition,
    Scope,
    Steering,
    SteeringExperiment,
    SteeringVector,
    VectorUse,
    as_intervention,
    clamped,
    dose_response,
)
from reasonscope.steering.decoding.prefills import prefill
from reasonscope.steering.experiments.experiment import MEASURES, ArmMeasurements
from reasonscope.steering.experiments.side_effects import (
    compression_ratio,
    divergences,
    generated,
    logits_function,
    repeated_ngrams,
)
from reasonscope.steering.experiments.summaries import ArmRow, response_summary
from reasonscope.steering.vectors.matched_controls import random_uses
from reasonscope.steering.vectors.operators import scaled_add
from reasonscope.steering.vectors.thinking import WrittenThinking

SITE = Site("resid_post", 2)
SAMPLING = Sampling(temperature=0.7, max_new_tokens=12)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def problems():
    return load_problems("ledger", n=2) + load_problems("requests", n=2)


@pytest.fixture(scope="module")
def vector(model):
    direction = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    return SteeringVector(directions={SITE: direction}, method="test", provenance={"groups": ["elsewhere"]})


@pytest.fixture(scope="module")
def experiment(model, problems):
    return SteeringExperiment(model, problems, SAMPLING)


def test_repetition_by_hand():
    assert repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_ngrams([1, 2, 3]) == 0
    assert compression_ratio("Wait, " * 200) > 20 > compression_ratio("The balance is 14.") > 0
    assert compression_ratio("") == 1


def test_a_multiplier_of_zero_is_the_unsteered_run(experiment, vector):
    run = experiment.run("none", Steering(vector, 0.0, Scope()))
    for name in MEASURES:
        np.testing.assert_array_equal(run.values[name], experiment.base.values[name])
    assert (run.values["kl"] == 0).all() and run.n_edited > 0
    arm = experiment.arm("none", 0.0, run)
    assert all(estimate.value == 0 for estimate in arm.differences.values()) and arm.change.value == 0


def test_a_model_that_never_thinks_has_no_length_to_compare(model, problems):
    unsteered = SteeringExperiment(model, problems, SAMPLING)
    never, thinks = (ArmMeasurements(traces=(), values={"tokens": np.full(4, n)}, n_edited=0) for n in (0.0, 9.0))
    unsteered._base = never
    for run in (never, thinks):
        arm = unsteered.arm("steered", 1.0, run)
        assert math.isnan(arm.change.value) and math.isnan(arm.change.high)
        assert arm.differences["tokens"].value == run.values["tokens"][0]
        row = ArmRow(arm=arm, controls=[arm])
        summary = response_summary("seal", unsteered.base_arm, [row], control="random vectors")
        assert "has no length to compare (the unsteered model did not think)" in summary.finding
        assert "inf" not in str(summary)
    unsteered._base = ArmMeasurements(traces=(), values={"tokens": np.array([0.0, 0.0, 0.0, 8.0])}, n_edited=0)
    some = unsteered.arm("steered", 1.0, thinks).change  # resamples in which nothing is thought say nothing
    assert some.value == pytest.approx(3.5) and math.isfinite(some.high)


def test_perplexity_and_kl_are_those_of_the_definition(experiment, model, vector):
    steering = Steering(vector, 20.0, Scope())
    (of_steered,) = divergences(model, experiment.traces, [logits_function(model, steering)], {"written": generated})
    found = of_steered["written"]
    trace = experiment.traces[1]
    ids = trace.token_ids
    with vector.apply(model, multiplier=20.0):
        changed = _logprobs(model, ids)
    plain, n = _logprobs(model, ids), trace.n_prompt_tokens
    kl = (np.exp(plain) * (plain - changed)).sum(axis=-1)[n - 1 : -1].sum()
    nll = -changed[np.arange(n - 1, len(ids) - 1), ids[n:]].sum()
    assert (found.kl[1], found.nll[1]) == pytest.approx((kl, nll), rel=1e-3)
    assert found.n_tokens[1] == len(ids) - n
    assert found.nll_unchanged[1] == pytest.approx(
        -trace.logprobs.sum() if SAMPLING.temperature == 1 else found.nll_unchanged[1]
    )


def _logprobs(model, ids):
    with torch.no_grad():
        return model.hf(torch.from_numpy(ids[None])).logits[0].double().log_softmax(dim=-1).numpy()


def test_a_dose_response_has_its_controls(experiment, vector, heard):
    base = experiment.base_arm  # run once for a bench: the sweep runs the others, whichever test came before
    found = dose_response(experiment, [VectorUse(vector=vector, scope=Scope())], [2.0, 1.0])
    written = [work for work in heard if work.what == "writing"][-1]
    assert found.base.measures["tokens"] == base.measures["tokens"]
    assert [dose.strength for dose in found.doses] == [1.0, 2.0] and found.held_out
    assert written.total == written.done == 2 * (1 + 1 + 5) * len(experiment.problems)
    assert len(found.arms) == 2 * (1 + 1 + 5) + 1
    for dose in found.doses:
        assert dose.reversed.multiplier == -dose.strength
        against = Condition(name="", intervention=Steering(vector, -dose.strength, Scope()))
        (run,) = experiment.run_all([against])
        assert experiment.arm(dose.reversed.name, -dose.strength, run).measures == dose.reversed.measures
        changes = [arm.differences["tokens"].value for arm in dose.random]
        assert dose.excess["tokens"].value == pytest.approx(dose.steered.differences["tokens"].value - np.mean(changes))
        assert len({arm.measures["kl"].value for arm in dose.random}) == 5
    assert found.base.measures["kl"].value == 0 and found.doses[1].steered.measures["kl"].value > 0
    assert found.base.measures.keys() >= {"tokens", "refused", "refused_harmful", "well_formed", "perplexity"}
    assert found.doses[1].steered.measures["kl"].value > found.doses[0].steered.measures["kl"].value


@pytest.mark.parametrize(
    ("provenance", "held_out"),
    [({}, False), ({"groups": ["elsewhere"]}, True), ({"groups": ["elsewhere"], "groups_incomplete": True}, False)],
)
def test_only_a_vector_that_names_all_its_problems_is_held_out(experiment, vector, provenance, held_out):
    use = VectorUse(
        vector=SteeringVector(directions=vector.directions, method="x", provenance=provenance), scope=Scope()
    )
    assert dose_response(experiment, [use], [1.0]).held_out is held_out


def test_random_clamps_move_states_as_far_as_the_clamp_in_its_run(experiment, model):
    """The blocks of a real model answer to an edit, so that a clamp needs less at later blocks; its controls move no farther."""
    shared, rng = 20 * np.random.default_rng(1).standard_normal(model.d_model), np.random.default_rng(2)
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    directions = {site: (shared + rng.standard_normal(model.d_model)).astype(np.float32) for site in sites}
    towards = {"towards": {str(site): 150.0 for site in sites}, "groups": ["elsewhere"]}
    vector = SteeringVector(directions=directions, method="test", provenance=towards)
    uses = [*clamped(vector, Scope(prompt_positions=(-1,))), *clamped(vector, Scope(generation_window=(0, None)))]
    found = dose_response(experiment, uses, [0.5, 1.0])
    for dose in found.doses:
        for arm in dose.random:
            assert arm.distances == pytest.approx(dose.steered.distances, rel=1e-3)
            assert arm.distance == pytest.approx(dose.steered.distance, rel=1e-3)
    unmeasured = as_intervention(random_uses(uses, 0), 1.0)
    (run,) = experiment.run_all([Condition(name="unmeasured", intervention=unmeasured)])
    assert run.distances != pytest.approx(found.doses[1].steered.distances, rel=0.02)


def test_random_shares_of_the_norm_move_states_as_far(experiment, model):
    """Norms differ after what was edited before, so the share is scaled by what one control moved; large states still move farther."""
    rng = np.random.default_rng(2)
    sites = [Site("resid_post", layer) for layer in (2, 3, 4, 5)]
    directions = {site: rng.standard_normal(model.d_model).astype(np.float32) for site in sites}
    vector = SteeringVector(directions=directions, method="test", provenance={"groups": ["elsewhere"]})
    uses = [VectorUse(vector=vector, scope=Scope(generation_window=(0, None)), operator=scaled_add)]
    (dose,) = dose_response(experiment, uses, [0.2]).doses
    for arm in dose.random:
        assert arm.distances == pytest.approx(dose.steered.distances, rel=0.01)
    (run,) = experiment.run_all([Condition(name="unscaled", intervention=as_intervention(random_uses(uses, 0), 0.2))])
    assert run.distances != pytest.approx(dose.steered.distances, rel=0.01)


def test_what_would_not_be_held_out_or_controlled_is_refused(experiment, model, problems, vector):
    def respond(vector=vector, strengths=(1.0,), **more):
        return dose_response(experiment, [VectorUse(vector=vector, scope=Scope())], strengths, **more)

    seen = SteeringVector(directions=vector.directions, method="x", provenance={"groups": [problems[0].group]})
    with pytest.raises(InputError, match="made from 1 of these problems"):
        respond(seen)
    for strengths in ((), (0.0, 1.0), (math.inf,)):
        with pytest.raises(InputError, match="strengths"):
            respond(strengths=strengths)
    with pytest.raises(InputError, match="at least 5"):
        respond(n_controls=4)
    with pytest.raises(InputError, match="no problem"):
        SteeringExperiment(model, [], SAMPLING)


def test_controls_of_the_decoding_are_arms_of_the_same_bench(experiment, model):
    run = experiment.run("close at once", processors=[CloseTag(thinking=WrittenThinking.of(model), bias=100.0)])
    arm = experiment.arm("close at once", 0.0, run)
    assert arm.tokens.value < experiment.arm("base", 0.0, experiment.base).tokens.value and arm.n_edited == 0
    assert "kl" not in arm.measures and "kl" not in arm.differences
    begun = experiment.run("no thinking", prefill=prefill("nothinking", model))
    assert (begun.values["tokens"] == begun.values["tokens"][0]).all()
