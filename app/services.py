"""What the pages read: runs, traces, what colours their tokens, and what was measured on them. No model, no Streamlit.

Every answer is kept for the next rerun of a page, under the path and what the files were at the time: a run that grows is read anew.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.results import Result
from reasonscope.app.keeping import read_numbers
from reasonscope.app.places import Places, places
from reasonscope.data.behaviour import CONTROL, answer_behaviour
from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.importers import published_sentences
from reasonscope.data.manifest import NAME
from reasonscope.data.organism.reader import read_ledger
from reasonscope.data.problems import ledger_of
from reasonscope.data.segment import sentences, sentences_at
from reasonscope.data.store import TraceStore
from reasonscope.data.trace import Sentence, Span, Trace

_DEPTH = 2  # folders below the root in which runs are looked for
_MANY_RUNS = 200


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is open. `stamp` changes when a trace is added."""

    path: Path
    where: Places
    store: TraceStore
    stamp: str = field(compare=False)

    @property
    def name(self) -> str:
        return self.path.name

    def __hash__(self) -> int:
        return hash((self.path, self.stamp))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and (self.path, self.stamp) == (other.path, other.stamp)


def confined(root: Path, name: str) -> Path:
    """The folder `name` below `root`. Raises InputError where it leads elsewhere: by `..`, as an absolute path or by a link."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InputError(f"run {name!r} lies outside of {root}; start the app with --root for another folder of runs")
    return path


def find_runs(root: Path) -> list[str]:
    """The runs below `root`, as paths from there; a link that leads out is not followed."""
    found = []
    for pattern in ("/".join(["*"] * depth) for depth in range(1, _DEPTH + 1)):
        for folder in sorted(root.glob(pattern)):
            name = folder.relative_to(root).as_posix()
            if folder.name != "store" and _is_run(folder) and folder.resolve().is_relative_to(root.resolve()):
                found.append(name)
    return found[:_MANY_RUNS]


def open_run(path: Path) -> Run:
    """The run in `path`. Raises StoreError where there is none, or it is damaged."""
    where = places(path)
    try:
        stamp = sha256((where.store / NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise StoreError(
            f"{path} holds no run ({error.strerror}); record one: reasonscope record --out {path}"
        ) from error
    return _open(path, stamp)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trace in the table. `outcome` is right, wrong, refused, complied or unclear; `kind` what was asked."""

    id: str
    kind: str
    difficulty: float | None
    outcome: str
    thinking_tokens: int
    state: str
    answer: str
    question: str


@lru_cache(maxsize=8)
def rows(run: Run) -> tuple[Row, ...]:
    """Every trace of the run, in the order in which they were stored."""
    import json

    columns = ["id", "difficulty", "gold", "correct", "state", "final_answer", "text", "chars", "tokens", "problem"]
    found = []
    for row in run.store.table().select(columns).to_pylist():
        problem = json.loads(row["problem"])
        text, chars = row["text"], row["chars"]
        answer = text[slice(*chars["answer"])]
        thinking = row["tokens"]["thinking"]
        found.append(
            Row(
                id=row["id"],
                kind=_kind(problem),
                difficulty=row["difficulty"],
                outcome=_outcome(row["correct"], answer, row["state"]),
                thinking_tokens=thinking[1] - thinking[0],
                state=row["state"],
                answer=(row["final_answer"] or CONTROL.sub(" ", answer).strip())[:80],
                question=_question(problem)[:160],
            )
        )
    return tuple(found)


