"""Every shape in which others dump traces, as small invented rows; each says the same, that 3 + 4 is 7."""

import json
import re
import zipfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.importers import import_traces
from reasonscope.data.exchange.summaries import check_summary, import_summary
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import ThinkTags
from reasonscope.data.text.thinking import Thinking

USER = {"role": "user", "content": "3 + 4?"}
THOUGHT, ANSWER = "I add 3 and 4. So 7.", "It is 7."
TOOL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def chat(message, finish="stop", **fields):
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice], **fields}


def read(tmp_path, *rows, name="dump.jsonl", **how):
    return import_traces(write(tmp_path / name, *rows), **how)


SERVERS = {
    "vllm": chat({"content": ANSWER, "reasoning": THOUGHT, "tool_calls": []}),
    "vllm, earlier": chat({"content": ANSWER, "reasoning_content": THOUGHT, "refusal": None, "function_call": None}),
    "sglang": chat({"content": ANSWER, "reasoning_content": THOUGHT, "tool_calls": None}, matched_stop=151645),
    "openrouter": chat(
        {
            "content": ANSWER,
            "reasoning": THOUGHT,
            "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT, "format": "unknown", "index": 0}],
        }
    ),
    "openrouter, details only": chat(
        {"content": ANSWER, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT, "signature": None}]}
    ),
    "openrouter, summary": chat(
        {
            "content": ANSWER,
            "reasoning": None,
            "reasoning_details": [
                {"type": "reasoning.summary", "summary": THOUGHT},
                {"type": "reasoning.encrypted", "data": "abc"},
            ],
        }
    ),
    "litellm": chat(
        {"content": ANSWER, "thinking_blocks": [{"type": "thinking", "thinking": THOUGHT, "signature": "s"}]}
    ),
    "mistral": chat(
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
                {"type": "text", "text": ANSWER},
            ]
        }
    ),
    "lm studio, tags in the text": chat({"content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"}),
    "completion": {
        "object": "text_completion",
        "choices": [{"index": 0, "text": f"{THOUGHT}\n</think>\n\n{ANSWER}", "finish_reason": "stop"}],
        "prompt": "Q: 3 + 4?\n<think>\n",
    },
    "completion, reasoning apart": {
        "choices": [{"text": ANSWER, "reasoning": THOUGHT, "finish_reason": "stop"}],
    },
    "responses": {
        "id": "resp_1",
        "object": "response",
        "status": "completed",
        "instructions": None,
        "output": [
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": THOUGHT}],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": ANSWER, "annotations": []}],
            },
        ],
    },
    "responses, summary": {
        "id": "resp_1",
        "object": "response",
        "status": "completed",
        "output": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}], "encrypted_content": "abc"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": ANSWER}]},
        ],
    },
    "anthropic": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": THOUGHT, "signature": "s"},
            {"type": "redacted_thinking", "data": "abc"},
            {"type": "text", "text": ANSWER},
        ],
        "stop_reason": "end_turn",
    },
    "ollama chat": {
        "model": "m",
        "created_at": "2026-01-01T00:00:00Z",
        "message": {"role": "assistant", "content": ANSWER, "thinking": THOUGHT},
        "done": True,
        "done_reason": "stop",
    },
    "ollama generate": {"model": "m", "response": ANSWER, "thinking": THOUGHT, "done": True, "done_reason": "stop"},
    "lm studio chat": {
        "model_instance_id": "m",
        "output": [{"type": "reasoning", "content": THOUGHT}, {"type": "message", "content": ANSWER}],
        "stats": {"input_tokens": 9},
        "response_id": "resp_1",
    },
    "lm studio conversation": {
        "name": "Sums",
        "messages": [
            {"versions": [{"type": "singleStep", "role": "user", "content": [{"type": "text", "text": "3 + 4?"}]}]},
            {
                "currentlySelected": 1,
                "versions": [
                    {"type": "singleStep", "role": "assistant", "content": [{"type": "text", "text": "8"}]},
                    {
                        "type": "multiStep",
                        "role": "assistant",
                        "steps": [
                            {
                                "type": "contentBlock",
                                "content": [{"type": "text", "text": THOUGHT}],
                                "style": {"type": "thinking", "ended": True},
                            },
                            {"type": "contentBlock", "content": [{"type": "text", "text": ANSWER}]},
                            {"type": "debugInfoBlock", "debugInfo": "x"},
                        ],
                    },
                ],
            },
        ],
    },
    "lm studio conversation, pieces": {
        "name": "Sums",
        "messages": [
            {"versions": [{"type": "singleStep", "role": "user", "content": [{"type": "text", "text": "3 + 4?"}]}]},
            {
                "versions": [
                    {
                        "type": "multiStep",
                        "role": "assistant",
                        "steps": [
                            {
                                "type": "contentBlock",
                                "content": [
                                    {"type": "text", "text": "<think>", "isStructural": True},
                                    {"type": "text", "text": "I add 3", "isStructural": False},
                                    {"type": "text", "text": " and 4. So 7.", "isStructural": False},
                                    {"type": "text", "text": "</think>", "isStructural": True},
                                ],
                                "style": {"type": "thinking", "ended": True},
                            },
                            {
                                "type": "contentBlock",
                                "content": [{"type": "text", "text": "It"}, {"type": "text", "text": " is 7."}],
                                "genInfo": {"identifier": "m", "stats": {"stopReason": "eosFound"}},
                            },
                        ],
                    }
                ]
            },
        ],
    },
    "sglang generate": {
        "text": f"<think>{THOUGHT}</think>{ANSWER}",
        "output_ids": [1, 2],
        "meta_info": {"id": "a1", "finish_reason": {"type": "stop", "matched": 2}, "completion_tokens": 2},
    },
    "vllm offline": {
        "request_id": "0",
        "prompt": "Q: 3 + 4?\n<think>\n",
        "prompt_token_ids": [1, 2],
        "outputs": [{"index": 0, "text": f"{THOUGHT}</think>{ANSWER}", "token_ids": [3], "finish_reason": "stop"}],
    },
    "trl, messages": {
        "step": 3,
        "prompt": [USER],
        "completion": [{"role": "assistant", "content": f"<think>{THOUGHT}</think>{ANSWER}"}],
        "reward_length": 0.5,
        "advantage": 0.1,
    },
    "trl, texts": {
        "step": 3,
        "prompt": "Q: 3 + 4?<think>",
        "completion": f"{THOUGHT}</think>{ANSWER}",
        "advantage": 0.1,
    },
    "verl": {
        "input": "user\nQ: 3 + 4?\nassistant\n<think>\n",
        "output": f"{THOUGHT}\n</think>\n\n{ANSWER}",
        "gts": "7",
        "score": 1.0,
        "step": 20,
    },
    "lm-eval": {
        "doc_id": 5,
        "doc": {"question": "3 + 4?"},
        "target": "7",
        "arguments": {"gen_args_0": {"arg_0": "Q: 3 + 4?", "arg_1": {"until": []}}},
        "resps": [[f"<think>{THOUGHT}</think>{ANSWER}"]],
        "filtered_resps": ["7"],
        "filter": "strict-match",
        "metrics": ["exact_match"],
        "exact_match": 1.0,
    },
    "lm-eval, chat": {
        "doc_id": 5,
        "doc": {},
        "target": "7",
        "arguments": [['[{"role": "user", "content": "3 + 4?"}]', {"until": []}]],
        "resps": [[f"<think>{THOUGHT}</think>{ANSWER}"]],
    },
    "inspect sample": {
        "id": "q1",
        "epoch": 1,
        "input": "3 + 4?",
        "target": "7",
        "output": {
            "model": "m",
            "choices": [
                {
                    "message": {
                        "role": "assistant",
                        "content": [{"type": "reasoning", "reasoning": THOUGHT}, {"type": "text", "text": ANSWER}],
                    },
                    "stop_reason": "stop",
                }
            ],
        },
    },
    "batch of openai": {
        "id": "batch_req_1",
        "custom_id": "q1",
        "response": {"status_code": 200, "request_id": "r", "body": chat({"content": ANSWER, "reasoning": THOUGHT})},
        "error": None,
    },
    "batch of anthropic": {
        "custom_id": "q1",
        "result": {
            "type": "succeeded",
            "message": {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": ANSWER}],
                "stop_reason": "end_turn",
            },
        },
    },
    "request and response": {
        "request": {"model": "m", "messages": [USER]},
        "response": chat({"content": ANSWER, "reasoning_content": THOUGHT}),
    },
    "messages": {"messages": [USER, {"role": "assistant", "content": ANSWER, "reasoning": THOUGHT}]},
    "messages, thinking of Ollama": {"messages": [USER, {"role": "assistant", "content": ANSWER, "thinking": THOUGHT}]},
    "messages, parts of gemini": {
        "messages": [
            {"role": "user", "parts": [{"text": "3 + 4?"}]},
            {"role": "model", "parts": [{"text": THOUGHT, "thought": True}, {"text": ANSWER}]},
        ]
    },
}


