import json
import zipfile
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.exchange.export import export_jsonl, export_parquet, export_thought_anchors
from reasonscope.data.exchange.imported import Imported
from reasonscope.data.exchange.importers import import_inspect, import_jsonl, import_thought_anchors, import_traces
from reasonscope.data.exchange.summaries import import_summary
from reasonscope.data.storage.records import traces_of_table
from reasonscope.data.text.parse import ThinkTags, trace_from_text
from reasonscope.data.text.published_chunks import published_numbers, published_sentences
from reasonscope.data.trace import Message, Problem, Sampling

SOLUTION = "Okay, I add them up. It is 3 + 4.\n\nSo it is 7, I think.\n</think>\n\nThe answer is \\boxed{7}."
CHUNKS = [
    {"chunk": "Okay, I add them up.", "chunk_idx": 0, "function_tags": ["plan_generation"], "depends_on": []},
    {
        "chunk": "It is 3 + 4. So it is 7, I think.",
        "chunk_idx": 1,
        "function_tags": ["active_computation"],
        "depends_on": [0],
    },
]


def write_anchors(folder):
    folder.mkdir(parents=True)
    base = {"prompt": "Problem: 3 + 4?\n<think>\n", "solution": SOLUTION, "answer": "7", "is_correct": True}
    (folder / "base_solution.json").write_text(json.dumps(base))
    (folder / "chunks_labeled.json").write_text(json.dumps(CHUNKS))
    (folder / "problem.json").write_text(json.dumps({"problem": "3 + 4?", "gt_answer": 7}))
    return folder


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_thought_anchors_folders(tmp_path, tokenizer):
    write_anchors(tmp_path / "m" / "correct" / "problem_1")
    write_anchors(tmp_path / "m" / "incorrect" / "problem_1")
    traces = import_thought_anchors(tmp_path, tokenizer=tokenizer)
    assert [trace.id for trace in traces] == ["m/correct/problem_1", "m/incorrect/problem_1"]
    assert {trace.problem.group for trace in traces} == {"problem_1"}
    trace = traces[0]
    assert (
        trace.correct is True and trace.final_answer == "7" and trace.problem.answer == "7" and trace.state == "closed"
    )
    found = published_sentences(trace)
    assert [(s.text, s.tag, s.index) for s in found] == [
        ("Okay, I add them up.", "plan_generation", 0),
        ("It is 3 + 4.\n\nSo it is 7, I think.", "active_computation", 1),
    ]
    assert all(len(s.tokens) and trace.text[s.chars.slice] == s.text for s in found)
    (alone,) = import_thought_anchors(tmp_path / "m" / "correct" / "problem_1")
    assert alone.id == "problem_1" and alone.meta["chunks"] == CHUNKS and len(published_sentences(alone)) == 2


def test_a_published_folder_is_recognised_or_named(tmp_path, tokenizer):
    folder = write_anchors(tmp_path / "p")
    (folder / "chunks_resampled.json").write_text(json.dumps({"0": ["So.", "Then."]}))
    for kind in ("auto", "thought-anchors"):
        found = import_traces(folder, kind=kind, tokenizer=tokenizer)
        assert [trace.id for trace in found.traces] == ["p"] and dict(found.kinds) == {"Thought Anchors": 1}
        assert found.traces[0].meta["chunks_resampled"] == {"0": ["So.", "Then."]}
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "dump.jsonl").write_text(json.dumps({"prompt": "a", "completion": "<think>b</think>c"}))
    assert len(import_traces(tmp_path / "q").traces) == 1
    with pytest.raises(InputError, match=r"no base_solution\.json"):
        import_traces(tmp_path / "q", kind="thought-anchors")
    (folder / "chunks_resampled.json").write_text(json.dumps({"0": ["So.", 3]}))
    with pytest.raises(InputError, match="each sentence needs a list of texts"):
        import_traces(folder)


def test_sentences_keep_counting_if_a_chunk_is_left_out(tmp_path):
    folder = write_anchors(tmp_path / "p")
    edited = {"chunk": "Nobody wrote this.", "chunk_idx": 1, "function_tags": []}
    chunks = [CHUNKS[0], edited, {**CHUNKS[1], "chunk_idx": 2}]
    (folder / "chunks_labeled.json").write_text(json.dumps(chunks))
    (trace,) = import_thought_anchors(folder)
    found = published_sentences(trace)
    assert [(s.index, s.tag) for s in found] == [(0, "plan_generation"), (1, "active_computation")]
    assert published_numbers(trace) == [0, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("base_solution.json", "{", "not JSON"),
        ("base_solution.json", "[]", "JSON object"),
        ("base_solution.json", '{"prompt": "a"}', "solution is missing"),
        ("chunks_labeled.json", '[{"chunk": "a"}]', "function_tags"),
        ("problem.json", "3", "JSON object"),
    ],
)
def test_damaged_anchors_name_the_file(tmp_path, name, content, message):
    folder = write_anchors(tmp_path / "p")
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=rf"/{name}.*{message}"):
        import_thought_anchors(tmp_path)


