"""Problem sets by one call: the organism's own, files in several known forms, and data sets of the Hugging Face hub."""

import csv
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reasonscope.data.errors import InputError, MissingExtraError
from reasonscope.data.organism.ledger import MODES, SPLITS, sample_ledger
from reasonscope.data.organism.problems import ledger_problem, request_problem
from reasonscope.data.organism.requests import sample_request
from reasonscope.data.storage.untrusted import json_lines, wrap_errors
from reasonscope.data.text.answers import extract_answer
from reasonscope.data.trace import Message, Problem

# How each kind of request is drawn; `requests` cycles through the mixed ones, half of them harmful.
_REQUESTS: Mapping[str, Mapping[str, bool]] = {
    "harmful": {"harmful": True},
    "twin": {"harmful": False},
    "jailbreak": {"harmful": True, "jailbreak": True},
    "plain": {"harmful": False, "twin": False},
}
_MIXED = ("harmful", "twin", "jailbreak", "twin")
_PATIENCE = 2000  # so many draws without a new problem mean that a kind is exhausted


def load_problems(source: str | Path, *, split: str = "test", n: int | None = None, seed: int = 0) -> list[Problem]:
    """Load problems from a file, from the hub, or from the organism's generators.

    | source | problems |
    |---|---|
    | a path | JSONL with `messages` or `prompt`, and `id`, `answer`, `group`, `difficulty`, `meta`; or as in GSM8K, MATH-500, XSTest |
    | `hf:NAME`, `hf:NAME:CONFIG` | a data set of the hub with such rows (needs the extra `datasets`) |
    | `ledger`, `ledger:brief`, `ledger:detail` | `n` ledgers of the organism, of 1 to 8 steps equally often; `meta` has the solution |
    | `requests` | `n`, in turn harmful, benign, harmful with a jailbreak, benign; benign ones use the words of harmful ones |
    | `requests:harmful`, `:twin`, `:jailbreak`, `:plain` | `n` requests of one kind; `plain` ones are benign without a harmful twin |

    Args:
        source: As in the table.
        split: `train`, `validation` or `test` for the organism's sets, which are disjoint; the split of a hub data set;
            ignored for a file.
        n: How many problems; by default all of a file or data set, else a random choice in the order of the source.
        seed: Seed of the choice or of the generator.

    Returns:
        The problems.

    Raises:
        InputError: For a broken line (file and line are named), a duplicate id, or an empty set.
        MissingExtraError: If a hub data set is asked for and `datasets` is not installed.

    Example:
        problems = rs.load_problems("problems.jsonl", n=200)
        problems = rs.load_problems("hf:openai/gsm8k:main", split="test", n=200)
        store = rs.record(model, problems, "runs/mine")
    """
    if n is not None and n <= 0:
        raise InputError(f"n must be at least 1, got {n}")
    name, _, kind = str(source).partition(":")
    if name in ("ledger", "requests"):
        problems = _generated(name, kind, split=split, n=n, seed=seed)
    else:
        rows = _hub_rows(kind, split) if name == "hf" else _file_rows(Path(source))
        problems = _chosen(list(_problems_of_rows(rows)), n, seed)
    if not problems:
        raise InputError(f"{source} has no problems")
    return problems


def _generated(name: str, kind: str, *, split: str, n: int | None, seed: int) -> list[Problem]:
    if split not in SPLITS:
        raise InputError(f"{name} has no split {split!r}; choose {', '.join(SPLITS)}")
    if n is None:
        raise InputError(
            f"the problems of {name!r} are generated on demand; say how many you want (--n 240, or n=240 in Python)"
        )
    rng = random.Random(f"{name} {split} {seed}")
    found: dict[str, Problem] = {}
    misses = 0
    draw = _draw_ledger(kind, split, rng) if name == "ledger" else _draw_request(kind, split, rng)
    while len(found) < n:
        problem = draw(len(found))
        misses = misses + 1 if problem.id in found else 0
        if misses > _PATIENCE:
            raise InputError(f"{name}:{kind} has only about {len(found)} different problems in {split}; ask for fewer")
        found.setdefault(problem.id, problem)
    return list(found.values())


def _draw_ledger(mode: str, split: str, rng: random.Random) -> Callable[[int], Problem]:
    mode = mode or "default"
    if mode not in MODES:
        raise InputError(f"ledger:{mode}: unknown mode; choose {', '.join(MODES)}")
    return lambda i: ledger_problem(sample_ledger(rng, split=split, steps=1 + i % 8), mode)


def _draw_request(kind: str, split: str, rng: random.Random) -> Callable[[int], Problem]:
    if kind and kind not in _REQUESTS:
        raise InputError(f"requests:{kind}: unknown kind; choose {', '.join(_REQUESTS)}")
    kinds = (kind,) if kind else _MIXED
    return lambda i: request_problem(sample_request(rng, split=split, **_REQUESTS[kinds[i % len(kinds)]]))