@pytest.mark.parametrize("shape", SERVERS)
def test_every_shape_keeps_its_reasoning(shape, tmp_path):
    for name in ("one.json", "lines.jsonl"):
        found = read(tmp_path, SERVERS[shape], name=name)
        (trace,) = found.traces
        assert (trace.thinking, trace.state) == (THOUGHT, "closed")
        assert trace.answer_text == ANSWER and trace.final_answer == "7" and not found.not_understood
        assert trace.correct in (None, True)


def test_what_is_known_beside_the_text_is_kept(tmp_path):
    kept = {name: read(tmp_path, row).traces[0] for name, row in SERVERS.items()}
    assert {trace.finish_reason for name, trace in kept.items() if name in ("vllm", "anthropic", "ollama chat")} == {
        "stop"
    }
    assert kept["vllm"].model == {"name": "m"} and kept["vllm"].id == "chatcmpl-1"
    assert kept["batch of openai"].id == kept["batch of anthropic"].id == "q1"
    assert kept["verl"].correct is True and kept["verl"].meta == {"score": 1.0, "step": 20}
    assert kept["lm-eval"].correct is True and kept["lm-eval"].meta == {"scores": {"exact_match": 1.0}}
    assert kept["inspect sample"].correct is True
    assert kept["trl, messages"].meta["rewards"] == {"reward_length": 0.5}
    assert kept["vllm"].meta["reasoning_from"] == "reasoning"
    assert kept["openrouter, details only"].meta["reasoning_from"] == "reasoning_details"
    assert kept["responses, summary"].meta["reasoning_from"] == "summary"
    for name in ("request and response", "lm studio conversation", "lm-eval, chat", "trl, messages", "messages"):
        assert [(m.role, m.content) for m in kept[name].problem.messages] == [("user", "3 + 4?")], name
    assert kept["vllm offline"].text.startswith("Q: 3 + 4?\n<think>\n")


