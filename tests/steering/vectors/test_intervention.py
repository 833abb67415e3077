"""Steering reaches exactly the tokens of its scope, in one pass and while generating, and at strength 0 changes no bit."""

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.decoding import generate, left_padded
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Composed, Condition, Scope, Steering, SteeringExperiment, SteeringVector
from reasonscope.steering.vectors.token_regions import ThinkTokenIds

SITE = Site("resid_post", 2)
SAMPLING = Sampling(temperature=1.0, max_new_tokens=40)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def vector(model):
    direction = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    return SteeringVector(directions={SITE: direction}, method="test")


def problem(
    text="The ledger starts at 14. Ann pays in 8. The ledger closes here. What is the final balance?", answer="22"
):
    return Problem(id=text[:20], messages=(Message(role="user", content=text),), answer=answer)


TWO = [problem(), problem("Hello?", None)]


def test_the_thinking_is_what_lies_between_the_tags():
    marks = ThinkTokenIds(opens=(1,), closes=(2,))
    scope = Scope(on="think", marks=marks)
    ids = torch.tensor([[-1, 7, 1, 8, 9, 2, 9], [7, 8, 9, 2, 1, 1, 8], [8, 8, 8, 8, 8, 8, 8]])
    expected = [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1], [0] * 7]
    assert scope.mask(ids).int().tolist() == expected
    assert Scope(on="think", marks=marks, tokens=frozenset({9})).mask(ids).sum() == 1
    assert Scope().mask(ids).sum() == 20


def test_one_pass_moves_the_tokens_of_the_scope_by_the_vector(model, vector):
    prompts = [model.encode_prompt(problem()), model.encode_prompt(problem("Hello?"))]
    ids, mask = left_padded(prompts, torch.device("cpu"))
    steering = Steering(vector, 2.0, Scope.thinking(model))
    plain = model.backend.forward(ids, mask=mask, read=[SITE]).activations[SITE]
    moved = model.backend.forward(ids, mask=mask, read=[SITE], write=steering.edits).activations[SITE]
    change = moved - plain
    assert steering.n_edited == 2  # the newline behind the opening tag, in each of the two prompts
    torch.testing.assert_close(
        change[:, -1], 2 * torch.from_numpy(vector.directions[SITE]).expand(2, -1), atol=1e-4, rtol=0
    )
    assert (change[:, :-1] == 0).all()


def test_generation_touches_what_a_pass_over_the_finished_text_would(model, vector):
    prompts = [model.encode_prompt(problem()), model.encode_prompt(problem("Ann adds 3."))]
    for scope in (
        Scope(),
        Scope(generation_window=(0, 1)),
        Scope.thinking(model),
        Scope.thinking(model, at_separators=True),
    ):
        steering = Steering(vector, 0.5, scope)
        done = generate(model, prompts, SAMPLING, seeds=[1, 2], write=steering.edits, on_step=steering.on_step)
        read = [
            scope.mask(torch.from_numpy(one.token_ids[None, :-1]), n_prompt=torch.tensor([one.n_prompt_tokens]))
            for one in done
        ]
        assert steering.n_edited == sum(int(mask.sum()) for mask in read)


def test_strength_zero_changes_no_bit(model, vector):
    prompts, seeds = [model.encode_prompt(problem())] * 2, [3, 4]
    plain = generate(model, prompts, SAMPLING, seeds=seeds)
    steering = Steering(vector, 0.0, Scope())
    same = generate(model, prompts, SAMPLING, seeds=seeds, write=steering.edits, on_step=steering.on_step)
    for a, b in zip(plain, same, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)


def test_the_unsteered_arm_comes_first_and_changes_nothing(model, vector):
    experiment = SteeringExperiment(model, [problem(), problem("Hello?", None)], SAMPLING)
    (steered,) = experiment.arms([Condition(name="x", multiplier=4.0, intervention=Steering(vector, 4.0, Scope()))])
    base = experiment.base_arm
    assert [arm.name for arm in (base, steered)] == ["base", "x"]
    assert (base.change.value, base.n_edited) == (0.0, 0)
    assert steered.n_edited > 0


def test_what_cannot_be_steered_is_refused(model, vector):
    experiment = SteeringExperiment(model, TWO, SAMPLING)
    with pytest.raises(InputError, match="edited no token"):
        experiment.run("x", Steering(vector, 1.0, Scope(tokens=frozenset())))
    with pytest.raises(InputError, match="multiplier is nan"):
        Steering(vector, float("nan"), Scope())
    wide = SteeringVector(directions={SITE: np.zeros(7, dtype=np.float32)}, method="test")
    with pytest.raises(InputError, match="width 7"):
        experiment.run("x", Composed(Steering(vector, 1.0, Scope()), Steering(wide, 1.0, Scope())))
    with pytest.raises(InputError, match=r"Scope\.of"):
        Scope(on="think")