@lru_cache(maxsize=4)
def all_traces(run: Run) -> tuple[Trace, ...]:
    return tuple(run.store)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A trace as it is read: its sentences, and the step (a paragraph) that each belongs to.

    `labels` says whose the sentences are: published, of the grammar (whose truth `depends_on` is, by sentence), or ours.
    """

    trace: Trace
    sentences: tuple[Sentence, ...]
    steps: tuple[int, ...]
    labels: str
    depends_on: tuple[tuple[int, ...], ...] | None = None


@lru_cache(maxsize=32)
def reading(run: Run, id: str) -> Reading:
    """The trace `id` of the run, cut as the analyses cut it: published sentences, those of the organism's grammar, or our own.

    Raises InputError for an unknown id.
    """
    trace = run.store.trace(id)
    depends_on = None
    if cut := published_sentences(trace) if "chunks" in trace.meta else []:
        labels = "published"
    elif "ledger" in trace.problem.meta:
        truth = read_ledger(ledger_of(trace.problem), trace.thinking)
        base = trace.chars.thinking.start
        spans = [Span(base + one.chars.start, base + one.chars.stop) for one in truth]
        cut, labels = sentences_at(trace, spans, [one.tag or "unknown" for one in truth]), "the grammar's"
        depends_on = tuple(tuple(one.depends_on) for one in truth)
    else:
        cut, labels = sentences(trace), "our"
    step, steps = 0, []
    for before, after in zip([None, *cut], cut, strict=False):
        if before is not None and "\n\n" in trace.text[before.chars.stop : after.chars.start]:
            step += 1
        steps.append(step)
    return Reading(trace=trace, sentences=tuple(cut), steps=tuple(steps), labels=labels, depends_on=depends_on)


@dataclass(frozen=True, kw_only=True)
class Colouring:
    """A value for every token (`per` "token") or sentence of a trace, NaN where there is none.

    `low`, `high` are the ends of the scale. `null` is the band of chance (2, …), `marks` the places that stand out.
    """

    name: str
    title: str
    unit: str
    per: str
    values: NDArray[np.float64]
    low: float
    high: float
    about: str
    null: NDArray[np.float64] | None = None
    marks: tuple[int, ...] = ()


def colouring_names(run: Run, id: str) -> dict[str, str]:
    """What the trace `id` can be coloured by: name, and title."""
    trace = reading(run, id).trace
    names = {"kind": "kind of sentence"}
    if trace.entropies is not None:
        names["entropy"] = "entropy of the next token"
    if trace.logprobs is not None:
        names["surprise"] = "surprise (−log probability)"
    names |= {f"score:{path.stem}": f"probe: {path.stem}" for path in sorted(run.where.scores.glob("*.safetensors"))}
    for result in trace_results(run, id):
        names |= {name: title for name, title, _ in _slices(result)}
    return names


def colouring(run: Run, id: str, name: str) -> Colouring | None:
    """The values behind a name of `colouring_names`; None for `kind` and for a name that the trace does not have."""
    trace = reading(run, id).trace
    kind, _, which = name.partition(":")
    if name in ("entropy", "surprise"):
        measured = trace.entropies if name == "entropy" else None if trace.logprobs is None else -trace.logprobs
        if measured is None:
            return None
        values = np.full(len(trace.token_ids), np.nan)
        values[trace.n_prompt_tokens :] = measured
        temperature = trace.sampling.temperature if trace.sampling else "unknown"
        about = f"at the generating temperature, {temperature}; n = {np.isfinite(values).sum()} tokens"
        return _coloured(name, colouring_names(run, id)[name], "nats", "token", values, about, low=0.0)
    if kind == "score":
        path = run.where.scores / f"{Path(which).name}.safetensors"
        return _score(trace, path, _mtime(path)) if path.exists() else None
    for result in trace_results(run, id):
        for found, title, index in _slices(result):
            if found == name:
                return _of_result(result, index, name, title, reading(run, id))
    return None


def trace_results(run: Run, id: str) -> list[Result]:
    """The results of all analyses on the trace `id`; a damaged file is left out here and named in `damaged`."""
    paths = sorted(run.where.analyses.glob(f"*/{quote(id, safe=' ')}.safetensors"))
    return [result for path in paths if isinstance(result := _result(path, _mtime(path)), Result)]


def results(run: Run, method: str) -> dict[str, Result]:
    """The results of a method by trace id (`all` for those on the whole run)."""
    from urllib.parse import unquote

    found = {unquote(path.stem): _result(path, _mtime(path)) for path in sorted(_folder(run, method))}
    return {name: result for name, result in found.items() if isinstance(result, Result)}


def damaged(run: Run, method: str = "*") -> list[str]:
    """What is wrong with the results of a method, in sentences."""
    read = (_result(path, _mtime(path)) for path in sorted(_folder(run, method)))
    return [problem for problem in read if isinstance(problem, str)]


def numbers(run: Run, name: str) -> Mapping[str, Any] | None:
    """What `reasonscope probe NAME` or the demo kept; None where nothing was. Raises InputError where it is damaged."""
    path = run.where.numbers / f"{name}.json"
    return read_numbers(path) if path.exists() else None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Something that can be measured on a run: how much of it is there, and the line that makes it."""

    name: str
    title: str
    there: int
    command: str


