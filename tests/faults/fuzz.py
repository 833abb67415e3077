"""Throws damaged and hostile input at everything that reads a file, a text or a command-line argument.

    python tests/faults/fuzz.py [--inputs 100000] [--seed 0] [--only NAME]

A reader may return something or raise a ReasonscopeError. Anything else, more than ten seconds, and a file outside of its folder are
findings: they are listed with the input that did it, and the exit status is 1. A corpus of valid inputs is mutated: bits and stretches
of bytes, values anywhere in JSON and YAML, headers of safetensors behind a right length. Where atheris is installed, `--atheris` hands the
same targets to it, which follows the coverage of our own modules.
"""

import argparse
import gc
import io
import json
import lzma
import math
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType

import numpy as np
import yaml
from rich.console import Console

from reasonscope.analysis.figures import read_figure
from reasonscope.analysis.results import Axis, Result
from reasonscope.analysis.runs.saved_numbers import read_numbers
from reasonscope.app import cli
from reasonscope.app.demo.summary import table
from reasonscope.data.errors import ReasonscopeError
from reasonscope.data.exchange.export import export_thought_anchors
from reasonscope.data.exchange.importers import import_inspect, import_jsonl, import_thought_anchors, import_traces
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.manifest import NAME, _seal
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.storage.untrusted import parse_json
from reasonscope.data.text.align import decode_with_offsets
from reasonscope.data.text.answers import equivalent, extract_answer
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.published_chunks import published_sentences
from reasonscope.data.text.sentence_labels import label_sentences
from reasonscope.data.text.steps_and_sentences import classify_step, sentences
from reasonscope.data.trace import Message, Problem, Trace
from reasonscope.probes.architecture.sites import Site, expand_sites
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.models.loading import locate
from reasonscope.probes.models.model import Model, load_model
from reasonscope.probes.models.prompting import Prompting, load_prompting
from reasonscope.probes.server.completions import ServerWriter
from reasonscope.steering.ablation.plan import read_plan
from reasonscope.steering.vectors.vector import SteeringVector

