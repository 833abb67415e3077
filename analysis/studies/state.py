"""What is kept of each step, and whether it still holds.

    OUT/steps/<name>.json     what a finished step depended on, what it found, and the checksums of its files
    OUT/steps/<name>/         what a step keeps while it runs

A step is skipped if its own options with the files that they name, its problems, the model with its files, the steps that it reads and the
run that it works on are unchanged, and so are its files.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reasonscope.analysis.studies.lab import Lab
from reasonscope.analysis.studies.steps.base import Outcome, Step, Work
from reasonscope.data.arrays import plain
from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder, sha256_of, write_text_durably
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.untrusted import parse_json, wrap_errors
from reasonscope.data.summary import Summary

_SOON = 60.0  # a step that failed after so few seconds is tried again by the next call
_ELSEWHERE = ("device", "threads")  # arguments of `load_model` that change no result


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A step that has run.

    Attributes:
        inputs: Everything that its results depend on.
        seconds: How long it took.
        work: How much work it was expected to be.
        summaries: Its findings.
        numbers: Its numbers.
        files: The checksum of each file that it wrote, by its path below the folder of the study.
        figures: Those of its files that are figures.
        failed: Why it could not be measured; empty if it was.
        lost: The step that it reads and that could not be measured.
    """

    inputs: Mapping[str, Any]
    seconds: float
    work: Work = field(default_factory=Work)
    summaries: Sequence[Summary] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[str] = ()
    failed: str = ""
    lost: str = ""

    def save(self, lab: Lab, name: str) -> None:
        path = _path(lab, name)
        make_folder(path.parent)
        write_text_durably(path, json.dumps(plain(asdict(self)), indent=1, allow_nan=False))


def finished(lab: Lab, name: str) -> Finished | None:
    """What is kept of a step; None if it has not run. Raises InputError for a damaged file."""
    path = _path(lab, name)
    if not path.exists():
        return None
    with wrap_errors(path):
        known = parse_json(path.read_bytes(), str(path))
        return Finished(
            **{
                **known,
                "work": Work(**known["work"]),
                "summaries": [Summary(**summary) for summary in known["summaries"]],
            }
        )


def done(lab: Lab, inputs: Mapping[str, Any], outcome: Outcome, seconds: float, work: Work) -> Finished:
    """What to keep of a step that has run just now; `inputs` are those from before it ran."""
    files = {_below(lab, path): sha256_of(path) for path in outcome.files}
    return Finished(
        inputs=inputs,
        seconds=round(seconds, 2),
        work=work,
        summaries=outcome.summaries,
        numbers=outcome.numbers,
        files=files,
        figures=[_below(lab, path) for path in outcome.figures],
    )


def why_stale(lab: Lab, name: str) -> str:
    """Why a step has to run; empty if its results hold."""
    known = finished(lab, name)
    if known is None:
        return "has not run yet"
    if known.lost and (found := finished(lab, known.lost)) is not None and not found.failed:
        return f"reads {known.lost}, which is measured now"
    # Cheap to try again, or the server may have been away.
    if known.failed and not known.lost and (known.seconds < _SOON or served(lab, lab.plan.steps[name])):
        return f"could not be measured ({known.failed})"
    for other in lab.plan.steps[name].needs:
        if why_stale(lab, other):
            return f"reads {other}, which has to run"
    now = inputs_of(lab, name)
    # What an older version did not save says nothing about a change.
    if changes := list(_changes(known.inputs, {section: now[section] for section in now if section in known.inputs})):
        return "; ".join(changes[:3])
    for file, digest in known.files.items():
        path = lab.out / file
        if not path.exists():
            return f"{path} is gone"
        if sha256_of(path) != digest:
            return f"{path} has changed"
    return ""


def forget_failed(lab: Lab) -> None:
    """Forget the steps that could not be measured, so that they run again."""
    for name in lab.plan.steps:
        if (known := finished(lab, name)) is not None and known.failed:
            _path(lab, name).unlink()