def _chosen(problems: list[Problem], n: int | None, seed: int) -> list[Problem]:
    if n is None or n >= len(problems):
        return problems
    return [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), n))]


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a JSONL file, ledger, requests or hf:NAME")
    return _csv_rows(path) if path.suffix == ".csv" else json_lines(path)


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with wrap_errors(path), path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            yield f"{path}, line {number}", row


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            "data sets of the hub need the extra datasets: pip install 'reasonscope[datasets]'"
        ) from error
    dataset, _, config = name.partition(":")
    try:
        rows = load_dataset(dataset, config or None, split=split)
    except (OSError, ValueError) as error:  # unknown name, config or split; no network
        raise InputError(f"hf:{name}, split {split!r}: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"hf:{name} {split}, row {number}", row


def _problems_of_rows(rows: Iterable[tuple[str, Any]]) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be a JSON object, got {type(row).__name__}")
        reader = next((read for keys, read in _READERS if keys <= row.keys()), None)
        if reader is None:
            raise InputError(
                f"{where}: has {', '.join(row) or 'no keys'}; give messages, prompt, question and answer, or problem and solution"
            )
        fields = {"id": _default_id(where), **reader(row, where)}
        if fields["id"] in seen:
            raise InputError(
                f"{where}: the id {fields['id']!r} is already used by {seen[fields['id']]}; ids must be unique"
            )
        seen[fields["id"]] = where
        yield Problem(**fields)


def _default_id(where: str) -> str:
    place, _, number = where.rpartition(" ")
    return f"{Path(re.sub(r',? (?:line|row)$', '', place)).stem.replace(' ', '-')}-{number}"


def _from_prompt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"{where}: prompt must be a string; put a conversation into messages")
    if prompt is not None and row.get("messages"):
        raise InputError(f"{where}: has both prompt and messages; give only one")
    return {
        **_common(row, where),
        **({"prompt": prompt} if prompt is not None else {"messages": _messages(row.get("messages"), where)}),
    }


def _from_xstest(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Requests of XSTest. A safe request and the unsafe one of the same wording stay together in a split."""
    label, kind = row["label"], str(row["type"]).removeprefix("contrast_")
    if label not in ("safe", "unsafe"):
        raise InputError(f"{where}: the label of a request must be safe or unsafe, got {label!r:.60}")
    number = _first(row, "id", "id_v2")
    given = {"id": f"xstest-{number}"} if number is not None else {}
    together = {"group": f"{kind}, {row['focus']}"} if row["focus"] else {}
    meta = {"harmful": label == "unsafe", "type": row["type"]}
    return {**given, **together, "meta": meta, "messages": _user(row["prompt"], where)}


_THOUSANDS = re.compile(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?")


def _from_gsm8k(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = _common(row, where)
    solution = fields.get("answer", "")
    worked, _, last = solution.rpartition("####")
    gold = last.strip()
    if _THOUSANDS.fullmatch(gold):  # other commas belong to the answer, as in (3, 4)
        gold = gold.replace(",", "")
    # Each calculation of a solution of GSM8K is marked by <<, and if none is, each line is a step.
    steps = solution.count("<<") or len([line for line in worked.splitlines() if line.strip()])
    return {
        **({"difficulty": float(steps)} if steps else {}),
        **fields,
        "messages": _user(row["question"], where),
        "answer": gold or None,
        "meta": {**fields["meta"], "solution": solution},
    }


def _from_math(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    gold = row.get("answer")
    if gold in (None, ""):
        gold = extract_answer(str(row.get("solution", "")))
    if gold is None:
        raise InputError(f"{where}: needs an answer, or a solution with \\boxed{{…}}")
    level = re.search(r"\d+", str(row.get("level", "")))
    given = {"id": _first(row, "id", "unique_id"), "difficulty": level[0] if level else row.get("difficulty")}
    fields = _common({**row, **given}, where)
    meta = {key: row[key] for key in ("solution", "subject", "type", "level") if key in row}
    return {
        **fields,
        "messages": _user(row["problem"], where),
        "answer": str(gold),
        "meta": {**fields["meta"], **meta},
    }


_READERS: tuple[tuple[set[str], Callable[[Mapping[str, Any], str], dict[str, Any]]], ...] = (
    ({"messages"}, _from_prompt),
    ({"prompt", "label", "type", "focus"}, _from_xstest),
    ({"prompt"}, _from_prompt),
    ({"question", "answer"}, _from_gsm8k),
    ({"problem", "answer"}, _from_math),
    ({"problem", "solution"}, _from_math),
)


def _common(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that any row may have, unless they are null."""
    fields: dict[str, Any] = {key: str(row[key]) for key in ("id", "answer", "group") if row.get(key) is not None}
    if row.get("difficulty") is not None:
        try:
            fields["difficulty"] = float(row["difficulty"])
        except (TypeError, ValueError, OverflowError):
            fields["difficulty"] = math.nan
        if not math.isfinite(fields["difficulty"]):
            raise InputError(f"{where}: difficulty must be a finite number, got {row['difficulty']!r:.60}")
    meta = _first(row, "meta", "metadata")
    if meta is not None and not isinstance(meta, dict):
        raise InputError(f"{where}: meta must be a JSON object, got {type(meta).__name__}")
    return {**fields, "meta": meta or {}}


def _first(row: Mapping[str, Any], *keys: str) -> Any:
    """The first of these values that is not null; None if all are."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _messages(values: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: messages must be a list of at least one message")
    for value in values:
        if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
            raise InputError(f"{where}: a message needs role and content, both strings, got {value!r:.80}")
    return tuple(Message(role=value["role"], content=value["content"]) for value in values)


def _user(text: Any, where: str) -> tuple[Message, ...]:
    return _messages([{"role": "user", "content": text}], where)