def test_a_folder_is_read_whatever_is_in_it(tmp_path):
    folder = tmp_path / "dumps"
    (folder / "deep").mkdir(parents=True)
    write(folder / "a.jsonl", SERVERS["vllm"])
    write(folder / "deep" / "b.json", SERVERS["anthropic"])
    (folder / "readme.md").write_text("not a dump")
    row = SERVERS["trl, messages"]
    pq.write_table(pa.Table.from_pylist([row, {**row, "step": 4}]), folder / "completions_00003.parquet")
    with zipfile.ZipFile(folder / "log.eval", "w") as archive:
        archive.writestr("samples/a.json", json.dumps(SERVERS["inspect sample"]))
    write(folder / "log.json", {"version": 2, "eval": {}, "samples": [{**SERVERS["inspect sample"], "id": "q2"}]})
    found = import_traces(folder)
    assert found.kinds == {"chat completion": 1, "completion": 2, "Anthropic message": 1, "Inspect sample": 2}
    assert {trace.thinking for trace in found.traces} == {THOUGHT} and len({trace.id for trace in found.traces}) == 6
    assert [left_out.where.rpartition("/")[2] for left_out in found.not_understood] == ["readme.md"]
    assert found.not_understood[0].reason == "a file that ends in .md is not read"
    with pytest.raises(InputError, match="no file that ends in"):
        (tmp_path / "empty").mkdir()
        import_traces(tmp_path / "empty")