Mutate = Callable[[random.Random, bytes], bytes]
_NO_FORMAT = (
    ValueError, TypeError, AttributeError, LookupError, RuntimeError, EOFError, OSError, struct.error, zlib.error, lzma.LZMAError,
    zipfile.BadZipFile, yaml.YAMLError,
)  # fmt: skip
HOSTILE = (
    None, True, False, 0, -1, 2**31, 2**63, 10**400, 1.5, -0.0, float("nan"), float("inf"), "", " ", "\x00", "\ud800", "../../x", "/etc/x",
    "a" * 5000, "\n\n", "<think>", "</think>", "resid_post.99999999999999999999", "direction.1", "\u202e", [], [[]], {}, {"": None},
    [None], ["a"], [0, 1], "1e999", "٣", "²", "samples/../../x.json", "con", "é" * 200,
)  # fmt: skip
INTERESTING = (
    b"\x00",
    b"\xff",
    b"\xff" * 8,
    b"\x80\x04",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"PK",
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What reads: `read` is given an input and an empty folder of its own. `corpus` are valid inputs, `mutate` damages one."""

    name: str
    corpus: Callable[[], list[bytes]]
    mutate: Mutate
    read: Callable[[bytes, Path], object]
    share: float = 1.0


# --- mutations


def bytewise(rng: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        how = rng.randrange(6)
        if how == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[at:]
        elif how == 2:
            changed[at:at] = rng.choice(INTERESTING) * rng.choice((1, 1, 2, 50))
        elif how == 3:
            del changed[at : at + rng.choice((1, 4, 40))]
        elif how == 4:
            piece = rng.choice(INTERESTING)
            changed[at : at + len(piece)] = piece
        else:
            there = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[there : there + rng.choice((1, 8, 100))]
    return bytes(changed)


def a_value(rng: random.Random) -> object:
    if rng.random() < 0.1:
        deep: object = 0
        for _ in range(rng.choice((2, 20, 300))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return rng.choice(HOSTILE)


def changed_value(rng: random.Random, value: object) -> object:
    """`value` with one place in it (a leaf mostly) replaced, dropped or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        how = rng.random()
        if how < 0.1:
            return rest
        if how < 0.2:
            return {**rest, str(rng.choice(HOSTILE)): value[key]}
        return {**value, key: changed_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        how = rng.random()
        if how < 0.1:
            return value[:at] + value[at + 1 :]
        if how < 0.2:
            return [*value, value[at]]
        return [*value[:at], changed_value(rng, value[at]), *value[at + 1 :]]
    return a_value(rng)


def jsonwise(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.3:
        return bytewise(rng, raw)
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = changed_value(rng, value)
    return json.dumps(value).encode()


def linewise(rng: random.Random, raw: bytes) -> bytes:
    lines = raw.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = jsonwise(rng, lines[at])
    return b"\n".join(lines)


def yamlwise(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.3:
        return bytewise(rng, raw)
    value = yaml.safe_load(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = changed_value(rng, value)
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 2000


def headerwise(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file whose header, or the JSON that we keep in it, has other values."""
    if rng.random() < 0.3:
        return bytewise(rng, raw)
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    meta = header.get("__metadata__") or {}
    key = next(iter(meta), None)
    if key is not None and rng.random() < 0.8:
        inner = json.loads(meta[key])
        for _ in range(rng.choice((1, 1, 2))):
            inner = changed_value(rng, inner)
        header["__metadata__"] = {**meta, key: json.dumps(inner)}
    else:
        header = changed_value(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", rng.choice((len(text), len(text), len(text), 2**63))) + text + raw[8 + size :]


def manifestwise(rng: random.Random, raw: bytes) -> bytes:
    """A manifest with other values and a right checksum."""
    if rng.random() < 0.2:
        return bytewise(rng, raw)
    values = json.loads(raw)
    values.pop("checksum")
    changed = changed_value(rng, values)
    try:
        return _seal(changed) if isinstance(changed, dict) else json.dumps(changed).encode()
    except ReasonscopeError:  # NaN
        return json.dumps(changed).encode()


def archivewise(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.5:
        return bytewise(rng, raw)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    members[rng.choice((name, name, name, "samples/../../x.json", "/samples/x.json"))] = jsonwise(rng, members[name])
    return packed(members, rng.choice(COMPRESSIONS))


COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def packed(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


WORDS = (
    *"record check import export probe steer ablate analyse verify doctor length refusal correctness sweep apply mi anchors trajectory".split(),
    *"entropy jsonl inspect thought-anchors --run --out --n --sites --problems --shard --samples --temperature --top-p --seed --to".split(),
    *"--trace --model --json --batch-size 1 0 -1 1e99 nan 1/2 0/0 3/2 resid_post.* resid_post.9-1 z.0,z.1 ../../x /dev/null . run".split(),
    *"missing.jsonl file.jsonl hf: ledger:x requests:y organism-nowhere --help -- -x --no-such".split(), "", " ", "\x00", "é", "a" * 300,
)  # fmt: skip
# Words that would start a server, write the demo or load a model; what they are given is tested by the other targets.
NEEDS_NOTHING = ("check", "import", "export", "probe", "steer", "analyse", "doctor", "record", "verify", "ablate")


def wordwise(rng: random.Random, _: bytes) -> bytes:
    words = [rng.choice(NEEDS_NOTHING), *rng.choices(WORDS, k=rng.randrange(7))]
    return json.dumps([*words, *(("--model", "nowhere/at/all") if words[0] in ("record",) else ())]).encode()


def textwise(rng: random.Random, raw: bytes) -> bytes:
    pieces = (
        "<think>", "</think>", "\n\n", "\n", "Wait, ", "Alternatively, ", "...", "!", "1.", "\\boxed{", "}", "{", "3^{99}", "!!", "$", "\u3000",
        "e.g. ", "```", "<|im_end|>", "\\frac{1}{0}", "\x00", "𝔘", "\u0301", "(", "[", "\"", "10^10^10", "the answer is ", "####", "\r",
    )  # fmt: skip
    if rng.random() < 0.5:
        return bytewise(rng, raw)
    return "".join(rng.choices(pieces, k=rng.choice((3, 10, 60)))).encode() + (raw if rng.random() < 0.3 else b"")


# --- corpora


def jsonl() -> list[bytes]:
    rows = (
        {"id": "a", "prompt": "2 + 2?", "completion": "<think>\nLet me see.\n\nWait.</think>\n\n4", "answer": "4", "sample": 1, "meta": {"x": 1}},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "R"}], "group": "g"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}], "difficulty": 2},
    )  # fmt: skip
    return ["\n".join(map(json.dumps, rows)).encode()]


def dumps() -> list[bytes]:
    """Rows of each shape, and the pieces of a stream of each kind, each with a whole reply after it."""
    said = {
        "role": "assistant",
        "content": "4",
        "reasoning": "R",
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    whole = {
        "id": "c",
        "choices": [{"message": said, "finish_reason": "stop"}],
        "messages": [{"role": "user", "content": "Q"}],
    }
    parts = [
        {"type": "thinking", "thinking": "R"},
        {"type": "text", "text": "4"},
        {"type": "tool_use", "name": "f", "input": {}},
    ]
    message = {"type": "message", "role": "assistant", "content": parts}
    items = [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "R"}], "summary": []},
        {"type": "message", "content": "4"},
    ]
    step = {"type": "contentBlock", "content": [{"type": "text", "text": "R"}], "style": {"type": "thinking"}}
    output = {"text": "4", "token_ids": [2], "finish_reason": "stop"}
    groups: list[list[object]] = [
        [{"custom_id": "a", "response": {"status_code": 200, "body": whole}}, {"custom_id": "a", "body": {"messages": [said]}}],
        [{"custom_id": "a", "result": {"type": "succeeded", "message": message}}],
        [{"output": items, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "instructions": "I"}],
        [{"messages": [{"versions": [{"role": "assistant", "steps": [step]}], "currentlySelected": 0}]}],
        [{"doc_id": 1, "arguments": {"gen_args_0": {"arg_0": "Q"}}, "resps": [["R</think>4"]], "target": "4", "metrics": ["m"], "m": 1}],
        [{"input": "Q", "output": "R</think>4", "gts": "4", "score": 1}, {"text": "4", "meta_info": {"finish_reason": {"type": "stop"}}}],
        [{"request_id": "a", "prompt": "Q", "prompt_token_ids": [1], "outputs": [output]}],
        [{"object": "chat.completion.chunk", "id": "c", "choices": [{"index": i, "delta": said}]} for i in (0, 1)],
        [{"message": said, "done": False}, {"message": said, "done": True}, {"response": "4", "thinking": "R", "done": True}],
        [
            {"type": "message_start", "message": {**message, "content": []}},
            {"type": "content_block_start", "content_block": {"type": "thinking", "thinking": ""}},
            {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "R"}},
            {"type": "message_stop"},
        ],
    ]  # fmt: skip
    return ["\n".join(json.dumps(row) for row in (*group, whole)).encode() for group in groups]


def problem_files() -> list[bytes]:
    rows = (
        {"id": "a", "prompt": "2 + 2?", "answer": "4", "difficulty": 1, "meta": {}},
        {"messages": [{"role": "user", "content": "Q"}], "group": "g"},
        {"question": "Q", "answer": "so #### 4"},
        {"problem": "P", "solution": "\\boxed{4}", "level": "Level 5", "unique_id": "u"},
    )
    return ["\n".join(map(json.dumps, rows)).encode()]


def logs() -> list[bytes]:
    sample = {
        "id": "s", "epoch": 1, "input": "Q", "target": ["4"], "scores": {},
        "output": {"model": "m", "choices": [{"stop_reason": "stop", "message": {"role": "assistant", "content": [
            {"type": "reasoning", "reasoning": "R"}, {"type": "text", "text": "4"}]}}]},
    }  # fmt: skip
    members = {"header.json": b"{}", "samples/s_epoch_1.json": json.dumps(sample).encode()}
    return [packed(members, compression) for compression in COMPRESSIONS]


def anchor_folders() -> list[bytes]:
    return [
        json.dumps(
            {
                "base_solution.json": {"prompt": "P\n<think>\n", "solution": "I add. It is 4.\n</think>\n4", "is_correct": True, "answer": "4"},
                "problem.json": {"problem": "P", "gt_answer": "4"},
                "chunks_labeled.json": [
                    {"chunk": "I add.", "chunk_idx": 0, "function_tags": ["plan_generation"], "depends_on": [], "accuracy": 0.5}
                ],
                "step_importance.json": [{"source_chunk_idx": 0, "target_impacts": [{"target_chunk_idx": 0, "importance_score": 0.1}]}],
            }
        ).encode()
    ]  # fmt: skip


def saved(save: Callable[[Path], object], ending: str = "safetensors") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / f"x.{ending}")
        return (Path(folder) / f"x.{ending}").read_bytes()


def vector() -> SteeringVector:
    directions = {Site("resid_post", i): np.arange(4, dtype=np.float32) for i in (1, 2)}
    return SteeringVector(directions=directions, method="test", provenance={"model": {"architecture": "qwen3"}})


def probes() -> list[bytes]:
    probe = LinearProbe(
        coef=np.arange(4.0),
        intercept=1.0,
        site=Site("resid_post", 1),
        task="binary",
        method="m",
        model={"weights": "w"},
    )
    return [saved(probe.save)]


def results() -> list[bytes]:
    result = Result(
        method="m", quantity="q", unit="1", axes=(Axis.of("token", 3),), values=np.arange(3.0), null_missing="none"
    )
    return [saved(result.save)]


def score_files() -> list[bytes]:
    from safetensors.numpy import save

    about = {"format": "token scores", "version": 1, "name": "n", "site": "z.0", "unit": "1", "provenance": {}}
    return [save({"a": np.zeros(3, dtype=np.float32)}, metadata={"reasonscope": json.dumps(about)})]


@cache
def a_store() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        trace = trace_from_text(id="t", problem=Problem(id="p", prompt="Q"), prompt="Q", completion="<think>a</think>b")
        with TraceStore.create(folder, meta={"model": {"name": "m"}}, sites=["z.0"]) as store:
            store.append([trace], {"z.0": [np.zeros((0, 3), dtype=np.float32)]})
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def numbers_of_runs() -> list[bytes]:
    numbers = b'{"traces": {"n": 400, "[/bold]": [0.8, "\\u001b[2J"]}, "model": "organism"}'
    return [b'{"command": "reasonscope x", "seed": 0, "figures": [], "numbers": ' + numbers + b"}"]


def drawn_figures() -> list[bytes]:
    return [
        b'{"data": [{"type": "scatter", "x": [0, 1], "y": [1, 2], "name": "a"}], "layout": {"title": {"text": "t"}}}'
    ]


@cache
def a_model_folder() -> dict[str, bytes]:
    folder = locate("organism")
    return {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}


def templates() -> list[bytes]:
    return [
        b"{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}<think>",
        b"{{ messages[0].content / 0 }}",
    ]


def replies() -> list[bytes]:
    choice = {"text": "a", "token_ids": [1], "prompt_token_ids": [1], "finish_reason": "stop"}
    return [json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1}}).encode()]


def plans() -> list[bytes]:
    return [
        b'n_controls: 20\ntraces: 3\nseed: 0\nablations:\n  - {name: a, heads: ["1.0"], how: mean, scope: {on: think}}\n'
        b"  - {name: b, mlps: [1]}\n  - {name: c, layers: [1], how: resample}\n  - {name: d, tokens: {on: think, words: [Wait]}}\n"
        b"  - {name: e, edges: {readers: {on: answer}, read: {prompt_positions: [1], steps: reflection}, layers: [1]}}\n"
    ]


def texts() -> list[bytes]:
    return [
        b"<think>\nLet me add 3 and 4.\n\nWait, is it 7? Yes.\n</think>\n\nThe answer is \\boxed{7}.",
        b"7",
        b"\\frac{3}{4}",
    ]


# --- readers


def into(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def run(raw: bytes, folder: Path) -> object:
        (folder / name).write_bytes(raw)
        return read(folder / name)

    return run


def imported(read: Callable[[Path], list]) -> Callable[[Path], object]:
    """What was imported is cut, labelled and exported again, below its own folder."""

    def run(path: Path) -> None:
        traces = read(path)
        for trace in traces:
            sentences(trace)
        export_thought_anchors(traces, path.parent / "out")

    return run


def all_turns(path: Path) -> list[Trace]:
    found = import_traces(path, turn="all")
    json.dumps(found.report())
    return list(found.traces)


def anchor_folder(raw: bytes, folder: Path) -> None:
    try:
        files = json.loads(raw)
    except (ValueError, RecursionError):
        files = {"base_solution.json": raw.decode(errors="replace")}
    for name, value in files.items() if isinstance(files, dict) else ():
        if name.endswith(".json") and "/" not in name and "\x00" not in name and len(name) < 200:
            (folder / name).write_bytes(json.dumps(value).encode())
    for trace in import_thought_anchors(folder):
        published_sentences(trace)


def a_damaged_store(raw: bytes, folder: Path) -> None:
    for name, content in a_store().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / NAME).write_bytes(raw)
    check_store(folder)
    store = TraceStore.open(folder)
    list(store)
    for id in store.ids:
        for site in store.sites:
            store.activations(id, site)


def read_text(raw: bytes, _: Path) -> None:
    text = raw.decode("utf-8", errors="replace")
    trace = trace_from_text(id="t", problem=Problem(id="p", prompt="Q", answer="7"), prompt="Q", completion=text)
    assert trace.text[: trace.chars.prompt.stop] + trace.text[trace.chars.prompt.stop :] == trace.text
    classify_step(text)
    for splitter in ("default", "thought_anchors"):
        found = sentences(trace) if splitter == "default" else sentences(trace, splitter="thought_anchors")
        assert all(trace.text[s.chars.slice] == s.text for s in found)
    label_sentences([text])
    equivalent(extract_answer(text), "7")


def read_tokens(raw: bytes, _: Path) -> None:
    tokenizer = organism().tokenizer_backend
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    ids = [int.from_bytes(raw[i : i + 2], "big") % (size + 3) for i in range(0, min(len(raw), 400), 2)]
    text, offsets = decode_with_offsets(ids, tokenizer)
    assert len(offsets) == len(ids) and (not len(ids) or offsets[-1, 1] == len(text))
    again = tokenizer.encode(text, add_special_tokens=False).ids
    assert decode_with_offsets(again, tokenizer)[0] == text


def read_words(raw: bytes, _: Path) -> None:
    text = raw.decode("utf-8", errors="replace")
    for read in (Site.parse, lambda name: expand_sites(name, 4)):
        with suppress(ReasonscopeError):
            read(text)


def shown_numbers(raw: bytes, folder: Path) -> None:
    path = folder / "numbers.json"
    path.write_bytes(raw)
    if isinstance(numbers := read_numbers(path)["numbers"], dict):
        Console(file=io.StringIO()).print(table(numbers))


def model_folder(raw: bytes, folder: Path) -> None:
    for name, content in a_model_folder().items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_bytes(raw)
    load_prompting(str(folder))


def chat(raw: bytes, _: Path) -> None:
    prompting = asking()
    prompting.tokenizer.chat_template = raw.decode("utf-8", errors="replace")
    prompting.encode_prompt(Problem(id="p", messages=(Message(role="user", content="Q"),)))


def reply(raw: bytes, _: Path) -> None:
    server = ServerWriter(url="http://nowhere", model="m", tokenizer=asking().tokenizer_backend, stop=2)
    found = parse_json(raw, "reply")
    if isinstance(found, dict):
        server._checked([1], found)


@cache
def asking() -> Prompting:
    return load_prompting("organism")


def command_line(raw: bytes, folder: Path) -> None:
    try:
        words = json.loads(raw)
    except ValueError:
        words = [raw.decode(errors="replace")]
    (folder / "run").mkdir()
    (folder / "file.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    before, arguments, stdin = Path.cwd(), sys.argv, sys.stdin
    os.chdir(folder)
    sys.argv, sys.stdin = ["reasonscope", *(str(word) for word in words)], io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(SystemExit):
            cli.main()
    finally:
        sys.argv, sys.stdin = arguments, stdin
        os.chdir(before)


@cache
def organism() -> Model:
    return load_model("organism")


TARGETS = (
    Target(name="JSONL of completions", corpus=jsonl, mutate=linewise, read=into("x.jsonl", imported(import_jsonl))),
    Target(name="dumps", corpus=dumps, mutate=linewise, read=into("x.jsonl", imported(all_turns))),
    Target(name="problem files", corpus=problem_files, mutate=linewise, read=into("x.jsonl", load_problems)),
    Target(name="Inspect logs", corpus=logs, mutate=archivewise, read=into("x.eval", imported(import_inspect))),
    Target(name="Thought Anchors folders", corpus=anchor_folders, mutate=jsonwise, read=anchor_folder),
    Target(name="parser, segmenters, labels, answers", corpus=texts, mutate=textwise, read=read_text),
    Target(name="aligner", corpus=lambda: [bytes(range(1, 100))], mutate=bytewise, read=read_tokens),
    Target(name="site names", corpus=lambda: [b"resid_post.12", b"blocks.1.hook_out", b"z.2-4,attn_out.0"], mutate=bytewise, read=read_words),
    Target(name="steering vectors", corpus=lambda: [saved(vector().save)], mutate=headerwise, read=into("x.safetensors", SteeringVector.load)),
    Target(name="GGUF control vectors", corpus=lambda: [saved(vector().save, "gguf")], mutate=bytewise, read=into("x.gguf", SteeringVector.load)),
    Target(name="probes", corpus=probes, mutate=headerwise, read=into("x.safetensors", LinearProbe.load)),
    Target(name="results", corpus=results, mutate=headerwise, read=into("x.safetensors", Result.load)),
    Target(name="token scores", corpus=score_files, mutate=headerwise, read=into("x.safetensors", read_scores)),
    Target(name="stores", corpus=lambda: [a_store()[NAME]], mutate=manifestwise, read=a_damaged_store, share=0.5),
    Target(name="ablation plans", corpus=plans, mutate=yamlwise, read=into("x.yaml", lambda path: read_plan(path, organism())), share=0.3),
    Target(name="shown numbers", corpus=numbers_of_runs, mutate=jsonwise, read=shown_numbers),
    Target(name="figures", corpus=drawn_figures, mutate=jsonwise, read=into("x.json", read_figure), share=0.3),
    Target(name="configurations of models", corpus=lambda: [a_model_folder()["config.json"]], mutate=jsonwise, read=model_folder, share=0.1),
    Target(name="chat templates", corpus=templates, mutate=bytewise, read=chat, share=0.3),
    Target(name="replies of servers", corpus=replies, mutate=jsonwise, read=reply),
    Target(name="command line", corpus=lambda: [b"[]"], mutate=wordwise, read=command_line, share=0.05),
)  # fmt: skip


# --- the run


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What went wrong on `input`."""

    target: str
    what: str
    input: bytes


def tried(target: Target, raw: bytes, *, seconds: int = 10) -> Finding | None:
    """Read one input in a folder of its own, with a limit of time, and look around afterwards."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name) / "run"
        folder.mkdir()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: other work on the machine is no hang
        signal.alarm(20 * seconds)
        try:
            target.read(raw, folder)
        except ReasonscopeError:
            pass
        except BaseException:  # noqa: BLE001 - whatever else comes out is what is looked for
            return Finding(target=target.name, what=traceback.format_exc(limit=-3), input=raw)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        if [path for path in Path(name).iterdir() if path != folder]:
            return Finding(target=target.name, what="wrote outside of its folder", input=raw)
    return None


def timed_out(*_: object) -> None:
    raise TimeoutError("it hangs")


def fuzz(target: Target, inputs: int, seed: int) -> list[Finding]:
    """`inputs` mutations of the corpus; one finding of each kind."""
    signal.signal(signal.SIGALRM, timed_out)
    signal.signal(signal.SIGPROF, timed_out)
    rng, corpus, found = random.Random(f"{target.name} {seed}"), target.corpus(), {}
    for _ in range(inputs):
        finding = tried(target, target.mutate(rng, rng.choice(corpus)))
        if finding is not None:
            found.setdefault(finding.what.splitlines()[-1][:80], finding)
    return list(found.values())


def fuzz_by_coverage(target: Target, inputs: int) -> None:
    """The same by atheris, which ends the process with the traceback of the first finding."""
    import atheris

    signal.signal(signal.SIGALRM, timed_out)
    signal.signal(signal.SIGPROF, timed_out)
    rng = random.Random(0)
    corpus = target.corpus()

    def one(raw: bytes) -> None:
        finding = tried(target, raw)
        if finding is not None:
            raise AssertionError(finding.what)

    def mutated(raw: bytes, largest: int, seed: int) -> bytes:
        rng.seed(seed)
        try:
            return target.mutate(rng, raw or rng.choice(corpus))[:largest]
        except _NO_FORMAT:  # what libFuzzer made of the bytes: begin anew with one of the corpus
            return target.mutate(rng, rng.choice(corpus))[:largest]

    for function in [one for one in gc.get_objects() if isinstance(one, FunctionType)]:
        if str(function.__module__).startswith("reasonscope."):
            atheris.instrument_func(function)
    atheris.Setup(
        [sys.argv[0], f"-atheris_runs={inputs}", "-max_len=65536", "-timeout=20"], one, custom_mutator=mutated
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--atheris", action="store_true")
    given = parser.parse_args()
    chosen = [target for target in TARGETS if given.only in target.name]
    if given.atheris:
        fuzz_by_coverage(chosen[0], given.inputs)
        return 0
    total, status = sum(target.share for target in chosen), 0
    for target in chosen:
        n, began = math.ceil(given.inputs * target.share / total), time.monotonic()
        found = fuzz(target, n, given.seed)
        sys.stdout.write(f"{target.name}: {n} inputs, {len(found)} findings, {time.monotonic() - began:.0f} s\n")
        for finding in found:
            status = 1
            sys.stdout.write(f"  {finding.what.strip()}\n  input: {finding.input[:600]!r}\n")
        sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