def test_no_anchors(tmp_path):
    with pytest.raises(InputError, match=r"no base_solution\.json"):
        import_thought_anchors(tmp_path)


def test_jsonl_of_completions(tmp_path):
    user = {"role": "user", "content": "3 + 4?"}
    path = write_lines(
        tmp_path / "runs.jsonl",
        {
            "id": "a",
            "prompt": "Q <think>\n",
            "completion": "So 7.</think>7",
            "answer": "7",
            "finish_reason": "stop",
            "model": "m",
        },
        {"messages": [user, {"role": "assistant", "content": "It is 7.", "reasoning_content": "So 7."}]},
        "",
        {
            "messages": [user, {"role": "assistant", "content": "<think>So 7.</think>It is 7."}],
            "finish_reason": "length",
        },
    )
    first, second, third = import_jsonl(path)
    assert (first.id, first.thinking, first.correct, first.finish_reason, first.model) == (
        "a",
        "So 7.",
        True,
        "stop",
        {"name": "m"},
    )
    assert second.id == "runs-2" and second.text.startswith(
        "user: 3 + 4?\n\nassistant: <think>\nSo 7.\n</think>\n\nIt is 7."
    )
    assert third.thinking == "So 7." and third.answer_text == "It is 7." and third.finish_reason == "length"


def test_a_null_is_not_given_and_a_zero_is(tmp_path):
    null = dict.fromkeys(("id", "problem_id", "group", "sample"))
    rows = [null | {"completion": "7"}, {"id": 0, "problem_id": 0, "group": 0, "answer": 0, "completion": "0"}]
    first, second = import_jsonl(write_lines(tmp_path / "runs.jsonl", *rows))
    assert (first.id, first.problem.id, first.problem.group, first.sample) == ("runs-1", "runs-1", "runs-1", 0)
    assert (second.id, second.problem.id, second.problem.group, second.correct) == ("0", "0", "0", True)
    null = {"id": None, "epoch": None, "target": []}
    rows = {"samples__a_json": sample("7", **null), "samples__b_json": sample("0", target=0)}
    rows |= {"samples__c_json": sample("0", epoch=3, target=["0"]), "samples__d_json": sample("0", epoch=4, target="")}
    traces = import_inspect(write_log(tmp_path / "log.eval", **rows))
    assert [trace.id for trace in traces] == ["a-1", "q1-2", "q1-3", "q1-4"]
    assert [trace.problem.answer for trace in traces] == [None, "0", "0", None]
    assert [trace.correct for trace in traces] == [None, True, True, None]


