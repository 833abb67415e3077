"""A measurement on a run, ready to be shown and saved: what `reasonscope probe` and `steer` print, and what a step of a study keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from reasonscope.analysis.figures import Figure
from reasonscope.analysis.runs.saved_numbers import save_numbers
from reasonscope.data.storage.run_folder import RunFolder
from reasonscope.data.summary import Summary
from reasonscope.probes.properties.label_reports import AnyProbe

if TYPE_CHECKING:
    from reasonscope.analysis.studies.lab import Lab

_LOADING = ("device", "dtype", "quantise", "threads", "deterministic", "float32_compute")  # options of every command


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured.

    Attributes:
        name: The name of its numbers.
        summaries: The findings, for people.
        numbers: Every number.
        figures: Figures by name.
        probes: Fitted probes by name.
        command: The command that measures the same again.
        seed: The seed of it.
    """

    name: str
    summaries: Sequence[Summary]
    numbers: Mapping[str, Any]
    figures: Mapping[str, Figure]
    probes: Mapping[str, AnyProbe] = field(default_factory=dict)
    command: str = ""
    seed: int = 0

    def save(self, where: RunFolder, next_command: str = "") -> "Measured":
        """Save probes, numbers and figures beside the store. The last summary names the files, and what to run next."""
        save_numbers(
            where,
            self.name,
            self.numbers,
            command=self.command,
            seed=self.seed,
            figures=self.figures,
            probes=self.probes,
        )
        *others, last = self.summaries
        return replace(self, summaries=[*others, replace(last, files=self._lines(where), next_command=next_command)])

    def files(self, where: RunFolder) -> list[Path]:
        """What `save` writes."""
        probes = [where.probes / f"{name}.safetensors" for name in self.probes]
        return [where.numbers / f"{self.name}.json", *probes, *self.drawn(where)]

    def drawn(self, where: RunFolder) -> list[Path]:
        """The figures that `save` writes, as JSON."""
        return [where.figures / f"{name}.json" for name in self.figures]

    def _lines(self, where: RunFolder) -> list[str]:
        saved = (
            [f"Probes: {_listed(where.probes, [f'{name}.safetensors' for name in self.probes])}"] if self.probes else []
        )
        return [
            *saved,
            f"Figures: {_listed(where.figures, [f'{name}.html' for name in self.figures])}",
            f"Numbers: {where.numbers / f'{self.name}.json'}",
        ]


def command_line(command: str, options: Mapping[str, Any]) -> str:
    """`command` with options as one types them, one per value of a list.

    Those that are true stand alone, and those that are None or false are left out.
    """
    told = [command]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            told.append(flag)
        elif value is not None and value is not False:
            told += [f"{flag} {_typed(one)}" for one in (value if isinstance(value, list) else [value])]
    return " ".join(told)


def run_line(command: str, lab: "Lab", run: str, options: Mapping[str, Any]) -> str:
    """The line of a command on a run of a study, with the model loaded as there; the run itself knows its name and prompt."""
    load = {name: lab.plan.load.get(name) for name in _LOADING}
    return command_line(command, {"run": lab.where(run).results, **options, "seed": lab.plan.seed, **load})


def study_line(lab: "Lab", step: str) -> str:
    """The line that runs a step of a study, for what no other command does alike."""
    server = {} if lab.server is None else lab.server.options()
    name = lab.plan.told or quote(lab.plan.name)
    return command_line(f"reasonscope study {name}", {"out": lab.out, "only": step, **server})


def _typed(value: Any) -> str:
    return " ".join(map(_typed, value)) if isinstance(value, list | tuple) else quote(str(value))


def _listed(folder: Path, names: Sequence[str]) -> str:
    """The path of one file, or a folder with the names of its files, of which the first four are shown."""
    if len(names) == 1:
        return str(folder / names[0])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{folder} ({', '.join(names[:4])}{more})"
