"""What was measured on a run: results and numbers, what is damaged among them, and the line that makes what is not there."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from reasonscope.analysis.results import Result
from reasonscope.analysis.runs.open_run import OpenRun
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
    """The methods of which there are results."""
    return sorted(folder.name for folder in run.where.analyses.glob("*") if folder.is_dir())


def damaged(run: OpenRun, method: str = "*") -> list[str]:
    """What is wrong with the results of a method, in sentences."""
    read = (_result(path, stamp(path)) for path in sorted(_folder(run, method)))
    return [problem for problem in read if isinstance(problem, str)]


def numbers(run: OpenRun, name: str) -> Mapping[str, Any] | None:
    """What `reasonscope probe NAME` or the demo kept; None where nothing was. Raises InputError where it is damaged."""
    path = run.where.numbers / f"{name}.json"
    return read_numbers(path) if path.exists() else None


@dataclass(frozen=True, kw_only=True)
class RunMeasurement:
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
    "results/mi/*": ("MI peaks", "reasonscope analyse mi --run {run}"),
    "results/anchors/*": ("thought anchors", "reasonscope analyse anchors --run {run}"),
    "results/replacement/*": ("what a sentence passes on", "reasonscope analyse anchors --run {run}"),
    "results/suppression/*": ("suppression of sentences", "reasonscope analyse suppression --run {run}"),
    "results/head_kurtosis/*": ("how peaked each head is", "reasonscope analyse receivers --run {run}"),
    "results/receivers/*": ("receiver heads", "reasonscope analyse receivers --run {run}"),
    "results/receiver_scores/*": ("attention received", "reasonscope analyse receivers --run {run}"),
    "results/probe_write/*": ("heads that write refusal", "reasonscope analyse cliff --run {run}"),
    "results/heads/*": ("attention heads", "reasonscope analyse heads --run {run}"),
    "results/head_effects/*": ("what is foretold without a head", "reasonscope analyse heads --run {run}"),
    "results/close_attention/*": ("what the closing tag looks at", "reasonscope analyse heads --run {run}"),
    "results/recurrence/*": ("tokens looked at again", "reasonscope analyse heads --run {run}"),
    "results/entropy/*": ("entropies and forking tokens", "reasonscope analyse entropy --run {run}"),
    "results/alternatives/*": ("alternatives at each token", "reasonscope analyse alternatives --run {run}"),
    "results/steering_shift/*": ("tokens, steered less base", "reasonscope analyse steering-shift --run {run}"),
    "results/attention_map/*": ("where heads look", "reasonscope analyse attention-map --run {run}"),
    "results/mi_compare/*": ("MI of base and reasoner", "reasonscope analyse mi-compare --run {run}"),
    "results/mi_base/*": ("MI of the base model", "reasonscope analyse mi-compare --run {run}"),
    "results/cliff/*": ("the model without its cliff heads", "reasonscope analyse cliff --ablate --run {run}"),
    "results/confidence/*": ("confidence along the thinking", "reasonscope analyse confidence --run {run}"),
    "results/trajectory/*": ("latent trajectory", "reasonscope analyse trajectory --run {run}"),
    "results/reflection/*": ("reflection", "reasonscope analyse reflection --run {run}"),
    "results/agreement/*": ("all signals side by side", "reasonscope analyse agreement --run {run}"),
}


def command_for(run: OpenRun, name: str) -> str:
    """The line that makes what lies under a key of the table of analyses."""
    return _COMMANDS[name][1].format(run=shlex.quote(str(run.path)), results=shlex.quote(str(run.where.results)))


def command_of(run: OpenRun, method: str) -> str:
    """The line that makes the results of a method."""
    name = f"results/{method}/*"
    return (
        command_for(run, name)
        if name in _COMMANDS
        else f"reasonscope analyse {method.replace('_', '-')} --run {shlex.quote(str(run.path))}"
    )


def run_measurements(run: OpenRun) -> list[RunMeasurement]:
    """What can be measured on a run and whether it was; results of other methods that lie there come last."""
    found = [
        RunMeasurement(
            name=name, title=title, there=len(list(run.where.results.glob(name))), command=command_for(run, name)
        )
        for name, (title, _) in _COMMANDS.items()
    ]
    for folder in sorted(folder for folder in run.where.analyses.glob("*") if folder.is_dir()):
        if f"results/{folder.name}/*" not in _COMMANDS:
            n = len(list(folder.glob("*.safetensors")))
            found.append(RunMeasurement(name=folder.name, title=folder.name.replace("_", " "), there=n, command=""))
    return found


@lru_cache(maxsize=256)
def _result(path: Path, mtime: int) -> Result | str:
    """A result, or why it cannot be read."""
    try:
        return Result.load(path)
    except InputError as error:
        return str(error)


def _folder(run: OpenRun, method: str) -> Iterator[Path]:
    return run.where.analyses.glob(f"{method}/*.safetensors")


def stamp(path: Path) -> int:
    """When a file was last written: what was read of it is kept until then."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