def test_requests_of_a_batch_meet_their_answers(tmp_path):
    folder = tmp_path / "batch"
    folder.mkdir()
    body = {"model": "m", "messages": [{"role": "system", "content": "Be brief."}, USER]}
    asked = [{"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body} for id in ("q1", "q2")]
    write(folder / "z-input.jsonl", *asked)
    write(folder / "output.jsonl", SERVERS["batch of openai"])
    found = import_traces(folder)
    (trace,) = found.traces
    assert [message.content for message in trace.problem.messages] == [
        "Be brief.",
        "3 + 4?",
    ] and found.n_unanswered == 1
    assert "1 request of the batch has no answer" in str(import_summary("run", found))
    anthropic = {"custom_id": "q1", "params": {"system": "Be brief.", "messages": [USER]}}
    (trace,) = read(tmp_path, SERVERS["batch of anthropic"], anthropic).traces
    assert [(m.role, m.content) for m in trace.problem.messages] == [("system", "Be brief."), ("user", "3 + 4?")]


def test_a_null_content_with_reasoning_was_cut_off(tmp_path):
    for content in (None, ""):
        (trace,) = read(tmp_path, chat({"content": content, "reasoning": THOUGHT}, finish="length")).traces
        assert (trace.state, trace.thinking, trace.answer_text) == ("truncated", THOUGHT, "")
        assert trace.finish_reason == "length" and trace.final_answer is None
    found = read(tmp_path, chat({"content": THOUGHT}, finish="length"))
    assert "Cut off, and without reasoning: 1 of the traces" in str(import_summary("run", found))
    row = {"messages": [USER, {"role": "assistant", "content": None, "reasoning": THOUGHT}], "finish_reason": "length"}
    assert read(tmp_path, row).traces[0].state == "truncated"


def test_reasoning_that_mentions_the_tags_is_whole(tmp_path, tokenizer):
    thought = "The tag </think> would end this, and <think> open it. So 7."
    for how in ({}, {"tokenizer": tokenizer}):
        (trace,) = read(tmp_path, chat({"content": ANSWER, "reasoning": thought}), **how).traces
        assert (trace.thinking, trace.answer_text, trace.state) == (thought, ANSWER, "closed")
        (cut,) = read(tmp_path, chat({"content": None, "reasoning": thought}, "length"), **how).traces
        assert (cut.thinking, cut.state) == (thought, "truncated")
    assert tokenizer.decode(trace.token_ids[trace.tokens.answer.slice].tolist()) == ANSWER


def test_tool_calls_are_turns(tmp_path):
    """The model thinks, calls a tool, thinks again and answers: two turns, of which one becomes the trace."""
    called = {"role": "assistant", "content": None, "reasoning": "I call add.", "tool_calls": [{"id": "c", **TOOL}]}
    result = {"role": "tool", "tool_call_id": "c", "content": "7"}
    last = {"role": "assistant", "content": ANSWER, "reasoning": THOUGHT}
    row = {"id": "x", "messages": [USER, called, result, last]}
    (trace,) = read(tmp_path, row).traces
    assert trace.thinking == THOUGHT and trace.meta["turn"] == trace.meta["turns"] == 2
    assert "I call add." not in trace.text and '{"name": "add", "arguments": {"a": 3, "b": 4}}' in trace.text
    (first,) = read(tmp_path, row, turn=1).traces
    assert (first.thinking, first.state, first.meta["turn"]) == ("I call add.", "closed", 1)
    assert first.meta["tool_calls"] == [{"name": "add", "arguments": {"a": 3, "b": 4}}] and "tool: 7" not in first.text
    both = read(tmp_path, row, turn="all").traces
    assert [one.id for one in both] == ["x/turn-1", "x/turn-2"] and {one.problem.group for one in both} == {"x"}
    graded = read(tmp_path, {**row, "answer": "7"}, turn="all").traces
    assert [one.problem.answer for one in graded] == [None, "7"]  # a call is not an answer
    with pytest.raises(InputError, match="has 2 turns of the assistant, and turn 3 was asked for"):
        read(tmp_path, row, turn=3)


def test_calls_in_every_form(tmp_path):
    anthropic = {
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "I call."},
            {"type": "tool_use", "name": "add", "input": {"a": 3}},
        ],
        "stop_reason": "tool_use",
    }
    response = {
        "output": [
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "I call."}], "summary": []},
            {"type": "function_call", "name": "add", "arguments": '{"a": 3}', "call_id": "c"},
        ],
        "status": "completed",
    }
    studio = {
        "output": [
            {"type": "reasoning", "content": "I call."},
            {"type": "tool_call", "tool": "add", "arguments": {"a": 3}, "output": "7"},
            {"type": "message", "content": ANSWER},
        ]
    }
    for row in (anthropic, response):
        (trace,) = read(tmp_path, row).traces
        assert (trace.thinking, trace.state) == ("I call.", "closed")
        assert trace.meta["tool_calls"] == [{"name": "add", "arguments": {"a": 3}}]
    first, second = read(tmp_path, studio, turn="all").traces
    assert first.thinking == "I call." and second.answer_text == ANSWER and "tool: 7" in second.text


def test_several_choices_are_samples_of_one_problem(tmp_path):
    row = chat({"content": ANSWER, "reasoning": THOUGHT}, messages=[USER])
    row["choices"] = row["choices"] * 2
    first, second = read(tmp_path, row).traces
    assert (first.id, second.id, second.sample) == ("chatcmpl-1/0", "chatcmpl-1/1", 1)
    assert first.problem.id == second.problem.id
    rollouts = [{**SERVERS["verl"], "output": f"So {n}.</think>{n}"} for n in (7, 8)]
    a, b = read(tmp_path, *rollouts).traces
    assert a.problem.id == b.problem.id and (a.sample, b.sample) == (0, 1) and (a.correct, b.correct) == (True, False)


