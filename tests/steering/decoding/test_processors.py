"""Decoding controls: golden numbers, and what each does to the tokens of a model, here and in Hugging Face's own generate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model
from reasonscope.steering.decoding.prefills import PREFILLS, prefill
from reasonscope.steering.decoding.processors import (
    BudgetForcing,
    CloseTag,
    CyclicReflex,
    ForcedClose,
    SuppressTokens,
    ThoughtSwitchPenalty,
    TokenBias,
)
from reasonscope.steering.vectors.intervention import Steering
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.thinking import WrittenThinking, single_tokens
from reasonscope.steering.vectors.vector import SteeringVector

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "cyclic_reflex.json").read_text(encoding="utf-8"))
OPEN, CLOSE, OTHER, SWITCH = 0, 1, 2, 3
TAGS = WrittenThinking(opens=OPEN, closes=CLOSE)
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
PROBLEM = Problem(
    id="p",
    messages=(
        Message(
            role="user",
            content="The ledger starts at 14. Ann adds 8. The ledger closes here. What is the final balance?",
        ),
    ),
    answer="22",
)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["inputs"]["kind"])
def test_golden_schedules(case):
    given = case["inputs"]
    windows = tuple(tuple(window) for window in given["windows"] or ())
    if given["kind"] == "cyclic":
        shape = {name: given[name] for name in ("amplitude", "period", "shift")}
        control = CyclicReflex(thinking=TAGS, tokens=(SWITCH,), windows=windows, **shape)
    else:
        control = TokenBias(thinking=TAGS, tokens=(SWITCH,), bias=given["delta"], windows=windows)
    for t, expected in zip(given["t"], case["expected"], strict=True):
        ids = torch.full((1, 1 + t), OTHER)
        ids[0, 0] = OPEN
        if given["end_think_index"] is not None and given["end_think_index"] < t:
            ids[0, 1 + given["end_think_index"]] = CLOSE
        after = control(ids, torch.zeros(1, 4, dtype=torch.float64))
        assert after[0, SWITCH].item() == pytest.approx(expected, rel=case["tolerance"], abs=case["tolerance"])
        assert after[0, :SWITCH].abs().max() == 0


def test_thinking_is_counted_from_the_opening_tag_until_it_closes(model):
    ids = torch.tensor([[9, OPEN, 9, 9], [OPEN, 9, CLOSE, 9], [9, 9, 9, OPEN], [9, 9, 9, 9]])
    assert TAGS.written(ids).tolist() == [2, -1, 0, -1]
    assert WrittenThinking.of(model).given == 1  # the template puts a newline behind the tag


def test_a_switch_is_penalised_early_in_a_thought():
    control = ThoughtSwitchPenalty(thinking=TAGS, tokens=(SWITCH,), penalty=3.0, window=3)
    rows = [[9, 9, 9, OPEN, 2, 2], [OPEN, 2, 2, 2, 2, 2], [OPEN, 2, 2, 2, 2, SWITCH], [OPEN, 2, 2, CLOSE, 2, 2]]
    after = control(torch.tensor(rows), torch.zeros(4, 4))
    assert after[:, SWITCH].tolist() == [-3, 0, -3, 0]


@pytest.mark.parametrize("level", [5.0, -5.0])
def test_a_lower_temperature_of_the_closing_tag_always_makes_it_likelier(level):
    logits = torch.tensor([[0.0, level, level + 1, 0.0]])
    ids = torch.tensor([[OPEN, 2]])
    before = logits.log_softmax(-1)[0, CLOSE]
    assert CloseTag(thinking=TAGS, temperature=0.5)(ids, logits).log_softmax(-1)[0, CLOSE] > before
    assert CloseTag(thinking=TAGS, temperature=2.0)(ids, logits).log_softmax(-1)[0, CLOSE] < before
    assert torch.equal(CloseTag(thinking=TAGS)(ids, logits), logits)


def test_the_thinking_closes_at_the_budget_here_and_in_hugging_face(model):
    tags = WrittenThinking.of(model)
    newline = model.tokenizer.encode("\n", add_special_tokens=False)[0]
    control = ForcedClose(thinking=tags, budget=6, closing=(newline, tags.closes))
    prompt = model.encode_prompt(PROBLEM)
    ours = generate(model, [prompt, prompt[3:]], GREEDY, seeds=[0, 1], processors=[control])
    for completion in ours:
        written = completion.token_ids[completion.n_prompt_tokens :].tolist()
        assert written.index(tags.closes) == 7 and written[6] == newline
    ids = torch.tensor([prompt])
    theirs = model.hf.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=24,
        do_sample=False,
        logits_processor=LogitsProcessorList([control]),
    )
    assert theirs[0].tolist() == ours[0].token_ids.tolist()


def test_waiting_instead_of_closing_goes_on_for_as_many_rounds(model):
    tags = WrittenThinking.of(model)
    early = CloseTag(thinking=tags, bias=1000.0)  # a model that would always close at once
    forcing = BudgetForcing.of(model, rounds=2, wait="Wait")
    (completion,) = generate(model, [model.encode_prompt(PROBLEM)], GREEDY, seeds=[0], processors=[early, forcing])
    written = completion.token_ids[completion.n_prompt_tokens :].tolist()
    assert written[:3] == [*forcing.wait * 2, tags.closes]


def test_a_control_and_a_vector_work_together(model):
    tags = WrittenThinking.of(model)
    direction = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    vector = SteeringVector(directions={Site("resid_post", 2): direction}, method="test")
    steering = Steering(vector, 0.5, Scope.thinking(model))
    (trace,) = rollouts(
        model,
        [PROBLEM],
        GREEDY,
        write=steering.edits,
        on_step=steering.on_step,
        processors=[ForcedClose(thinking=tags, budget=6)],
    )
    assert steering.n_edited == 7  # the newline that the template gives, and six tokens
    assert trace.token_ids.tolist().index(tags.closes) == trace.n_prompt_tokens + 6


def test_suppressed_tokens_do_not_come_and_what_is_not_controlled_stays(model):
    prompt, tags = model.encode_prompt(PROBLEM), WrittenThinking.of(model)
    (plain,) = generate(model, [prompt], GREEDY, seeds=[0])
    first = int(plain.token_ids[len(prompt)])
    control = SuppressTokens(thinking=tags, tokens=(first,))
    (other,) = generate(model, [prompt], GREEDY, seeds=[0], processors=[control])
    assert first not in other.token_ids[len(prompt) :]
    idle = CyclicReflex.of(model, amplitude=0.0, period=10, words=("Wait",))
    (same,) = generate(model, [prompt], GREEDY, seeds=[0], processors=[idle])
    assert same.token_ids.tolist() == plain.token_ids.tolist() and same.logprobs.tolist() == plain.logprobs.tolist()


@pytest.mark.parametrize("name", PREFILLS)
def test_prefills_follow_the_opened_tag(model, name):
    (trace,) = rollouts(model, [PROBLEM], Sampling(max_new_tokens=4), prefill=prefill(name, model))
    assert f"<think>\n{prefill(name, model)}" in trace.text
    closes = "</think>" in prefill(name, model)
    if closes:
        assert trace.state == ("empty" if name == "zerothink" else "closed")


def test_invalid_decoding_methods_are_refused(model):
    with pytest.raises(InputError, match="more than one token"):
        single_tokens(model, ("antidisestablishmentarianism",))
    with pytest.raises(InputError, match="each is more than one token"):
        single_tokens(model, ("antidisestablishmentarianism",), skip_longer=True)
    with pytest.raises(InputError, match="end with the closing tag"):
        ForcedClose(thinking=TAGS, budget=3, closing=(CLOSE, OTHER))
    with pytest.raises(InputError, match="no token"):
        SuppressTokens(thinking=TAGS, tokens=())
    with pytest.raises(InputError, match="period of 0"):
        CyclicReflex(thinking=TAGS, tokens=(1,), amplitude=1, period=0)
    with pytest.raises(InputError, match="no prefill is called 'x'"):
        prefill("x", model)
