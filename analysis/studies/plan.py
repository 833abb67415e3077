"""The plan of a study, in YAML:

name: mine
model: Qwen/Qwen3-1.7B                  # a hub id, a folder, or organism
load: {dtype: bfloat16, device: cuda:0} # arguments of `load_model`
seed: 0
problems:
  math:
    source: problems.jsonl              # as `load_problems` takes it
    parts: {learn: 160, judge: 64}      # so many problems each; no group of problems is in two parts
steps:                                  # each has a name, and begins with its kind
  open: {record: math.learn, sites: [resid_post.8, resid_post.16], max_new_tokens: 1024}
  length: {probe: length, run: open}
  sweep: {sweep: [seal], run: open, problems: math.judge}

docs/study.md lists every kind of step with its options.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import Any

from reasonscope.analysis.studies.reading import build, check_known, mapping
from reasonscope.analysis.studies.steps.analysing import AnalyseStep, SuppressWordsStep
from reasonscope.analysis.studies.steps.base import Step
from reasonscope.analysis.studies.steps.exits import ExitStep
from reasonscope.analysis.studies.steps.extracting import ExtractStep, PairsStep
from reasonscope.analysis.studies.steps.measured import command_line
from reasonscope.analysis.studies.steps.probing import ProbeStep
from reasonscope.analysis.studies.steps.recording import RecordStep
from reasonscope.analysis.studies.steps.side_by_side import SideBySideStep
from reasonscope.analysis.studies.steps.sweeping import SweepStep
from reasonscope.data.errors import InputError
from reasonscope.data.storage.untrusted import parse_yaml

_KINDS: Mapping[str, type[Step]] = {
    kind.kind: kind
    for kind in (
        RecordStep,
        ProbeStep,
        PairsStep,
        ExtractStep,
        SweepStep,
        SideBySideStep,
        ExitStep,
        AnalyseStep,
        SuppressWordsStep,
    )
}
_PLANS = files("reasonscope.analysis.studies").joinpath("plans")


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A message that is put before every problem of a set."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class _ProblemSet:
    """Problems that steps ask, whole or in parts.

    Attributes:
        source: As `load_problems` takes it.
        split: The split of the data set.
        n: How many problems; all of the source if None.
        seed: Seed of the choice, and of the parts.
        before: Messages that are put before every problem, such as worked examples.
        parts: How many problems each part has. No group of problems is in two parts.
    """

    source: str
    split: str = "test"
    n: int | None = None
    seed: int = 0
    before: tuple[_Turn, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """A study: a model, problems, and the steps from recording to analyses.

    Attributes:
        name: What the report is called.
        model: A hub id, a folder, or `organism`.
        steps: The steps by name, in the order in which they run.
        problems: Sets of problems by name.
        load: Arguments of `load_model`, such as `dtype`.
        seed: Seed of the sampling, the folds and the controls.
        about: What the study asks, in a sentence or two, for the report.
        told: The plan that it was read from, with the changes to it, as `reasonscope study` takes them; empty if it was made in Python.

    Example:
        plan = rs.read_plan("gsm8k")
        plan = dataclasses.replace(plan, model="Qwen/Qwen3-1.7B")
        report = rs.study(plan, "studies/mine")
    """

    name: str
    model: str
    steps: Mapping[str, Step]
    problems: Mapping[str, _ProblemSet] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    about: str = ""
    told: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        done: set[str] = set()
        for name, step in self.steps.items():
            for other in step.needs:
                if other not in self.steps:
                    check_known(other, self.steps, f"step {name} needs an unknown step")
                if other not in done:
                    raise InputError(f"step {name} needs {other}, which comes later; put it before")
            for asked in step.asks:
                self._check_asked(name, asked)
            done.add(name)

    def _check_asked(self, name: str, asked: str) -> None:
        set_name, _, part = asked.partition(".")
        check_known(set_name, self.problems, f"step {name} asks unknown problems")
        if part:
            check_known(part, self.problems[set_name].parts, f"step {name}: {set_name} has no part")


def read_plan(plan: str | Path) -> StudyPlan:
    """Read a plan.

    Args:
        plan: A YAML file, or the name of a shipped plan (`_shipped_plans`).

    Returns:
        The plan, checked.

    Raises:
        InputError: For whatever is unknown, missing or of another type, with what was probably meant.

    Example:
        plan = read_plan("gsm8k")
        list(plan.steps)
    """
    where = str(plan)
    content = mapping(parse_yaml(plan_text(plan), where), where)
    fields = {"name": Path(where).stem, **content}
    steps = mapping(fields.get("steps", {}), f"{where}, steps")
    if not steps:
        raise InputError(f"{where} has no steps; list at least one under `steps:`")
    head = build(_Head, {key: value for key, value in fields.items() if key != "steps"}, where)
    listed = {name: _step(given, f"{where}, step {name}") for name, given in steps.items()}
    known = {name: getattr(head, name) for name in ("name", "model", "problems", "load", "seed", "about")}
    return StudyPlan(steps=listed, told=quote(where), **known)


def plan_text(plan: str | Path) -> str:
    """The YAML of a plan, by its file or by the name of a shipped one. Raises InputError if there is neither."""
    path = Path(plan)
    shipped = _shipped_plans()
    if str(plan) in shipped and not path.is_file():
        return shipped[str(plan)]
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the plan {plan}: {error}; give a YAML file, or one of the shipped plans: {', '.join(shipped)}"
        ) from error


def _shipped_plans() -> dict[str, str]:
    """The YAML of every plan that comes with the package, by name."""
    found = (entry for entry in _PLANS.iterdir() if entry.name.endswith(".yaml"))
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in sorted(found, key=_name)}


def changed(plan: StudyPlan, *, model: str | None = None, sources: Sequence[str] = ()) -> StudyPlan:
    """The plan with another model, or other sources of its problems, each as `set=source`.

    Raises InputError for a set that it does not have.
    """
    given = dict(text.partition("=")[::2] for text in sources)
    for name in given:
        check_known(name, plan.problems, "the plan has no problem set")
    known = {name: replace(told, source=given.get(name) or told.source) for name, told in plan.problems.items()}
    told = command_line(plan.told, {"model": model, "problems": list(sources)}) if plan.told else ""
    return replace(plan, model=model or plan.model, problems=known, told=told)


@dataclass(frozen=True, kw_only=True)
class _Head:
    """A plan without its steps."""

    name: str
    model: str
    problems: Mapping[str, _ProblemSet] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    about: str = ""


def _step(given: object, where: str) -> Step:
    values = mapping(given, where)
    kinds = [name for name in values if name in _KINDS]
    if not kinds:
        first = next(iter(values), "")
        check_known(first, _KINDS, f"{where}: unknown kind of step")
    kind = _KINDS[kinds[0]]
    subject = next(iter(_own_fields(kind)))
    return build(kind, {subject if name == kinds[0] else name: value for name, value in values.items()}, where)


def _own_fields(kind: type[Step]) -> Iterator[str]:
    """The fields of a kind of step, its subject first, without those that every step has."""
    return (name for name in kind.__annotations__ if name != "kind")


def _name(entry: Any) -> str:
    return str(entry.name)
