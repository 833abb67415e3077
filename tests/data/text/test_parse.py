import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import GPT_OSS, ThinkTags, build_trace, find_regions, trace_from_text
from reasonscope.data.trace import Problem

USER = "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"


def parts(prompt, completion, tags=ThinkTags()):  # noqa: B008 - frozen
    text = prompt + completion
    chars, state = find_regions(text, len(prompt), tags)
    return state, text[chars.open.slice], text[chars.thinking.slice], text[chars.close.slice], text[chars.answer.slice]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (USER, "<think>\nSo 7.\n</think>\n\nIt is 7.", ("closed", "<think>\n", "So 7.", "\n</think>\n\n", "It is 7.")),
        (
            USER + "<think>\n",
            "So 7.\n\n</think>\nIt is 7.",
            ("closed", "<think>\n", "So 7.", "\n\n</think>\n", "It is 7."),
        ),
        (USER + "<think>", "\nSo 7.</think>7", ("closed", "<think>\n", "So 7.", "</think>", "7")),
        (USER, "So 7.\n</think>\n\nIt is 7.", ("closed", "", "So 7.", "\n</think>\n\n", "It is 7.")),
        (USER, "<think>\nSo 3 + 4 is", ("truncated", "<think>\n", "So 3 + 4 is", "", "")),
        (USER + "<think>\n", "So 3 +", ("truncated", "<think>\n", "So 3 +", "", "")),
        (USER + "<think>\n", "", ("truncated", "<think>\n", "", "", "")),
        (USER, "It is 7.", ("absent", "", "", "", "It is 7.")),
        (USER + "<think>\n\n</think>\n\n", "It is 7.", ("empty", "<think>\n\n", "", "</think>\n\n", "It is 7.")),
        (USER, "<think>\n\n</think>\n\nIt is 7.", ("empty", "<think>\n\n", "", "</think>\n\n", "It is 7.")),
        # The model opens again although the template had closed an empty block.
        (
            USER + "<think>\n\n</think>\n\n",
            "<think>\nSo 7.</think>7",
            ("closed", "<think>\n", "So 7.", "</think>", "7"),
        ),
        # A given beginning of the thinking.
        (USER + "<think>\nOkay. ", "So 7.</think>7", ("closed", "<think>\n", "Okay. So 7.", "</think>", "7")),
        # Thinking given as a whole.
        (USER + "<think>\nOkay.\n</think>\n\n", "7", ("closed", "<think>\n", "Okay.", "\n</think>\n\n", "7")),
        # A second closing tag is part of the answer, as is a second block.
        (USER, "<think>a</think>b</think>c", ("closed", "<think>", "a", "</think>", "b</think>c")),
        (USER, "<think>a</think>b<think>c</think>d", ("closed", "<think>", "a", "</think>", "b<think>c</think>d")),
        # A preamble is kept with the opening tag.
        (USER, "\nSure. <think>a</think>b", ("closed", "\nSure. <think>", "a", "</think>", "b")),
    ],
)
def test_states(prompt, completion, expected):
    assert parts(prompt, completion) == expected


@pytest.mark.parametrize(
    "history",
    [
        "<|im_start|>assistant\n<think>\nOld.\n</think>\n\nOld answer.<|im_end|>\n",
        "<|im_start|>system\nThink between <think> and </think>.<|im_end|>\n",
        "<|im_start|>user\nWhat does <think> mean?<|im_end|>\n",
        "Think between <think> and </think>. ",
    ],
)
def test_tags_of_earlier_turns_do_not_misfire(history):
    assert parts(history + USER, "It is 7.")[0] == "absent"
    assert parts(history + USER + "<think>\n", "So 7.</think>7") == ("closed", "<think>\n", "So 7.", "</think>", "7")
    assert parts(history + USER + "<think>\n\n</think>\n\n", "7")[0] == "empty"
    assert parts(history + USER, "<think>So")[:3] == ("truncated", "<think>", "So")


def test_a_raw_prompt_that_speaks_of_the_tag_gives_way_to_the_one_that_the_model_opens():
    assert parts("Write <think> first.", "<think>a</think>b") == ("closed", "<think>", "a", "</think>", "b")


def test_channels_of_gpt_oss():
    completion = "<|channel|>analysis<|message|>So 7.<|end|><|start|>assistant<|channel|>final<|message|>It is 7."
    assert parts("<|start|>assistant", completion, GPT_OSS) == (
        "closed",
        GPT_OSS.open,
        "So 7.",
        GPT_OSS.close,
        "It is 7.",
    )
    assert parts("<|start|>assistant", "<|channel|>final<|message|>7", GPT_OSS)[0] == "absent"


def test_tags_at_the_very_beginning():
    assert parts("", "<think>a</think>b") == ("closed", "<think>", "a", "</think>", "b")
    assert parts("", "</think>b") == ("empty", "", "", "</think>", "b")


def test_implied_opening_tag():
    assert parts("", "So 3 + 4 is", ThinkTags(implied=True))[:3] == ("truncated", "", "So 3 + 4 is")
    assert parts("", "So 3 + 4 is")[0] == "absent"


def test_tags_have_to_differ():
    with pytest.raises(InputError, match="two different texts"):
        ThinkTags(open="#", close="#")


@given(
    pieces=st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "so", "7.", "<|im_end|>", "é"]), max_size=12),
    cut=st.integers(0, 12),
)
def test_regions_always_cover_the_text(pieces, cut):
    prompt, completion = "".join(pieces[:cut]), "".join(pieces[cut:])
    text = prompt + completion
    chars, state = find_regions(text, len(prompt))
    order = (chars.prompt, chars.open, chars.thinking, chars.close, chars.answer)
    assert "".join(text[span.slice] for span in order) == text
    assert (len(chars.thinking) == 0) if state in ("empty", "absent") else True
    assert text[chars.close.slice].count("</think>") == (state in ("closed", "empty"))