def served(lab: Lab, step: Step) -> bool:
    """Whether the server writes for this step, and not the model here."""
    analysis = getattr(step, "analyse", None)
    if step.kind == "sweep":
        return lab.server is not None and lab.server.steers
    return lab.server is not None and (
        step.kind == "pairs" or (step.kind == "record" and not step.needs) or analysis in ("anchors", "confidence")
    )


def inputs_of(lab: Lab, name: str) -> dict[str, Any]:
    """Everything that the results of a step depend on, as JSON."""
    return {**_plain_inputs(lab, name), "files": _files_of(lab, name), "weights": dict(lab.model_files)}


def _plain_inputs(lab: Lab, name: str) -> dict[str, Any]:
    """What the results of a step depend on, except the content of its files and those of the model.

    The hashes of the steps that are read are made of this alone, as in older versions, so that finished studies hold.
    """
    step, plan = lab.plan.steps[name], lab.plan
    load = {key: value for key, value in plan.load.items() if key not in _ELSEWHERE}
    told = {
        "kind": step.kind,
        "options": step.settings(),
        "model": lab.model_identity,
        "load": load,
        "seed": plan.seed,
        "problems": lab.problems_identity(step.asks),
        "reads": {other: _key(_plain_inputs(lab, other)) for other in step.needs},
        "runs": {other: _stamp(lab, other) for other in step.needs if plan.steps[other].kind == "record"},
    }
    return json.loads(json.dumps(plain(_by_name(told)), default=str))  # type: ignore[no-any-return]


def _files_of(lab: Lab, name: str) -> dict[str, str]:
    """The checksum of each file that an option of a step names, and of those that the steps before it depended on."""
    step = lab.plan.steps[name]
    before = [known.inputs.get("files", {}) for other in step.needs if (known := finished(lab, other)) is not None]
    own = {text: sha256_of(Path(text)) for text in _texts(step.settings()) if _is_file(text)}
    return {path: digest for files in (*before, own) for path, digest in files.items()}


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name
        return False


def _texts(value: Any) -> Iterator[str]:
    """The texts and paths in a value."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from (text for inner in value.values() for text in _texts(inner))
    elif isinstance(value, list | tuple):
        yield from (text for inner in value for text in _texts(inner))


def key_of(lab: Lab, name: str, *, without: str) -> str:
    """A hash of what the results of a step depend on but the option `without`."""
    inputs = inputs_of(lab, name)
    inputs["options"].pop(without, None)
    return _key(inputs)


def _key(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _stamp(lab: Lab, run: str) -> str:
    manifest = lab.where(run).store / NAME
    return sha256_of(manifest)[:16] if manifest.exists() else ""


def _by_name(value: Any) -> Any:
    """Dataclasses as mappings of their fields."""
    if hasattr(value, "__dataclass_fields__"):
        return {key: _by_name(inner) for key, inner in vars(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _by_name(inner) for key, inner in value.items()}
    return [_by_name(inner) for inner in value] if isinstance(value, list | tuple) else value


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield _change(f"{prefix}{key}", old, new)


def _change(name: str, old: object, new: object) -> str:
    section, _, rest = name.partition(".")
    if section == "weights":
        return f"{rest} of the model has changed"
    if section in ("reads", "files"):
        return f"{rest} has changed"
    if section == "runs":
        return f"the traces of {rest} have changed"
    what = rest if section == "options" else name.replace(".", " ")
    return f"{what} is {_short(new)}, was {_short(old)}"


def _short(value: object) -> str:
    text = "the default" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _path(lab: Lab, name: str) -> Path:
    return lab.out / "steps" / f"{name}.json"


def _below(lab: Lab, path: Path) -> str:
    try:
        return path.resolve().relative_to(lab.out.resolve()).as_posix()
    except ValueError as error:
        raise InputError(f"{path} lies outside the folder of the study, {lab.out}") from error