# Below the folder of results: what is measured, and the line that measures it. A folder of results is named by its method.
_COMMANDS = {
    "numbers/length.json": ("length probe", "reasonscope probe length --run {run}"),
    "numbers/refusal.json": ("refusal probe and cliff", "reasonscope probe refusal --run {run}"),
    "numbers/correctness.json": ("correctness probe", "reasonscope probe correctness --run {run}"),
    "scores/*.safetensors": (
        "probe scores of every token",
        "reasonscope probe apply {results}/probes/length.safetensors --run {run}",
    ),
    "numbers/sweep.json": ("steering at each strength", "reasonscope steer sweep seal --run {run}"),
    "numbers/steering.json": ("steering beside its controls", "reasonscope demo --out {run}"),
    "results/mi_peaks/*": ("MI peaks", "reasonscope analyse mi --run {run}"),
    "results/anchors/*": ("thought anchors", "reasonscope analyse anchors --run {run}"),
    "results/suppression/*": ("suppression of sentences", "reasonscope analyse suppression --run {run}"),
    "results/receivers/*": ("receiver heads", "reasonscope analyse receivers --run {run}"),
    "results/probe_write/*": ("heads that write refusal", "reasonscope analyse cliff --run {run}"),
    "results/heads/*": ("attention heads", "reasonscope analyse heads --run {run}"),
    "results/entropy/*": ("entropies and forking tokens", "reasonscope analyse entropy --run {run}"),
    "results/confidence/*": ("confidence along the thinking", "reasonscope analyse confidence --run {run}"),
    "results/trajectory/*": ("latent trajectory", "reasonscope analyse trajectory --run {run}"),
    "results/reflection/*": ("reflection", "reasonscope analyse reflection --run {run}"),
}


def command(run: Run, name: str) -> str:
    """The line that makes what lies under a key of the table of analyses."""
    return _COMMANDS[name][1].format(run=run.path, results=run.where.results)


def analyses(run: Run) -> list[Analysis]:
    """What can be measured on a run and whether it was; results of other methods that lie there come last."""
    found = [
        Analysis(name=name, title=title, there=len(list(run.where.results.glob(name))), command=command(run, name))
        for name, (title, _) in _COMMANDS.items()
    ]
    for folder in sorted(folder for folder in run.where.analyses.glob("*") if folder.is_dir()):
        if f"results/{folder.name}/*" not in _COMMANDS:
            n = len(list(folder.glob("*.safetensors")))
            found.append(Analysis(name=folder.name, title=folder.name.replace("_", " "), there=n, command=""))
    return found


def _is_run(folder: Path) -> bool:
    return (folder / NAME).is_file() or (folder / "store" / NAME).is_file()


@lru_cache(maxsize=16)
def _open(path: Path, stamp: str) -> Run:
    where = places(path)
    return Run(path=path, where=where, store=TraceStore.open(where.store), stamp=stamp)


@lru_cache(maxsize=256)
def _result(path: Path, mtime: int) -> Result | str:
    """A result, or why it cannot be read."""
    try:
        return Result.load(path)
    except InputError as error:
        return str(error)