def test_lines_of_several_filters_are_one_trace(tmp_path):
    row = SERVERS["lm-eval"]
    found = read(
        tmp_path,
        row,
        {**row, "filter": "flexible-extract"},
        {**row, "doc_id": 6},
        name="samples_gsm8k_2026-01-01T00-00-00.1.jsonl",
    )
    assert [trace.id for trace in found.traces] == ["gsm8k-5", "gsm8k-6"] and found.n_repeated == 1
    assert "1 row repeats" in str(import_summary("run", found))


def test_the_solution_of_gsm8k_is_not_the_answer(tmp_path):
    (trace,) = read(tmp_path, {**SERVERS["lm-eval"], "target": "3 + 4 = <<3+4=7>>7\n#### 7"}).traces
    assert (trace.problem.answer, trace.correct) == ("7", True)


def test_two_rows_with_one_id_are_both_kept(tmp_path):
    rows = [{"id": "a", "completion": "<think>One.</think>1"}, {"id": "a", "completion": "<think>Two.</think>2"}]
    assert [trace.id for trace in read(tmp_path, *rows).traces] == ["a", "a-2"]


def chunk(delta, finish=None, id="c"):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'id': id, 'object': 'chat.completion.chunk', 'model': 'm', 'choices': [choice]})}"


STREAMS = {
    "openai": [
        chunk({"role": "assistant", "content": ""}),
        "",
        *[chunk({"reasoning_content": piece}) for piece in ("I add 3 and 4.", " So 7.")],
        *[chunk({"content": piece}) for piece in ("It is", " 7.")],
        chunk({}, "stop"),
        "data: [DONE]",
    ],
    "ollama": [
        json.dumps({"model": "m", "message": {"role": "assistant", **piece}, "done": done, "done_reason": reason})
        for piece, done, reason in (
            ({"content": "", "thinking": "I add 3 and 4."}, False, None),
            ({"content": "", "thinking": " So 7."}, False, None),
            ({"content": "It is 7."}, False, None),
            ({"content": ""}, True, "stop"),
        )
    ],
    "ollama generate": [
        json.dumps({"model": "m", "done": False, "response": "", "thinking": THOUGHT}),
        json.dumps({"model": "m", "done": False, "response": "It is"}),
        json.dumps({"model": "m", "done": True, "done_reason": "stop", "response": " 7."}),
    ],
    "anthropic": [
        line
        for event in (
            {"type": "message_start", "message": {"type": "message", "role": "assistant", "content": []}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "thinking_delta", "thinking": "I add 3 and 4."},
            },
            {"type": "ping"},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": " So 7."}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": ANSWER}},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
            {"type": "message_stop"},
        )
        for line in (f"event: {event['type']}", f"data: {json.dumps(event)}", "")
    ],
    "openrouter, details": [
        ": OPENROUTER PROCESSING",
        chunk(
            {"reasoning": "I add 3 and 4.", "reasoning_details": [{"type": "reasoning.text", "text": "I add 3 and 4."}]}
        ),
        chunk({"reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": " So 7."}]}),
        chunk({"content": ANSWER}, "stop"),
    ],
    "responses": [
        f"data: {json.dumps(event)}"
        for event in (
            {"type": "response.created", "response": {"object": "response", "output": []}},
            {"type": "response.output_text.delta", "delta": "It"},
            {"type": "response.completed", "response": SERVERS["responses"]},
        )
    ],
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_put_together(name, tmp_path):
    (trace,) = read(tmp_path, *STREAMS[name], name="stream.txt").traces
    assert (trace.thinking, trace.answer_text, trace.state) == (THOUGHT, ANSWER, "closed")
    assert trace.finish_reason == "stop"
    if name not in ("openai", "openrouter, details"):  # their chunks say by their id which reply they belong to
        twice = read(tmp_path, *STREAMS[name] * 2, name="stream.txt")
        assert len(twice.traces) + twice.n_repeated == 2 and not twice.not_understood


def lm_studio_events(*last):
    events = [
        {"type": "chat.start", "model_instance_id": "m"},
        {"type": "prompt_processing.start"},
        {"type": "reasoning.start"},
        {"type": "reasoning.delta", "content": "I add 3 and 4."},
        {"type": "reasoning.delta", "content": " So 7."},
        {"type": "reasoning.end"},
        {"type": "message.start"},
        {"type": "message.delta", "content": ANSWER},
        *last,
    ]
    return [line for event in events for line in (f"event: {event['type']}", f"data: {json.dumps(event)}", "")]


