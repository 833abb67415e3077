"""What was measured on a run: results and numbers, which of them are damaged, and the command for what is missing."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.opened_run import OpenRun
from reasonscope.analysis.runs.questions import QUESTIONS
from reasonscope.analysis.runs.saved_numbers import read_numbers
from reasonscope.data.errors import InputError


def trace_results(run: OpenRun, id: str) -> list[Result]:
    """The results of all analyses on the trace `id`; a damaged file is left out here and named in `damaged`."""
    paths = sorted(run.where.analyses.glob(f"*/{quote(id, safe=' ')}.safetensors"))
    return [result for path in paths if isinstance(result := _result(path, stamp(path)), Result)]


def results(run: OpenRun, method: str) -> dict[str, Result]:
    """The results of a method by trace id (`all` for those on the whole run)."""
    found = {unquote(path.stem): _result(path, stamp(path)) for path in sorted(_folder(run, method))}
    return {name: result for name, result in found.items() if isinstance(result, Result)}


def methods(run: OpenRun) -> list[str]:
    """The methods that have results."""
    return sorted(folder.name for folder in run.where.analyses.glob("*") if folder.is_dir())


def damaged(run: OpenRun, method: str = "*") -> list[str]:
    """What is wrong with the results of a method, in sentences."""
    read = (_result(path, stamp(path)) for path in sorted(_folder(run, method)))
    return [problem for problem in read if isinstance(problem, str)]


def numbers(run: OpenRun, name: str) -> Mapping[str, Any] | None:
    """What `reasonscope probe NAME` or the demo saved; None if nothing was. Raises InputError if it is damaged."""
    path = run.where.numbers / f"{name}.json"
    return read_numbers(path) if path.exists() else None


def fitted_labels(run: OpenRun) -> list[str]:
    """The names of the probes of labels that `reasonscope probe fit` saved."""
    paths = sorted(run.where.numbers.glob("*.json"))
    return [path.stem for path in paths if str(read_numbers(path)["command"]).startswith("reasonscope probe fit ")]


@dataclass(frozen=True, kw_only=True)
class _RunMeasurement:
    """Something that can be measured on a run: how many results there are, and the command that makes them."""

    name: str
    title: str
    there: int
    command: str


# What a result needs besides the name of its analysis.
_MORE = {"cliff": " --ablate"}
# What is measured, by its files below the folder of results, and the command that measures it.
_COMMANDS = {
    "numbers/length.json": ("length probe", "reasonscope probe length --run {run}"),
    "numbers/refusal.json": ("refusal probe and cliff", "reasonscope probe refusal --run {run}"),
    "numbers/correctness.json": ("correctness probe", "reasonscope probe correctness --run {run}"),
    "scores/*.safetensors": (
        "probe scores of every token",
        "reasonscope probe apply {results}/probes/length.safetensors --run {run}",
    ),
    "numbers/sweep.json": ("steering at each strength", "reasonscope steer sweep seal --run {run}"),
    "results/ablation/*": (
        "ablations beside their controls",
        "reasonscope ablate --heads from:analyse/heads@top10 --run {run}",
    ),
    "results/ablation_answers/*": (
        "what the ablated model writes",
        "reasonscope ablate --heads from:analyse/heads@top10 --problems 8 --run {run}",
    ),
    "results/patching/*": ("activation patching", "reasonscope ablate plan.yaml --run {run}"),
    "numbers/steering.json": ("steering beside its controls", "reasonscope demo --out {run}"),
    **{
        f"results/{method}/*": (
            title,
            f"reasonscope analyse {name.replace('_', '-')}{_MORE.get(method, '')} --run {{run}}",
        )
        for name, question in QUESTIONS.items()
        for method, title in question.writes.items()
    },
}


def command_for(run: OpenRun, name: str) -> str:
    """The command for a key of the table of measurements."""
    return _COMMANDS[name][1].format(run=shlex.quote(str(run.path)), results=shlex.quote(str(run.where.results)))


def command_of(run: OpenRun, method: str) -> str:
    """The command that makes the results of a method."""
    name = f"results/{method}/*"
    return (
        command_for(run, name)
        if name in _COMMANDS
        else f"reasonscope analyse {method.replace('_', '-')} --run {shlex.quote(str(run.path))}"
    )


def run_measurements(run: OpenRun) -> list[_RunMeasurement]:
    """What can be measured on a run and whether it was; results of other methods come last."""
    found = [
        _RunMeasurement(
            name=name, title=title, there=len(list(run.where.results.glob(name))), command=command_for(run, name)
        )
        for name, (title, _) in _COMMANDS.items()
    ]
    for folder in sorted(folder for folder in run.where.analyses.glob("*") if folder.is_dir()):
        if f"results/{folder.name}/*" not in _COMMANDS:
            n = len(list(folder.glob("*.safetensors")))
            found.append(_RunMeasurement(name=folder.name, title=folder.name.replace("_", " "), there=n, command=""))
    return found


@lru_cache(maxsize=256)
def _result(path: Path, mtime: int) -> Result | str:
    """A result, or the reason why it cannot be read."""
    try:
        return Result.load(path)
    except InputError as error:
        return str(error)


def _folder(run: OpenRun, method: str) -> Iterator[Path]:
    return run.where.analyses.glob(f"{method}/*.safetensors")


def stamp(path: Path) -> int:
    """When a file was last written; what was read from it is cached until it changes."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
