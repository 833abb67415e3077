"""Every field of a scope names the tokens that its words say; wrong ones are refused."""

from dataclasses import replace

import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.probes.models.model import load_model
from reasonscope.steering import Scope
from reasonscope.steering.vectors.token_regions import ThinkTokenIds

# two rows, prompts of 3 and 2 tokens: padding is -1
IDS = torch.tensor([[10, 11, 12, 13, 14, 15], [-1, 20, 21, 13, 14, 15]])
GIVEN = torch.tensor([3, 2])


def named(**fields):
    return Scope(**fields).mask(IDS, n_prompt=GIVEN).int().tolist()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [[1] * 6, [0, 1, 1, 1, 1, 1]]),
        ({"prompt_positions": (0, -1)}, [[1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]]),
        ({"prompt_positions": (2,)}, [[0, 0, 1, 0, 0, 0], [0] * 6]),
        ({"prompt_window": (-2, None)}, [[0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]]),
        ({"prompt_window": (0, -1)}, [[1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]),
        ({"prompt_tokens": frozenset({11, 13})}, [[0, 1, 0, 0, 0, 0], [0] * 6]),
        ({"generation_positions": (1,)}, [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0]]),
        ({"generation_window": (1, None)}, [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]),
        ({"generation_tokens": frozenset({13, 11})}, [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]),
        (
            {"prompt_positions": (-1,), "generation_window": (0, 1), "exclude_generation_tokens": frozenset({13})},
            [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]],
        ),
        ({"exclude_prompt_window": (0, None), "tokens": frozenset({12, 15})}, [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]]),
    ],
)
def test_positions_windows_and_tokens(fields, expected):
    assert named(**fields) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"generation_window": (0, None)},
        {"generation_window": (1, 3)},
        {"generation_positions": (0, 4)},
        {"generation_positions": (0,), "generation_window": (3, None)},
        {"prompt_positions": (-1,)},
        {"prompt_tokens": frozenset({7})},
        {"exclude_generation_positions": (2,)},
        {"generation_window": (1, None), "exclude_generation_window": (2, 4)},
        {"exclude_prompt_window": (0, None)},
    ],
)
def test_what_a_place_alone_decides_is_what_the_mask_says(fields):
    scope, n = Scope(**fields), torch.tensor([3])
    ids = torch.tensor([[7, 7, 7, 7, 8, 9, 7, 8]])
    assert [scope.of_generated(i) for i in range(5)] == scope.mask(ids, n_prompt=n)[0, 3:].tolist()


@pytest.mark.parametrize(
    "fields",
    [{"tokens": frozenset({7})}, {"generation_tokens": frozenset({7})}, {"exclude_generation_tokens": frozenset({7})}],
)
def test_what_depends_on_words_is_not_decided_by_position(fields):
    assert Scope(**fields).of_generated(0) is None


def test_the_last_columns_alone_are_those_of_the_whole():
    scope = Scope(prompt_positions=(-1,), generation_positions=(0, 2))
    whole = scope.mask(IDS, n_prompt=GIVEN)
    assert torch.equal(scope.mask(IDS, n_prompt=GIVEN, last=2), whole[:, -2:])


# <think>=1, </think>=2, a blank line=3, a blank=4, words from 5
MARKS = ThinkTokenIds(opens=(1,), closes=(2,), separators=frozenset({3}), blanks=frozenset({3, 4}))


def test_the_regions_of_a_trace():
    ids = torch.tensor([[5, 1, 4, 6, 3, 7, 2, 3, 8, 4, 9]])
    regions = {on: Scope(on=on, marks=MARKS).mask(ids)[0].int().tolist() for on in ("think", "close_window", "answer")}
    assert regions == {
        "think": [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        "close_window": [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
        "answer": [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    }
    assert Scope(steps="separators", marks=MARKS).mask(ids)[0].nonzero()[:, 0].tolist() == [4]


def test_tags_of_several_tokens():
    marks = ThinkTokenIds(opens=(1, 5, 1), closes=(2, 6, 2), blanks=frozenset({4}))
    ids = torch.tensor([[2, 1, 5, 1, 7, 2, 6, 2, 4, 8]])  # the first 2 ends an earlier turn
    at = {
        on: Scope(on=on, marks=marks).mask(ids)[0].nonzero()[:, 0].tolist()
        for on in ("think", "close_window", "answer")
    }
    assert at == {"think": [4], "close_window": [5, 6, 7, 8], "answer": [9]}


def test_the_kind_of_a_step_is_known_once_its_word_is_there(tokenizer):
    text = "<think>\nOkay.\n\nLet me check that: 7.\n\nThe answer is 7.\n\nWait, no.\n</think>"
    ids = torch.tensor([tokenizer.encode(text).ids])
    marks = ThinkTokenIds(
        opens=(tokenizer.token_to_id("<think>"),),
        closes=(tokenizer.token_to_id("</think>"),),
        separators=frozenset(i for t, i in tokenizer.get_vocab().items() if "ĊĊ" in t),
        tokenizer=tokenizer,
    )

    def words(kind):
        mask = Scope(steps=kind, marks=marks).mask(ids)[0]
        return tokenizer.decode(ids[0][mask].tolist())

    assert words("reflection") == " check that: 7Wait, no.\n"
    assert words("execution") == "Let meThe answer is 7"
    assert words("transition") == ""
    whole = Scope(steps="reflection", marks=marks).mask(ids)
    assert torch.equal(Scope(steps="reflection", marks=marks).mask(ids, last=9), whole[:, -9:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on": "elsewhere"}, "choose from all, think"),
        ({"steps": "planning", "marks": MARKS}, "choose from 'separators', 'execution'"),
        ({"on": "answer"}, r"Scope\.of"),
        ({"generation_positions": (-1,)}, "negative"),
        ({"exclude_generation_window": (0, -2)}, "negative"),
    ],
)
def test_scopes_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Scope(**fields)


def test_a_kind_needs_words():
    with pytest.raises(InputError, match=r"Scope\.of"):
        Scope(steps="execution", marks=MARKS).mask(torch.tensor([[1, 3, 5]]))


def test_a_blank_line_of_two_tokens_opens_a_step():
    """Some tokenizers write each newline as a token of its own; of three in a row the second is the separator."""
    marks = replace(MARKS, newlines=frozenset({4}))
    ids = torch.tensor([[1, 6, 4, 4, 7, 4, 8, 4, 4, 4, 9, 2]])
    scope = Scope(steps="separators", marks=marks)
    assert scope.mask(ids)[0].nonzero()[:, 0].tolist() == [3, 8]
    assert torch.equal(scope.mask(ids, last=1), scope.mask(ids)[:, -1:])
    assert not Scope(steps="separators", marks=marks, variant="published").mask(ids).any()


def test_the_thinking_may_be_edited_everywhere_or_at_its_separators():
    model = load_model("organism")
    assert (Scope.thinking(model).on, Scope.thinking(model).steps) == ("think", None)
    assert (Scope.thinking(model, at_separators=True).on, Scope.thinking(model, at_separators=True).steps) == (
        "think",
        "separators",
    )
