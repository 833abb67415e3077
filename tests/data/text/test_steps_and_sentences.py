import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import build_trace, find_regions, regions_over_tokens, trace_from_text
from reasonscope.data.text.steps_and_sentences import (
    classify_step,
    seal_steps,
    sentence_of_each,
    sentences,
    separator_token_ids,
    steps,
)
from reasonscope.data.trace import Problem, Trace

CASES = json.loads((Path(__file__).parents[2] / "golden" / "seal_segmentation.json").read_text())["cases"]
VARIANTS = [("published", "reference"), ("corrected", "corrected")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize(("variant", "expected"), VARIANTS)
def test_golden_steps(case, variant, expected):
    found = seal_steps(case["inputs"]["tokens"], variant=variant, think_only=case["inputs"]["think_only"])
    assert _rows(found) == case["expected"][expected]


@pytest.mark.parametrize("case", [c for c in CASES if c["inputs"]["think_only"] and "<think>" in c["inputs"]["tokens"]])
@pytest.mark.parametrize(("variant", "expected"), VARIANTS)
def test_golden_steps_of_a_trace(case, variant, expected):
    pieces = case["inputs"]["tokens"]
    found = steps(_trace_of_pieces(pieces), variant=variant)
    assert _rows(found) == case["expected"][expected]
    assert [step.text for step in found] == ["".join(pieces[step.tokens.slice]) for step in found]


def _rows(found):
    return [
        {"paragraph": s.index, "separator_token": s.separator, "char_start": s.chars.start, "class": s.kind}
        for s in found
    ]


def _trace_of_pieces(pieces: list[str]) -> Trace:
    """The given pieces are the tokens; the prompt is what stands before the opening tag."""
    n_prompt = pieces.index("<think>")
    text, stops = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    offsets = np.stack([stops - [len(piece) for piece in pieces], stops], axis=1)
    chars, state = find_regions(text, int(offsets[n_prompt, 0]))
    return Trace(
        id="t", problem=Problem(id="p", prompt=""), text=text, token_ids=np.arange(len(pieces)), offsets=offsets,
        n_prompt_tokens=n_prompt, chars=chars, tokens=regions_over_tokens(chars, offsets), state=state,
    )  # fmt: skip


def _trace(tokenizer: Tokenizer, completion: str, prompt: str = "Q: <think>\n") -> Trace:
    ids = tokenizer.encode(prompt).ids
    return build_trace(
        id="t",
        problem=Problem(id="p", prompt=prompt),
        token_ids=ids + tokenizer.encode(completion).ids,
        n_prompt_tokens=len(ids),
        tokenizer=tokenizer,
    )


def test_steps_of_real_tokens(tokenizer):
    trace = _trace(tokenizer, "Okay.\n\nWait, is it 7?\n\nAlternatively, count.\n\n</think>\n\nIt is 7.")
    found = steps(trace)
    assert [step.kind for step in found] == ["reflection", "transition", "execution"]
    assert [trace.text[trace.offsets[s.separator, 0] : trace.offsets[s.separator, 1]] for s in found] == [
        ".\n\n",
        "?\n\n",
        ".\n\n",
    ]
    assert [step.text for step in found] == ["Wait, is it 7", "Alternatively, count", ""]
    assert all(step.text == trace.text[step.chars.slice] for step in found)


def test_a_missing_opening_tag_does_not_lose_the_steps(tokenizer):
    trace = _trace(tokenizer, "Okay.\n\nWait, is it 7?\n</think>\n\n7", prompt="Q: ")
    assert [step.text for step in steps(trace)] == ["Wait, is it 7?\n"]
    assert steps(_trace(tokenizer, "It is 7.\n\nWait.", prompt="Q: ")) == []


def test_a_step_is_known_by_its_words():
    words = {
        "reflection": [
            "Wait, no",
            "\n\nwait",
            " \nWAIT",
            "I verify it",
            "Let me make sure",
            "Hold on",
            "That's correct",
        ],
        "transition": ["Alternatively, add", "There is another way", "another technique", "I think differently"],
        "execution": ["3 + 4", "\n wait", "So I waited", "no alternatively", "XX", "I think differenly"],
    }
    for kind, texts in words.items():
        assert {classify_step(text) for text in texts} == {kind}, texts
    assert classify_step("I think differenly", variant="published") == "transition"
    assert classify_step("XXwait") == "execution"


def test_steps_need_tokens():
    trace = trace_from_text(id="t", problem=Problem(id="p", prompt="Q"), prompt="Q", completion="<think>a\n\nb")
    with pytest.raises(InputError, match="has no tokens"):
        steps(trace)
    with pytest.raises(InputError, match="'corrected' or 'published'"):
        classify_step("Wait", variant="other")


def test_separator_ids_are_the_tokens_that_hold_a_blank_line(tokenizer):
    ids = separator_token_ids(tokenizer)
    assert ids and ids == sorted(ids)
    expected = {
        i for i in range(tokenizer.get_vocab_size()) if "\n\n" in tokenizer.decode([i], skip_special_tokens=False)
    }
    assert set(ids) == expected
    added = Tokenizer.from_str(tokenizer.to_str())
    added.add_tokens(["<br>\n\n"])
    assert separator_token_ids(added) == [*ids, added.token_to_id("<br>\n\n")]


def test_sentences_have_exact_spans(tokenizer):
    trace = _trace(tokenizer, "Okay, I add. Wait, is it 7?\n\nYes é. So\n</think>\n\nIt is 7.")
    found = sentences(trace)
    assert [s.text for s in found] == ["Okay, I add.", "Wait, is it 7?", "Yes é.", "So"]
    assert all(trace.text[s.chars.slice] == s.text for s in found)
    pieces = [trace.text[trace.offsets[s.tokens.start, 0] : trace.offsets[s.tokens.stop - 1, 1]] for s in found]
    assert [piece.strip() for piece in pieces] == [s.text for s in found]
    assert pieces[1].startswith(" ") and pieces[1].endswith("?\n\n")
    assert [s.index for s in found] == [0, 1, 2, 3]


def test_sentences_without_tokens_have_empty_token_spans():
    trace = trace_from_text(id="t", problem=Problem(id="p", prompt="Q"), prompt="Q", completion="<think>It is. So")
    assert [(s.text, len(s.tokens)) for s in sentences(trace, splitter="thought_anchors")] == [("It is. So", 0)]


def test_a_blank_line_of_two_tokens_separates_steps():
    trace = _trace_of_pieces(["Q", "<think>", "a.", "\n", "\n", "Wait", ".", "\n", "b", "</think>", "c"])
    assert [(step.text, step.kind) for step in steps(trace)] == [("Wait.\nb", "reflection")]
    assert steps(trace, variant="published") == []


def test_each_token_belongs_to_the_last_sentence_that_has_begun(tokenizer):
    found = sentences(_trace(tokenizer, "Add 2 and 3. It is 5. Done.\n</think>\n\n5"))
    owners = sentence_of_each(found, found[-1].tokens.stop)
    assert len(found) == 3 and set(owners[: found[0].tokens.start]) <= {-1}
    for sentence in found:
        assert set(owners[sentence.tokens.slice]) == {sentence.index}


def test_the_published_steps_are_of_the_first_block_alone(tokenizer):
    trace = _trace(tokenizer, "One.\n\nTwo.\n</think>\n\nSo. <think>\nThree.\n\nFour.\n</think>\n\n4")
    assert len(trace.thinking_blocks) == 2
    assert len(steps(trace, variant="published")) < len(steps(trace))
