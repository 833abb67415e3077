"""Where a trace thinks: tags and what looks like them, channels, reasoning in the open."""

import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import build_trace, trace_from_text
from reasonscope.data.text.steps_and_sentences import sentences, steps
from reasonscope.data.text.think_tags import GPT_OSS, ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Message, Problem

IN_THE_OPEN = Thinking(mode="completion")
CHANNELS = Thinking(tags=GPT_OSS)


def read(completion, prompt="", *, thinking=None, message="", finish="stop", tokenizer=None):
    asked = {"messages": (Message(role="user", content=message),)} if message else {"prompt": prompt or "q"}
    return trace_from_text(
        id="p/0",
        problem=Problem(id="p", **asked),
        prompt=prompt,
        completion=completion,
        thinking=thinking,
        finish_reason=finish,
        tokenizer=tokenizer,
    )


def of_run(tokenizer, pieces, n_prompt=0, **how):
    """A trace of token ids, each piece encoded by itself; a piece in a tuple is spelt letter by letter, so never as one token."""
    ids = []
    for piece in pieces:
        for part in list(piece[0]) if isinstance(piece, tuple) else [piece]:
            ids += tokenizer.encode(part, add_special_tokens=False).ids
    return build_trace(
        id="p/0",
        problem=Problem(id="p", prompt="q"),
        token_ids=ids,
        n_prompt_tokens=n_prompt,
        tokenizer=tokenizer,
        **how,
    )


@pytest.mark.parametrize(
    ("completion", "thinking", "answer"),
    [
        ("<think>outer <think>inner</think> more</think>\n5", "outer <think>inner</think> more", "5"),
        ("<think>End with `</think>`.\n</think>\n4", "End with `</think>`.", "4"),
        ('<think>The tag "</think>" ends it.</think>4', 'The tag "</think>" ends it.', "4"),
        ("<think>I write </think> at the end.\n</think>\n4", "I write </think> at the end.", "4"),
        ("<think>Between <think> and </think>, then.\n</think>\n4", "Between <think> and </think>, then.", "4"),
        ("<think>a</think>Use <think> and </think> tags.", "a", "Use <think> and </think> tags."),
        ("<think>x\n</think>\n```\n<think>\nfoo\n</think>\n```\n5", "x", "```\n<think>\nfoo\n</think>\n```\n5"),
        ("<think>\n<think>\nA</think>\nB", "<think>\nA", "B"),
    ],
)
def test_nested_quoted_and_mentioned_tags_cut_nothing_and_are_told(completion, thinking, answer):
    trace = read(completion)
    assert (trace.state, trace.thinking, trace.answer_text) == ("closed", thinking, answer)
    assert trace.meta["thinking"]["doubts"]


@pytest.mark.parametrize(
    "completion", ["It is 7. You can use <think> tags.", "The tag </think> closes it.", "Use `<think>`."]
)
def test_an_answer_that_mentions_a_tag_has_no_thinking(completion):
    trace = read(completion)
    assert (trace.state, trace.answer_text) == ("absent", completion)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("USER>>What does <think> mean?\nUSER-END\nBOT: ", "What does <think> mean?"),
        ("### Question\nExplain the <think> tag.\n### Answer\n", ""),
    ],
)
def test_a_prompt_that_quotes_the_tag_opens_nothing(prompt, message):
    assert read("7", prompt, message=message).state == "absent"
    assert read("a</think>7", prompt + "<think>\n", message=message).thinking == "a"


def test_a_template_that_switches_off_with_a_closing_tag_alone():
    trace = read("7", "<|Assistant|></think>")
    assert (trace.state, trace.answer_text) == ("empty", "7")


def test_several_blocks_are_all_kept_and_counted(tokenizer):
    trace = read(
        "<think>One.\n\nTwo.</think>\nSome text.\n\nMore.\n<think>Three.</think>\n\nFour 4", tokenizer=tokenizer
    )
    assert trace.state == "closed" and trace.answer_text == "Four 4"
    assert [trace.text[span.slice] for span in trace.thinking_spans] == ["One.\n\nTwo.", "Three."]
    assert [sentence.text for sentence in sentences(trace)] == ["One.", "Two.", "Three."]
    assert [step.text for step in steps(trace)] == ["Two."]
    inside = "".join(trace.text[a:b] for a, b in trace.offsets[trace.thinking_positions])
    assert "Some" not in inside and "Three" in inside
    assert trace.n_thinking_tokens == len(trace.thinking_positions) < len(trace.tokens.thinking)


def test_a_second_block_that_was_cut_off(tokenizer):
    trace = read("<think>One.</think>\nText.\n<think>Two", finish="length", tokenizer=tokenizer)
    assert (trace.state, trace.final_answer) == ("truncated", None)
    assert [trace.text[span.slice] for span in trace.thinking_spans] == ["One.", "Two"]


def test_ids_tell_a_tag_from_the_same_text(tokenizer):
    spelt = ("</think>",)
    trace = of_run(tokenizer, ["<think>", "a ", spelt, "\nb", "</think>", "7"])
    assert trace.thinking == "a </think>\nb" and trace.answer_text == "7"
    assert of_run(tokenizer, ["It is 7.\n", ("<think>",), "\nx"]).state == "absent"
    assert (
        of_run(tokenizer, ["<think>", "a `", "</think>", "` 7"]).thinking == "a `"
    )  # the model closed, whatever stands around it


@pytest.mark.parametrize(
    ("completion", "thinking", "answer"),
    [
        (
            '<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>{"a": 7}<|return|>',
            "So.",
            '{"a": 7}<|return|>',
        ),
        (
            "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>",
            "So.",
            "{}<|call|>",
        ),
        ("analysisSo 7.assistantfinalIt is 7.", "So 7.", "It is 7."),
    ],
)
def test_channels(completion, thinking, answer):
    trace = read(completion, "<|start|>assistant", thinking=CHANNELS)
    assert (trace.state, trace.thinking, trace.answer_text) == ("closed", thinking, answer)