def test_a_template_that_opened_the_tag_can_be_declared(tmp_path):
    path = write_lines(tmp_path / "runs.jsonl", {"completion": "So 7"})
    assert import_jsonl(path)[0].state == "absent"
    assert import_jsonl(path, tags=ThinkTags(implied=True))[0].state == "truncated"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("3", "JSON object"),
        ('{"prompt": "a"}', "completion is missing"),
        ('{"completion": "a", "sample": "x"}', "must be a finite number"),
        ('{"completion": "a", "difficulty": []}', "must be a finite number"),
        ('{"messages": []}', "at least one"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must be the assistant"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"id": "a", "completion": "b"}', "came before"),
        ('{"completion": "b", "meta": 3}', "JSON object"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "runs.jsonl", {"id": "a", "completion": "b"}, line)
    with pytest.raises(InputError, match=rf"runs\.jsonl, line 2.*{message}"):
        import_jsonl(path)


def test_nothing_to_import(tmp_path):
    with pytest.raises(InputError, match="no completion"):
        import_jsonl(write_lines(tmp_path / "runs.jsonl"))
    with pytest.raises(InputError, match="cannot be read"):
        import_jsonl(tmp_path / "none.jsonl")


def write_log(path, **files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_json", ".json"), content)
    return path


def sample(content, **fields):
    choice = {"message": {"role": "assistant", "content": content}, "stop_reason": "max_tokens"}
    return json.dumps(
        {
            "id": "q1",
            "epoch": 2,
            "input": "3 + 4?",
            "target": "7",
            "output": {"model": "m", "choices": [choice]},
            **fields,
        }
    )


def test_inspect_logs(tmp_path):
    parts = [{"type": "reasoning", "reasoning": "So 7."}, {"type": "text", "text": "It is 7."}]
    path = write_log(
        tmp_path / "log.eval",
        header_json="{}",
        samples__a_json=sample(parts, scores={"match": {"value": "C"}}),
        samples__b_json=sample(
            "<think>So 8.</think>8", epoch=1, input=[{"role": "user", "content": "3 + 4?"}], target=["7"]
        ),
        samples__c_json=json.dumps({"id": "q2", "input": "x", "output": {"choices": []}}),
    )
    first, second = import_inspect(path)
    assert (first.id, first.sample, first.thinking, first.answer_text, first.correct) == (
        "q1-2",
        1,
        "So 7.",
        "It is 7.",
        True,
    )
    assert (
        first.meta["scores"] == {"match": {"value": "C"}}
        and first.finish_reason == "length"
        and first.model == {"name": "m"}
    )
    assert (second.id, second.thinking, second.correct, second.problem.id) == ("q1-1", "So 8.", False, "q1")


def test_damaged_inspect_logs(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"a\.json: not JSON"):
        import_inspect(write_log(tmp_path / "a.eval", samples__a_json="{"))
    with pytest.raises(InputError, match="no sample with an output"):
        import_inspect(write_log(tmp_path / "b.eval", **{"..__..__samples__x_json": sample("a")}))
    (tmp_path / "c.eval").write_bytes(b"no archive")
    with pytest.raises(InputError, match="not a readable Inspect log"):
        import_inspect(tmp_path / "c.eval")
    with pytest.raises(InputError, match="not a readable Inspect log"):
        import_inspect(tmp_path / "none.eval")
    good = write_log(tmp_path / "d.eval", samples__a_json=sample("a" * 5000))
    raw = bytearray(good.read_bytes())
    raw[60] ^= 255
    good.write_bytes(raw)
    with pytest.raises(InputError):
        import_inspect(good)
    monkeypatch.setattr("reasonscope.data.exchange.dump_files._LARGEST_SAMPLE", 2**20)
    with pytest.raises(InputError, match="more than 1 MiB"):
        import_inspect(write_log(tmp_path / "e.eval", samples__a_json=" " * (2**20 + 1)))


def test_exports_come_in_again(tmp_path, tokenizer):
    write_anchors(tmp_path / "in" / "m" / "problem_1")
    traces = import_thought_anchors(tmp_path / "in", tokenizer=tokenizer)
    assert export_parquet(traces, tmp_path / "t.parquet") == 1
    assert list(traces_of_table(pq.read_table(tmp_path / "t.parquet"))) == traces
    assert export_jsonl(traces, tmp_path / "t.jsonl") == 1
    (again,) = import_jsonl(tmp_path / "t.jsonl", tokenizer=tokenizer)
    assert (again.text, again.chars, again.correct, again.id) == (traces[0].text, traces[0].chars, True, traces[0].id)
    assert export_thought_anchors(traces, tmp_path / "out") == 1
    (anchors,) = import_thought_anchors(tmp_path / "out", tokenizer=tokenizer)
    assert anchors.meta == traces[0].meta and anchors.text == traces[0].text and anchors.id == traces[0].id


def test_a_line_tells_all_of_a_trace(tmp_path):
    line = {
        "id": "a",
        "prompt": "Q<think>",
        "completion": "So 7.</think>It is 7.",
        "answer": "7",
        "model": "m",
        "meta": {"n": 1},
    }
    (trace,) = import_jsonl(write_lines(tmp_path / "runs.jsonl", line))
    trace = replace(trace, sampling=Sampling(temperature=0.5, seed=3), finish_reason="stop", sample=2)
    export_jsonl([trace], tmp_path / "t.jsonl")
    (found,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    sampling = found.pop("sampling")
    assert (sampling["temperature"], sampling["seed"]) == (0.5, 3)
    assert found == {
        "id": "a",
        "problem_id": trace.problem.id,
        "group": trace.problem.group,
        "difficulty": None,
        "answer": "7",
        "sample": 2,
        "prompt": "Q",
        "completion": "<think>So 7.</think>It is 7.",
        "thinking": "So 7.",
        "state": "closed",
        "finish_reason": "stop",
        "final_answer": "7",
        "correct": True,
        "n_thinking_tokens": trace.n_thinking_tokens,
        "model": {"name": "m"},
        "meta": {"n": 1},
    }


def test_anchors_tell_the_question_and_the_answers(tmp_path):
    asked = (Message(role="system", content="Be brief."), Message(role="user", content="3 + 4?"))
    for id, completion, answer in (
        ("a/b", "<think>So 7.</think>7", "7"),
        ("c", "<think>So", "7"),
        ("d", "<think></think>", None),
    ):
        problem = Problem(id="p", messages=asked, answer=answer, meta={"level": 2})
        trace = trace_from_text(
            id=id, problem=problem, prompt="Q", completion=completion, meta={"chunks_resampled": []}
        )
        assert export_thought_anchors([trace], tmp_path) == 1
        files = {path.name: json.loads(path.read_text()) for path in (tmp_path / id).iterdir()}
        assert set(files) == {"base_solution.json", "problem.json", "chunks_labeled.json"}
        assert files["problem.json"] == {"problem": "3 + 4?", "gt_answer": answer, "level": 2}
        correct = id == "a/b"
        assert files["base_solution.json"] == {
            "prompt": "Q",
            "solution": completion,
            "full_cot": "Q" + completion,
            "answer": "7" if correct else None,
            "is_correct": None if answer is None else correct,
        }
        (again,) = import_thought_anchors(tmp_path / id)
        assert (again.final_answer, again.correct) == (trace.final_answer, trace.correct)
    chunks = json.loads((tmp_path / "a" / "b" / "chunks_labeled.json").read_text())
    assert chunks == [{"chunk": "So 7.", "chunk_idx": 0, "function_tags": ["fact_retrieval"], "depends_on": []}]


@pytest.mark.parametrize("id", ["/a", "../a", "a/../../b", ".", "a\0b"])
def test_anchors_stay_in_their_folder(id, tmp_path):
    trace = trace_from_text(id=id, problem=Problem(id="p", prompt="Q"), prompt="Q", completion="7")
    with pytest.raises(InputError, match="cannot be the name of a folder"):
        export_thought_anchors([trace], tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "out").touch()
    trace = trace_from_text(id="a", problem=Problem(id="p", prompt="Q"), prompt="Q", completion="7")
    with pytest.raises(StoreError, match="cannot make"):
        export_thought_anchors([trace], tmp_path / "out")


def test_anchors_of_a_trace_without_published_chunks(tmp_path):
    path = write_lines(
        tmp_path / "runs.jsonl", {"id": "a", "prompt": "Q", "completion": "<think>So I add 3. Then it is 7.</think>7"}
    )
    export_thought_anchors(import_jsonl(path), tmp_path / "out")
    (trace,) = import_thought_anchors(tmp_path / "out")
    assert [s.text for s in published_sentences(trace)] == ["So I add 3.", "Then it is 7."]
    with pytest.raises(InputError, match="cannot be the name"):
        bad = write_lines(tmp_path / "bad.jsonl", {"id": "../a", "completion": "b"})
        export_thought_anchors(import_jsonl(bad), tmp_path / "out")


def test_published_traces(real_traces):
    traces = import_thought_anchors(real_traces)
    assert len(traces) == 6 and all(trace.state == "closed" for trace in traces)
    for trace in traces:
        assert len(published_sentences(trace)) == len(trace.meta["chunks"]) > 50
        assert trace.correct == ("/correct/" in trace.id) == (trace.final_answer == trace.problem.answer)


def test_what_is_not_decided_is_counted(tmp_path):
    """A trace whose answer cannot be compared is neither right nor wrong, and nothing ends because of it."""
    lines = [
        {"id": id, "completion": f"<think>So.</think>The answer is ${said}$", "answer": "3"}
        for id, said in (("a", "3"), ("b", "9^{9^{9^9}}"))
    ]
    decided, given_up = import_jsonl(write_lines(tmp_path / "runs.jsonl", *lines))
    assert (decided.correct, decided.undecided) == (True, False)
    assert (given_up.correct, given_up.undecided) == (None, True)
    assert "right answers: 1 of 1 (1.00), 1 not decided" in str(
        import_summary("run", Imported.of_kind("completion", [decided, given_up]))
    )
    assert "right answers: not decided" in str(import_summary("run", Imported.of_kind("completion", [given_up])))
