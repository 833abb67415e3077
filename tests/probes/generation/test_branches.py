"""Branches off one prefix equal whole generations, for every family."""

import numpy as np
import pytest

from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.families import tiny_of
from reasonscope.probes.generation.branches import Branch, PrefixWriter
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import load_model

SEQUENCE = [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45]


def test_branches_equal_generating_from_each_prefix(family, model_of):
    check_branches(model_of(family))


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "mamba"])
def test_branches_of_a_model_with_recurrent_states(family, tokenizer):
    """Its cache at the last cut tells nothing of an earlier one."""
    check_branches(load_model(tiny_of(family), tokenizer=tokenizer))


def check_branches(model):
    sampling = Sampling(temperature=0.8, max_new_tokens=5)
    branches = [
        Branch(cut=cut, stub=stub, seed=10 * cut + sample)
        for cut in (1, 4, 12)
        for stub in ((), (7, 8))
        for sample in range(2)
    ]
    done = PrefixWriter(model, batch_size=5)(SEQUENCE, branches, sampling)
    prompts = [[*SEQUENCE[: b.cut], *b.stub] for b in branches]
    whole = generate(model, prompts, sampling, seeds=[b.seed for b in branches])
    for one, other in zip(done, whole, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-4)
        assert one.n_prompt_tokens == other.n_prompt_tokens and one.finish_reason == other.finish_reason


def test_a_cut_or_a_branch_that_cannot_be_is_refused(model_of):
    write = PrefixWriter(model_of("qwen3"))
    assert write(SEQUENCE, [], Sampling()) == []
    with pytest.raises(InputError, match="cut 13"):
        write(SEQUENCE, [Branch(cut=13, seed=0)], Sampling())
    with pytest.raises(ContextError, match="no room"):
        write(SEQUENCE, [Branch(cut=12, seed=0, stub=(5,) * 120)], Sampling())