def test_a_second_analysis_channel_is_thinking_and_the_call_between_is_not():
    call = "<|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    result = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>8<|end|>"
    trace = read(
        "<|channel|>analysis<|message|>So 7.<|end|>"
        + call
        + result
        + "<|start|>assistant<|channel|>analysis<|message|>Ok 8.<|end|><|start|>assistant<|channel|>final<|message|>8",
        "<|start|>assistant",
        thinking=CHANNELS,
    )
    assert [trace.text[span.slice] for span in trace.thinking_spans] == ["So 7.", "Ok 8."]
    assert trace.final_answer == "8" and trace.state == "closed"
    assert read("hi", "<|start|>assistant" + GPT_OSS.open + GPT_OSS.close, thinking=CHANNELS).state == "empty"


def test_a_tool_that_is_called_in_the_analysis_is_no_thought():
    call = " to=python<|channel|>analysis code<|message|>print(3 + 4)<|call|>"
    for before, thinking in (
        ("<|channel|>analysis<|message|>I run it.<|end|><|start|>assistant", "I run it."),
        ("", ""),
    ):
        trace = read(before + call, "<|start|>assistant", thinking=CHANNELS)
        assert "".join(trace.text[span.slice] for span in trace.thinking_spans) == thinking


def test_analysis_that_ends_and_is_all_there_is_has_no_marker_in_it():
    trace = read("<|channel|>analysis<|message|>So 7.<|end|>", "<|start|>assistant", thinking=CHANNELS)
    assert (trace.state, trace.thinking, trace.answer_text) == ("truncated", "So 7.", "")


@pytest.mark.parametrize(
    ("completion", "thinking", "answer", "final", "rule"),
    [
        ("She has 2 + 2 = 4. So 4.\n#### 4", "She has 2 + 2 = 4. So 4.", "#### 4", "4", "statement"),
        (
            "2 + 2 = 4. The answer is 5. Wait, no. The answer is 4.",
            "2 + 2 = 4. The answer is 5. Wait, no.",
            None,
            "4",
            "statement",
        ),
        ("First.\n\nSo the answer is:\n\n\\[\n\\boxed{4}\n\\]<|im_end|>", "First.", None, "4", "statement"),
        ("Think. The correct option is (B).", "Think.", "The correct option is (B).", "(B)", "statement"),
        (
            "First, 2 + 2 = 4. So she has 4 apples. Great!",
            "First, 2 + 2 = 4.",
            "So she has 4 apples. Great!",
            "4",
            "last number",
        ),
        ("I add.\n\n```python\nx = 1\n```", "I add.", None, "x = 1", "code"),
        ("It is hot. So drink water.", "It is hot.", "So drink water.", None, "last sentence"),
    ],
)
def test_reasoning_in_the_open_ends_at_the_answer(completion, thinking, answer, final, rule):
    trace = read(completion, thinking=IN_THE_OPEN)
    assert (trace.state, trace.thinking, trace.meta["thinking"]["answer_by"]) == ("closed", thinking, rule)
    assert answer is None or trace.answer_text == answer
    assert final is None or trace.final_answer == final


def test_reasoning_in_the_open_that_was_cut_off_has_no_answer():
    trace = read("2 + 2 = 4. So she", thinking=IN_THE_OPEN, finish="length")
    assert (trace.state, trace.thinking, trace.final_answer) == ("truncated", "2 + 2 = 4. So she", None)
    assert read("4", thinking=IN_THE_OPEN).state == "empty"


def test_the_answer_pattern_of_a_user():
    pattern = Thinking(mode="completion", answer_pattern=r"Result -> (\w+)")
    trace = read("We add. Result -> twelve. Done.", thinking=pattern)
    assert (trace.thinking, trace.final_answer) == ("We add.", "twelve")
    missing = read("We add. So twelve.", thinking=pattern)
    assert missing.state == "truncated" and "no sentence matches" in missing.meta["thinking"]["doubts"][0]


def test_tokens_of_the_answer_begin_where_the_sentence_does(tokenizer):
    trace = read("Two and two is 4. The answer is 4.", thinking=IN_THE_OPEN, tokenizer=tokenizer)
    first = trace.offsets[trace.tokens.answer.start]
    assert trace.text[first[0] :].lstrip().startswith("The answer")
    assert len(trace.tokens.close_window) >= 1 and trace.tokens.close_window.stop <= trace.tokens.answer.start
    assert trace.tokens.thinking.start == trace.n_prompt_tokens


def test_no_reasoning_at_all():
    trace = read("2 + 2 = 4. The answer is 4.", thinking=Thinking(mode="none"))
    assert (trace.state, trace.final_answer) == ("absent", "4")


@pytest.mark.parametrize(
    "thinking",
    [Thinking(), IN_THE_OPEN, Thinking(mode="none"), Thinking(tags=ThinkTags(open="<a>", close="</a>", answer="<b>"))],
)
def test_a_store_says_how_thinking_was_found(thinking):
    assert Thinking.of_meta({"thinking": thinking.to_dict()}) == thinking
    assert Thinking.of_meta({}) is None


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"mode": "loud"}, "choose from"),
        ({"mode": "none", "tags": ThinkTags()}, "has no tags"),
        ({"answer_pattern": "x"}, "needs thinking 'completion'"),
        ({"mode": "completion", "answer_pattern": "("}, "invalid answer pattern"),
    ],
)
def test_options_that_do_not_fit(how, said):
    with pytest.raises(InputError, match=said):
        Thinking(**how)
