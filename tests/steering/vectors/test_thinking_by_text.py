"""Scopes and counters of thinking that no single token marks: tags that are ordinary text, and reasoning in the open."""

from dataclasses import replace

import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.text.think_tags import ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model
from reasonscope.steering.decoding.processors import ForcedClose
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.thinking import WrittenThinking
from reasonscope.steering.vectors.token_regions import ThinkTokenIds

OPEN = Thinking(mode="completion")
TAGS = Thinking(tags=ThinkTags(open="[[", close="]]"))


def marks_of(tokenizer, thinking):
    separators = frozenset(i for t, i in tokenizer.get_vocab().items() if "ĊĊ" in t)
    return ThinkTokenIds(opens=(), closes=(), separators=separators, tokenizer=tokenizer, by_text=thinking)


def regions(tokenizer, prompt, completion, thinking, **scope):
    """The text of the tokens in each region; the mask of one pass has to be that of token after token."""
    given = tokenizer.encode(prompt).ids
    ids = torch.tensor([[*given, *tokenizer.encode(completion).ids]])
    n_prompt, found = torch.tensor([len(given)]), {}
    for on in ("think", "close_window", "answer"):
        one = Scope(on=on, marks=marks_of(tokenizer, thinking), **scope)
        mask = one.mask(ids, n_prompt=n_prompt)
        stepwise = [one.mask(ids[:, : i + 1], n_prompt=n_prompt, last=1)[0, 0] for i in range(len(given), ids.shape[1])]
        assert torch.equal(mask[0, len(given) :], torch.stack(stepwise))
        found[on] = tokenizer.decode(ids[0][mask[0]].tolist())
    return found


def test_reasoning_in_the_open_is_edited_until_an_answer_is_stated(tokenizer):
    found = regions(tokenizer, "The answer is? ", "So 3 + 4 = 7.\n\nThe answer is 7. Done.", OPEN)
    assert found["think"].startswith("So 3 + 4") and "7. Done" not in found["think"]
    assert found["answer"].endswith("Done.") and found["close_window"]
    assert found["think"] + found["close_window"] + found["answer"] == "So 3 + 4 = 7.\n\nThe answer is 7. Done."


def test_tags_that_are_ordinary_text(tokenizer):
    found = regions(tokenizer, "Think between [[ and ]].\nA: ", "[[So 7.]]\n\nIt is 7.", TAGS)
    assert "So 7" in found["think"] and "It" not in found["think"] and "It is 7." in found["answer"]
    begun = regions(tokenizer, "Q\n[[\n", "So 7.]]\nIt is 7.", TAGS)
    assert "So 7" in begun["think"]


def test_padding_and_steps(tokenizer):
    marks = marks_of(tokenizer, OPEN)
    text = tokenizer.encode("Okay.\n\nWait, no: 7.\n\nThe answer is 7.").ids
    ids = torch.tensor([text, [-1, -1, *text[:-2]]])
    scope = Scope(on="think", steps="separators", marks=marks)
    mask = scope.mask(ids, n_prompt=torch.tensor([0, 0]))
    assert torch.equal(mask[1, 2:], mask[0, :-2]) and mask[0].sum() == 2
    reflects = Scope(on="think", steps="reflection", marks=marks).mask(ids[:1], n_prompt=torch.tensor([0]))
    assert "no" in tokenizer.decode(ids[0][reflects[0]].tolist())


def test_written_thinking_is_counted_from_the_turn_of_the_model(tokenizer):
    header = tuple(tokenizer.encode("assistant\n").ids)
    written = WrittenThinking(opens=None, closes=None, closing=(5,), header=header, marks=marks_of(tokenizer, OPEN))

    def count(text):
        return int(
            written.written(
                torch.tensor([tokenizer.encode("The answer is it?\nassistant\n").ids + tokenizer.encode(text).ids])
            )
        )

    assert count("") == 0 and count("So it is 7.") == len(tokenizer.encode("So it is 7.").ids)
    assert count("So. The answer is 7") == -1
    with pytest.raises(InputError, match="closing tag"):
        written.closing_token("CloseTag")


@pytest.mark.parametrize("thinking", [OPEN, TAGS])
def test_a_forced_close_writes_what_ends_the_thinking(thinking):
    """The tags [[ and ]] are ordinary text for the organism."""
    model = replace(load_model("organism"), thinking=thinking)
    model.__dict__["stop_ids"] = frozenset()
    problem = Problem(id="p", messages=(Message(role="user", content="3 + 4?"),))
    forced = ForcedClose(thinking=WrittenThinking.of(model), budget=5)
    (trace,) = rollouts(model, [problem], Sampling(max_new_tokens=40), processors=[forced], open_tag=thinking is TAGS)
    written = trace.token_ids[trace.n_prompt_tokens :].tolist()
    closing = list(forced.thinking.closing)
    at = next(i for i in range(len(written)) if written[i : i + len(closing)] == closing)
    assert at <= 5 and trace.state == "closed"