@pytest.mark.parametrize(
    "last", [(), ({"type": "chat.end", "result": SERVERS["lm studio chat"]},)], ids=["cut", "whole"]
)
def test_a_stream_of_lm_studio_counts_as_far_as_it_goes(last, tmp_path):
    found = read(tmp_path, *lm_studio_events(*last), *lm_studio_events(*last), name="stream.sse")
    assert len(found.traces) + found.n_repeated == 2 and not found.not_understood
    assert (found.traces[0].thinking, found.traces[0].answer_text) == (THOUGHT, ANSWER)
    assert found.traces[0].model == {"name": "m"}


def test_a_conversation_of_lm_studio_keeps_its_system_prompt_its_tools_and_its_end(tmp_path):
    call = {"type": "toolCallRequest", "callId": 1, "name": "add", "parameters": {"a": 3, "b": 4}}
    steps = [
        {"type": "contentBlock", "style": {"type": "thinking"}, "content": [{"type": "text", "text": "I call it."}]},
        {"type": "contentBlock", "content": [call], "genInfo": {"stats": {"stopReason": "toolCalls"}}},
        {"type": "toolStatus", "callId": 1, "statusState": {"status": {"type": "toolCallSucceeded"}}},
        {"type": "contentBlock", "roleOverride": "tool", "content": [{"type": "toolCallResult", "content": "7"}]},
        {
            "type": "contentBlock",
            "content": [{"type": "text", "text": ANSWER}],
            "genInfo": {"indexedModelIdentifier": "m", "stats": {"stopReason": "maxPredictedTokensReached"}},
        },
    ]
    row = {
        "systemPrompt": "Of the application.",
        "perChatPredictionConfig": {"fields": [{"key": "llm.prediction.systemPrompt", "value": "Be brief."}]},
        "messages": [
            {"versions": [{"role": "user", "content": [{"type": "text", "text": "3 + 4?"}]}]},
            {"versions": [{"role": "assistant", "steps": steps}]},
        ],
    }
    first, last = read(tmp_path, row, turn="all").traces
    assert first.thinking == "I call it." and first.meta["tool_calls"] == [
        {"name": "add", "arguments": {"a": 3, "b": 4}}
    ]
    assert last.text.startswith("system: Be brief.\n\nuser: 3 + 4?") and "tool: 7" in last.text
    assert (last.finish_reason, last.model, last.answer_text) == ("length", {"name": "m"}, ANSWER)
    del row["perChatPredictionConfig"]
    assert read(tmp_path, row).traces[0].text.startswith("system: Of the application.")


def test_a_request_in_the_words_of_its_server(tmp_path):
    sglang = {"request": {"text": "Q: 3 + 4?"}, "response": SERVERS["sglang generate"]}
    assert read(tmp_path, sglang).traces[0].text.startswith("Q: 3 + 4?<think>")
    parts = [{"type": "text", "content": "3 + 4?"}, {"type": "image", "data_url": "data:,"}]
    lm_studio = {"request": {"system_prompt": "Be brief.", "input": parts}, "response": SERVERS["lm studio chat"]}
    (trace,) = read(tmp_path, lm_studio).traces
    assert [(m.role, m.content) for m in trace.problem.messages] == [
        ("system", "Be brief."), ("user", "3 + 4?"), ("user", "[image]"),
    ]  # fmt: skip
    assert trace.model == {"name": "m"}


def test_what_a_trainer_says_beside_a_rollout_is_kept(tmp_path):
    rewards = {"accuracy_reward": 1.0, "think_format_reward": 0.5, "solution": "7"}  # TRL names them after functions
    (trace,) = read(tmp_path, {**SERVERS["trl, texts"], **rewards}).traces
    assert trace.meta["rewards"] == {"accuracy_reward": 1.0, "think_format_reward": 0.5}
    (trace,) = read(tmp_path, {**SERVERS["verl"], "acc": True, "request_id": "r"}).traces
    assert trace.meta == {"score": 1.0, "step": 20, "acc": True, "request_id": "r"}


