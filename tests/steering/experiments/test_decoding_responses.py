"""The random control of a decoding method follows from its seed, is as large as the method, and differs from it."""

import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.probes.models.model import load_model
from reasonscope.steering.decoding.budget import LengthPredictor
from reasonscope.steering.experiments.decoding_responses import DECODING_METHODS, other_tokens
from reasonscope.steering.methods.registry import ExtractionData
from reasonscope.steering.vectors.thinking import WrittenThinking


@pytest.fixture(scope="module")
def source():
    """No control but budget guidance reads the traces of a run."""
    return ExtractionData(model=load_model("organism"), store=TraceStore.__new__(TraceStore), ids=())


@pytest.mark.parametrize("name", [name for name, one in DECODING_METHODS.items() if name != "budget-guidance"])
def test_chance_is_drawn_by_its_seed_and_is_not_the_control(source, name):
    control = DECODING_METHODS[name]
    treat = control.prepare(source)
    real, again, chance, same, other = (treat(control.values[0], seed) for seed in (None, None, 1, 1, 2))
    assert (real.processors or real.prefill) and repr(real) == repr(again)
    if control.chance:
        assert len({repr(one) for one in (real, chance, other)}) == 3 and repr(chance) == repr(same)


def test_begun_thinking_keeps_what_follows_its_words(source):
    treat, tags = DECODING_METHODS["nothinking"].prepare(source), source.model.tags
    real, chance = treat(1.0, None).prefill, treat(1.0, 0).prefill
    assert real.startswith("Okay") and not chance.startswith("Okay")
    assert chance.endswith(real[real.index("\n") :]) and tags.close in chance


def test_other_tokens_are_as_many_and_never_those_that_open_close_or_stop(source):
    model, thinking = source.model, WrittenThinking.of(source.model)
    kept = {thinking.opens, thinking.closes, *model.stop_ids}
    given = tuple(token for token in range(model.vocabulary) if token not in kept)[: model.vocabulary // 2]
    drawn = [other_tokens(model, given[:40], seed) for seed in range(20)]
    assert all(len(set(one)) == 40 and not {*one} & {*given[:40], *kept} for one in drawn)
    assert len(set(drawn)) == 20
    for n in (1, 2):  # as few as often repeat, if each is drawn on its own
        few = [other_tokens(model, given[:n], seed) for seed in range(60)]
        assert len({token for one in few for token in one}) == 60 * n
    free = [token for token in range(model.vocabulary) if token not in kept]
    assert other_tokens(model, free[:-1][:1], len(free) - 2) and other_tokens(model, (), 3) == ()
    with pytest.raises(InputError, match="1 other tokens make 0 random controls"):
        other_tokens(model, free[:-1], 0)
    with pytest.raises(InputError, match=r"make \d+ random controls"):
        other_tokens(model, free[:1], len(free) - 1)


def test_exchanging_the_tokens_of_a_predictor_deals_out_the_same_predictions():
    torch.manual_seed(0)
    predictor, states = LengthPredictor(8, 50, width=16, depth=1), torch.randn(3, 4, 8)
    other = predictor.with_tokens_exchanged(0)
    for real, dealt in zip(predictor(states), other(states), strict=True):
        assert not torch.allclose(real, dealt)
        torch.testing.assert_close(real.sort(dim=-1).values, dealt.sort(dim=-1).values)