@lru_cache(maxsize=64)
def _score(trace: Trace, path: Path, mtime: int) -> Colouring | None:
    from reasonscope.probes.scores import read_scores

    found = read_scores(path, [trace.id])
    values = np.full(len(trace.token_ids), np.nan)
    scored = found.scores[trace.id]
    values[: len(scored)] = scored
    unit = str(found.about.get("unit", ""))
    about = f"probe at {found.about.get('site')}; n = {len(scored)} tokens; the last token is never fed back"
    title = f"probe: {path.stem}"
    low, high = (0.0, 1.0) if unit == "probability" else (None, None)
    return _coloured(f"score:{path.stem}", title, unit, "token", values, about, low=low, high=high)


def _slices(result: Result) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, title and index of each line over tokens or sentences that a result holds, up to a dozen."""
    last = result.axes[-1] if result.axes else None
    if last is None or last.name not in ("token", "sentence") or not result.measured:
        return
    if any(axis.name in ("token", "sentence", "source", "target") for axis in result.axes[:-1]):
        return
    shape = tuple(len(axis) for axis in result.axes[:-1])
    for index in list(np.ndindex(shape))[:12]:
        labels = [axis.labels[i] for axis, i in zip(result.axes, index, strict=False)]
        name = ":".join(["result", result.method, *labels])
        yield name, " · ".join([result.method.replace("_", " "), *labels]), index


def _of_result(result: Result, index: tuple[int, ...], name: str, title: str, read: Reading) -> Colouring | None:
    """One line of a result, spread over the tokens or sentences of the trace by the labels of its axis."""
    axis = result.axes[-1]
    n = len(read.trace.token_ids) if axis.name == "token" else len(read.sentences)
    where = [int(label) if label.isdigit() else -1 for label in axis.labels]
    if not where or min(where) < 0 or max(where) >= n:
        return None
    values = np.full(n, np.nan)
    values[where] = result.values[index]
    band = None
    if result.null is not None:
        band = np.full((2, n), np.nan)
        band[0, where], band[1, where] = result.null.low[index], result.null.high[index]
    marks: tuple[int, ...] = ()
    if "peaks" in result.arrays and result.arrays["peaks"].shape == result.values.shape:
        marks = tuple(int(where[i]) for i in np.flatnonzero(result.arrays["peaks"][index]))
    chance = result.null.what if result.null else result.null_missing or result.reason
    seed = result.provenance.get("seed", "–")
    about = f"{result.quantity}; chance: {chance}; seed {seed}; n = {np.isfinite(values).sum()}"
    return _coloured(name, title, result.unit, axis.name, values, about, null=band, marks=marks)


def _coloured(
    name: str,
    title: str,
    unit: str,
    per: str,
    values: NDArray[np.float64],
    about: str,
    *,
    low: float | None = None,
    high: float | None = None,
    null: NDArray[np.float64] | None = None,
    marks: tuple[int, ...] = (),
) -> Colouring:
    """The scale runs from the 2nd to the 98th percentile where its ends are not given: one odd token would wash out the rest."""
    known = values[np.isfinite(values)]
    ends = np.quantile(known, [0.02, 0.98]) if len(known) else np.array([0.0, 1.0])
    bottom, top = float(ends[0] if low is None else low), float(ends[1] if high is None else high)
    return Colouring(
        name=name,
        title=title,
        unit=unit,
        per=per,
        values=values,
        low=bottom,
        high=top if top > bottom else bottom + 1.0,
        about=about,
        null=null,
        marks=marks,
    )


def _folder(run: Run, method: str) -> Iterator[Path]:
    return run.where.analyses.glob(f"{method}/*.safetensors")


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _kind(problem: Mapping[str, Any]) -> str:
    meta = problem.get("meta") or {}
    if "harmful" not in meta:
        return "problem"
    return "benign request" if not meta["harmful"] else "jailbreak" if meta.get("jailbreak") else "harmful request"


def _outcome(correct: bool | None, answer: str, state: Any) -> str:
    if correct is not None:
        return "right" if correct else "wrong"
    return answer_behaviour(answer, state)


def _question(problem: Mapping[str, Any]) -> str:
    messages = problem.get("messages") or ()
    return str(messages[-1]["content"] if messages else problem.get("prompt") or "")