def write_log(path, method, **members):
    """An archive as Inspect writes it; with Zstandard, which zipfile cannot do before Python 3.14, the members are packed by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in members.items():
            raw = json.dumps(value).encode()
            about = zipfile.ZipInfo(name)
            archive.writestr(about, pa.Codec("zstd").compress(raw, asbytes=True) if method == 93 else raw)
            if method == 93:
                about.CRC, about.file_size, about.compress_type = zlib.crc32(raw), len(raw), 93
    return path


@pytest.mark.parametrize("method", [0, 93], ids=["stored", "zstandard"])
def test_logs_of_inspect_of_two_tasks(method, tmp_path):
    sample = SERVERS["inspect sample"]
    for task, question in (("sums", "3 + 4?"), ("others", "4 + 4?")):
        named = {"samples/a/b_epoch_1.json": {**sample, "id": "a/b", "input": question}}
        write_log(tmp_path / f"{task}.eval", method, **{"header.json": {"eval": {"task": task}}, **named})
    first, second = import_traces(tmp_path).traces
    assert (first.problem.id, second.problem.id, second.id) == ("others-a/b", "sums-a/b", "sums-a/b-1")
    assert first.thinking == second.thinking == THOUGHT


def test_a_damaged_log_of_inspect_is_an_error(tmp_path):
    whole = write_log(tmp_path / "log.eval", 93, **{"samples/a.json": SERVERS["inspect sample"]})
    raw = whole.read_bytes()
    for place in (0, 50, 80):
        whole.write_bytes(raw[:place] + bytes([raw[place] ^ 255]) + raw[place + 1 :])
        with pytest.raises(InputError, match=r"not a readable Inspect log|not JSON"):
            import_traces(whole)


def test_a_summary_of_redacted_reasoning_is_read_and_named(tmp_path):
    part = {"type": "reasoning", "reasoning": "gAAA", "summary": "Adding.", "redacted": True}
    row = chat({"content": [part, {"type": "text", "text": ANSWER}]})
    (trace,) = read(tmp_path, row).traces
    assert (trace.thinking, trace.meta["reasoning_from"]) == ("Adding.", "summary")


def test_two_streams_in_one_file_are_two_traces(tmp_path):
    other = [chunk({"reasoning": "Hm."}, id="d"), chunk({"content": "8"}, "stop", id="d")]
    first, second = read(tmp_path, *STREAMS["openai"], *other, name="stream.sse").traces
    assert (first.id, second.id, second.thinking, second.answer_text) == ("c", "d", "Hm.", "8")


BROKEN = [
    ("{", "not JSON"),
    ('["a"]', "must be a JSON object, got list"),
    ("3", "must be a JSON object, got int"),
    ({"foo": 1, "bar": 2}, "no known shape has these keys: foo, bar"),
    ({"error": {"message": "overloaded", "code": 529}}, "the server answered with an error"),
    (
        {"custom_id": "a", "response": {"status_code": 400, "body": {"error": "bad"}}, "error": None},
        "answered with an error",
    ),
    ({"custom_id": "a", "result": {"type": "errored", "error": {"type": "invalid"}}}, "the request errored"),
    (chat({"content": None}), "no text that can be read: it is empty"),
    (
        chat({"content": None, "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}),
        "its reasoning is encrypted",
    ),
    (chat({"content": [{"type": "hologram"}]}), "a part of type 'hologram' is not known"),
    (chat({"content": {"a": 1}}), "a message needs role and content"),
    ({"choices": [3]}, "must be a JSON object, got int"),
    (
        {"choices": [{"finish_reason": "error", "error": {"code": 502}, "message": {"content": ""}}]},
        "answered with an error",
    ),
    (
        {"input": "3 + 4?", "output": {"choices": []}, "error": {"message": "overloaded"}},
        "model wrote anything: overloaded",
    ),
    ({"results": {}, "n-samples": {}, "configs": {}}, "scores of lm-eval; the texts are in samples_"),
    ({"output": [{"type": "hologram"}]}, "an item of type 'hologram' is not known"),
    ({"output": []}, "does not end with what the model wrote"),
    ({**SERVERS["lm-eval"], "resps": [[[-1.5, False]]]}, "likelihoods, not texts"),
    ({"messages": [USER]}, "it must be the assistant's"),
    ({"type": "response.created", "response": {"output": []}}, "does not end with|no known shape"),
    ({"prompt": "a"}, "completion is missing"),
    ({"custom_id": "a", "response": {"body": {"messages": [USER]}}}, "it must be the assistant's"),
    ({"completion": "a", "sample": "x"}, "must be a finite number"),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_what_is_not_understood_is_listed(row, reason, tmp_path):
    found = read(tmp_path, SERVERS["vllm"], row, SERVERS["anthropic"])
    assert len(found.traces) == 2
    (left_out,) = found.not_understood
    assert left_out.where.endswith("dump.jsonl, line 2")
    assert re.search(reason, left_out.reason), left_out.reason
    with pytest.raises(InputError, match="none of its 1 rows is understood"):
        read(tmp_path, row)


def test_a_run_keeps_the_account_and_check_tells_it(tmp_path):
    encrypted = chat(
        {"content": "It is 7.", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, id="e"
    )
    found = read(tmp_path, SERVERS["vllm"], encrypted, "{", "{", "{", "{", {"foo": 1})
    told = str(import_summary("run", found))
    assert "1 with reasoning (from reasoning), 1 without, 5 not understood" in told
    assert "read as chat completion" in told and "keeps the reasoning of 1 of the traces to itself" in told
    with TraceStore.create(tmp_path / "run", meta={"imported": {"report": found.report()}}) as store:
        store.append(list(found.traces), {})
    told = str(check_summary("run", TraceStore.open(tmp_path / "run")))
    assert "1 with reasoning (from reasoning), 1 without, 5 not understood" in told
    assert "line 3" in told and "line 5 and 1 more: not JSON" in told and "line 7: no known shape" in told


def test_damaged_files_of_a_folder_are_listed_and_alone_they_are_an_error(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    write(folder / "good.jsonl", SERVERS["vllm"])
    (folder / "bad.parquet").write_bytes(b"no table")
    (folder / "bad.eval").write_bytes(b"no archive")
    (folder / "bad.json").write_text('{\n "choices": [\n')
    found = import_traces(folder)
    reasons = {left_out.where.rpartition("/")[2]: left_out.reason for left_out in found.not_understood}
    assert len(found.traces) == 1 and set(reasons) == {"bad.parquet", "bad.eval", "bad.json"}
    assert (
        "not a readable Parquet file" in reasons["bad.parquet"] and "not a readable Inspect log" in reasons["bad.eval"]
    )
    for name in reasons:
        with pytest.raises(InputError, match=name):
            import_traces(folder / name)
    with pytest.raises(InputError, match="cannot be read"):
        import_traces(tmp_path / "missing.jsonl")


def test_reasoning_in_the_open_is_found_if_asked_for(tmp_path):
    row = chat({"content": "3 and 4 make 7. The answer is 7."})
    assert read(tmp_path, row).traces[0].state == "absent"
    found = read(tmp_path, row, thinking=Thinking(mode="completion"))
    assert found.traces[0].thinking == "3 and 4 make 7." and found.thinking.mode == "completion"
    tags = Thinking(tags=ThinkTags(open="[R]", close="[/R]"))
    (trace,) = read(tmp_path, chat({"content": f"[R]{THOUGHT}[/R]{ANSWER}"}), thinking=tags).traces
    assert (trace.thinking, trace.answer_text) == (THOUGHT, ANSWER)


@pytest.mark.parametrize(
    "text",
    [
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}",
        f"analysis{THOUGHT}assistantfinal{ANSWER}",
        f"[THINK]{THOUGHT}[/THINK]{ANSWER}",
        f"<seed:think>{THOUGHT}</seed:think>{ANSWER}",
        f"<thinking>\n{THOUGHT}\n</thinking>\n\n{ANSWER}",
    ],
)
def test_tags_of_every_known_family_are_found_in_the_text(tmp_path, text):
    found = read(tmp_path, chat({"content": text}))
    (trace,) = found.traces
    assert (trace.thinking, trace.answer_text, trace.state) == (THOUGHT, ANSWER, "closed")
    assert found.thinking.tags is not None and found.thinking.tags.open != "<think>"
    (mention,) = read(tmp_path, chat({"content": f"Write {text} if you like."})).traces
    assert mention.state == "absent"


@pytest.mark.parametrize("end", ["<|return|>", "<|call|>", ""])
def test_the_marker_that_ends_a_turn_of_gpt_oss_is_not_in_its_answer(end, tmp_path):
    text = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}{end}"
    (trace,) = read(tmp_path, {"prompt": "3 + 4?", "completion": text}).traces
    assert (trace.thinking, trace.answer_text) == (THOUGHT, ANSWER)
    assert trace.finish_reason == ("stop" if end else "unknown")


def test_a_picture_leaves_a_mark_in_the_prompt(tmp_path):
    seen = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "data:…"}}, {"type": "text", "text": "?"}],
    }
    (trace,) = read(tmp_path, {"messages": [seen, {"role": "assistant", "content": "7"}]}).traces
    assert trace.problem.messages[0].content == "[image_url]\n?"
