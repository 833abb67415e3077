"""What `verify` and `doctor` found, for people."""

from collections.abc import Sequence

from reasonscope.data.summary import Summary
from reasonscope.probes.checks.doctor import EnvironmentCheck, Examination, ShippedModel
from reasonscope.probes.checks.verification import Check


def verification_summary(model: str, checks: Sequence[Check]) -> Summary:
    """Whether this model can be trusted, and every check with its value beside the largest that is allowed."""
    failed = [check.name for check in checks if not check.passed]
    finding = (
        f"{model}: {len(failed)} of {len(checks)} checks failed ({', '.join(failed)}): do not trust what is read from it or written to it."
        if failed
        else f"{model}: all {len(checks)} checks passed, so every site is what its name says, and edits do what they say."
    )
    rows = [
        (
            check.name,
            "yes" if check.passed else "NO",
            *("" if number is None else f"{number:.3g}" for number in (check.value, check.limit)),
            check.detail,
        )
        for check in checks
    ]
    return Summary(
        finding=finding,
        columns=("check", "passed", "value", "limit", "what is compared"),
        rows=rows,
        next_command="" if failed else f"reasonscope record --model {model} --problems problems.jsonl --out runs/mine",
    )


def doctor_summary(examination: Examination) -> Summary:
    """Whether this installation can work, and what to do about each part that is missing."""
    core, extras = examination.core, examination.extras
    missing = [extra.name for extra in extras if extra.remedy]
    optional = f"; not installed: {', '.join(missing)}" if missing else ""
    finding = (
        f"reasonscope {examination.version} is complete here{optional}."
        if examination.sound
        else f"reasonscope {examination.version} cannot work here: a package or a shipped model is missing."
    )
    rows = [
        ("Python", examination.python),
        ("core", _packages(core)),
        *((f"extra {extra.name}", _packages(extra)) for extra in extras),
        *((f"device {one.name}", _device(one.description, one.memory)) for one in examination.devices),
        *((f"model {model.name}", "there" if model.path else "missing") for model in examination.models),
    ]
    parts: list[EnvironmentCheck | ShippedModel] = [core, *extras, *examination.models]
    remedies = [f"For {part.name}: {part.remedy}" for part in parts if part.remedy]
    return Summary(
        finding=finding,
        columns=("part", "state"),
        rows=rows,
        notes=[*remedies, "Versions and paths: reasonscope doctor --json"],
        next_command="reasonscope demo --quick" if examination.sound else "",
    )


def _packages(part: EnvironmentCheck) -> str:
    wrong = [
        f"{package.name} {package.installed} (needs {package.needed})"
        if package.installed
        else f"{package.name} missing"
        for package in part.packages
        if not package.satisfied
    ]
    return ", ".join(wrong) or "complete"


def _device(description: str, memory: float | None) -> str:
    return description if memory is None else f"{description}, {memory:.1f} GiB"