def trace_of(tokenizer, prompt, completion, answer="7"):
    ids = tokenizer.encode(prompt).ids
    problem = Problem(id="p", prompt=prompt, answer=answer)
    return build_trace(
        id="t",
        problem=problem,
        token_ids=ids + tokenizer.encode(completion).ids,
        n_prompt_tokens=len(ids),
        tokenizer=tokenizer,
    )


def test_token_regions_follow_the_characters(tokenizer):
    trace = trace_of(tokenizer, USER + "<think>\n", "So 3 + 4 = 7.\n\n</think>\n\nThe answer is 7.<|im_end|>")
    strings = [trace.text[a:b] for a, b in trace.offsets]
    tokens = trace.tokens
    assert strings[tokens.open.start] == "<think>" and tokens.prompt.stop == trace.n_prompt_tokens - len(tokens.open)
    assert "".join(strings[tokens.thinking.slice]) == "So 3 + 4 = 7.\n\n"  # the merged token begins in the thinking
    assert strings[tokens.close_window.slice] == [".\n\n", "</think>", "\n\n"]
    assert tokens.close_window.start == tokens.close.start - 1
    assert trace.n_thinking_tokens == len(tokens.thinking)
    assert trace.final_answer == "7" and trace.correct is True and trace.state == "closed"


def test_tags_in_several_pieces_are_found_all_the_same(tokenizer):
    trace = trace_of(tokenizer, "Q", "<reason>So 7.\n</reason>7")
    tags = ThinkTags(open="<reason>", close="</reason>")
    again = build_trace(
        id="t", problem=trace.problem, token_ids=trace.token_ids, n_prompt_tokens=1, tokenizer=tokenizer, tags=tags
    )
    assert again.thinking == "So 7." and again.answer_text == "7" and len(again.tokens.open) > 1


def test_a_prompt_of_no_tokens_and_one_of_all(tokenizer):
    ids = tokenizer.encode("<think>So 7.</think>7").ids
    for n, prompt in ((0, ""), (len(ids), "<think>So 7.</think>7")):
        trace = build_trace(
            id="t", problem=Problem(id="p", prompt=""), token_ids=ids, n_prompt_tokens=n, tokenizer=tokenizer
        )
        assert trace.n_prompt_tokens == n and trace.text[trace.chars.answer.start :] == (
            "7" if not prompt else trace.answer_text
        )
    for n in (-1, len(ids) + 1):
        with pytest.raises(InputError, match=f"must be 0 to {len(ids)}, got {n}"):
            build_trace(
                id="t", problem=Problem(id="p", prompt=""), token_ids=ids, n_prompt_tokens=n, tokenizer=tokenizer
            )


def test_imported_text_gets_no_tokens_that_it_does_not_hold(tokenizer):
    begins = Tokenizer.from_str(tokenizer.to_str())
    begin = "<|endoftext|>"
    begins.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, begins.token_to_id(begin))]
    )
    for tok in (tokenizer, begins):
        trace = trace_from_text(
            id="t", problem=Problem(id="p", prompt="Q"), prompt="Q?", completion="<think>7</think>7", tokenizer=tok
        )
        assert trace.text == "Q?<think>7</think>7" and trace.n_prompt_tokens == len(tokenizer.encode("Q?").ids)


def test_a_completion_that_begins_with_the_closing_tag_closes_what_the_prompt_began():
    assert parts("Q <think>\nSo", "</think>7 <think>b") == ("closed", "<think>\n", "So", "</think>", "7 <think>b")


def test_truncated_thinking_has_no_answer_and_is_wrong(tokenizer):
    trace = trace_of(tokenizer, USER, "<think>\nSo 7")
    assert (trace.state, trace.final_answer, trace.correct) == ("truncated", None, False)
    assert trace_of(tokenizer, USER, "It is 7.", answer=None).correct is None


def test_a_trace_without_completion(tokenizer):
    trace = trace_of(tokenizer, USER + "<think>\n", "")
    assert trace.n_prompt_tokens == len(trace.token_ids) and trace.tokens.thinking.stop == len(trace.token_ids)


def test_imported_text_without_a_tokenizer_has_no_tokens(tokenizer):
    problem = Problem(id="p", prompt="Q", answer="7")
    bare = trace_from_text(id="t", problem=problem, prompt="Q ", completion="<think>So 7.</think>7")
    assert bare.thinking == "So 7." and bare.correct and len(bare.token_ids) == 0 == bare.n_thinking_tokens
    full = trace_from_text(
        id="t", problem=problem, prompt="Q ", completion="<think>So 7.</think>7", tokenizer=tokenizer
    )
    assert full.text == bare.text and full.chars == bare.chars
    assert full.offsets[full.n_prompt_tokens, 0] == 2


def test_equality_is_by_value(tokenizer):
    a, b = trace_of(tokenizer, USER, "7"), trace_of(tokenizer, USER, "7")
    assert a == b and hash(a) == hash(b) and a != trace_of(tokenizer, USER, "8") and a != "a"


def test_counts_that_do_not_fit_are_refused(tokenizer):
    problem = Problem(id="p", prompt="Q")
    with pytest.raises(InputError, match="must be 0 to 2, got 9"):
        build_trace(id="t", problem=problem, token_ids=[1, 2], n_prompt_tokens=9, tokenizer=tokenizer)
    with pytest.raises(InputError, match="logprobs"):
        build_trace(
            id="t",
            problem=problem,
            token_ids=[1, 2],
            n_prompt_tokens=1,
            tokenizer=tokenizer,
            logprobs=np.zeros(5, dtype=np.float32),
        )
