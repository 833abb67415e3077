"""What makes a span, a problem and a trace valid."""

from dataclasses import replace

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Message, Problem, Regions, Sampling, Span, Trace


def test_spans_are_half_open():
    span = Span(2, 4)
    assert len(span) == 2 and [position in span for position in range(1, 6)] == [False, True, True, False, False]
    assert "abcdef"[span.slice] == "cd" and len(Span(0, 0)) == 0 and Span(1, 3) < span
    for start, stop in ((-1, 2), (3, 2)):
        with pytest.raises(InputError, match="invalid span"):
            Span(start, stop)


def test_a_problem_is_its_own_group_unless_it_has_one():
    asked = (Message(role="user", content="Q"),)
    assert Problem(id="a", prompt="Q").group == "a" and Problem(id="a", messages=asked, group="g").group == "g"
    assert Problem(id="a", prompt="").prompt == ""
    for given in ({}, {"prompt": "Q", "messages": asked}):
        with pytest.raises(InputError, match="either messages or prompt"):
            Problem(id="a", **given)


def regions(*begins: int, end: int) -> Regions:
    spans = [Span(a, b) for a, b in zip((0, *begins), (*begins, end), strict=True)]
    return Regions(
        **dict(zip(("prompt", "open", "thinking", "close", "answer"), spans, strict=True)), close_window=spans[3]
    )


@pytest.fixture
def trace() -> Trace:
    """Of one prompt token and one generated token a character."""
    return Trace(
        id="t",
        problem=Problem(id="p", prompt="Q"),
        text="Qotca",
        token_ids=np.arange(5),
        offsets=np.stack([np.arange(5), np.arange(1, 6)], axis=1),
        n_prompt_tokens=1,
        chars=regions(1, 2, 3, 4, end=5),
        tokens=regions(1, 2, 3, 4, end=5),
        state="closed",
        logprobs=np.array([-1, np.nan, -3, -4], dtype=np.float32),
    )


def test_a_trace_has_only_what_was_given(trace):
    assert (trace.thinking, trace.answer_text, trace.n_thinking_tokens) == ("t", "a", 1)
    assert (trace.finish_reason, trace.final_answer, trace.correct, trace.sample) == ("unknown", None, None, 0)
    assert (trace.sampling, trace.model, trace.meta, trace.entropies) == (None, {}, {}, None)
    greedy = Sampling()
    assert (greedy.temperature, greedy.top_p, greedy.max_new_tokens, greedy.seed) == (0.0, 1.0, 512, 0)


def test_traces_are_equal_if_all_their_fields_are(trace):
    same = replace(trace, logprobs=trace.logprobs.copy())
    assert same == trace and hash(same) == hash(trace) and trace != "t"
    assert trace != replace(trace, logprobs=np.zeros(4, dtype=np.float32)) and trace != replace(trace, logprobs=None)
    assert trace != replace(trace, token_ids=trace.token_ids.astype(np.int32)) and trace != replace(trace, sample=1)
    assert replace(trace, correct=True) != replace(trace, correct=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.zeros((4, 2), dtype=np.int64)}, "offsets have shape .4, 2.; 5 tokens need .5, 2."),
        ({"n_prompt_tokens": 6}, "must be 0 to 5, got 6"),
        ({"n_prompt_tokens": -1}, "must be 0 to 5, got -1"),
        ({"text": "Qotc"}, "its regions must end with its 4 characters and 5 tokens"),
        ({"tokens": regions(1, 2, 3, 4, end=4)}, "its regions must end"),
        (
            {"logprobs": np.zeros(5, dtype=np.float32)},
            "logprobs must be float32 .4,., one per generated token, got float32 .5,.",
        ),
        ({"entropies": np.zeros(4)}, "entropies must be float32 .4,., one per generated token, got float64"),
    ],
)
def test_what_does_not_fit_is_not_a_trace(trace, change, message):
    with pytest.raises(InputError, match=message):
        replace(trace, **change)


def test_a_trace_may_be_all_prompt_or_all_generated(trace):
    assert replace(trace, n_prompt_tokens=5, logprobs=None).n_prompt_tokens == 5
    assert replace(trace, n_prompt_tokens=0, logprobs=np.zeros(5, dtype=np.float32)).n_prompt_tokens == 0


@pytest.mark.parametrize("change", [{"prompt": Span(1, 1)}, {"open": Span(1, 3)}, {"answer": Span(3, 5)}])
def test_regions_leave_no_gap_and_do_not_overlap(trace, change):
    with pytest.raises(InputError, match="leave a gap or overlap"):
        replace(trace.chars, **change)


def test_what_penalises_and_what_could_not_be_decided_is_said(tokenizer):
    assert not Sampling().penalises
    assert Sampling(repetition_penalty=1.1).penalises and Sampling(presence_penalty=0.5).penalises
    trace = trace_from_text(
        id="t",
        problem=Problem(id="p", prompt="q", answer="7"),
        prompt="q<think>\n",
        completion="7\n</think>\n\n\\boxed{7}",
        tokenizer=tokenizer,
    )
    assert trace.correct and not trace.undecided and replace(trace, correct=None).undecided
    assert not replace(trace, correct=None, problem=replace(trace.problem, answer=None)).undecided


def test_one_block_of_thinking_is_its_only_one_and_two_leave_a_gap(tokenizer):
    def of(completion):
        return trace_from_text(
            id="t", problem=Problem(id="p", prompt="q"), prompt="q<think>\n", completion=completion, tokenizer=tokenizer
        )

    one = of("a b\n</think>\n\n7")
    assert one.thinking_spans == (one.chars.thinking,) and one.thinking_blocks == (one.tokens.thinking,)
    values = np.arange(float(len(one.token_ids)))
    np.testing.assert_array_equal(one.only_thinking(values), values[one.tokens.thinking.slice])
    two = of("a b\n</think>\n\nSo <think>\nc d\n</think>\n\n7")
    assert len(two.thinking_spans) == len(two.thinking_blocks) == 2
    shown = two.only_thinking(np.ones(len(two.token_ids)))
    assert np.isnan(shown).sum() == len(two.tokens.thinking) - two.n_thinking_tokens > 0
