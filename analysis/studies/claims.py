"""The published findings as data, from which their table is made, and a small part of them measured again.

`findings.yaml` has a row for each claim of a paper, and in it for each model the value, its 95 % interval, n, the control and the verdict,
with the place of the number in the study that measured it (`step: path/of/the/number`) and in the small study that checks it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from math import hypot
from pathlib import Path
from typing import Any

import yaml

from reasonscope.analysis.studies.plan import changed, read_plan
from reasonscope.analysis.studies.reading import build, check_known
from reasonscope.analysis.studies.runner import open_lab, study
from reasonscope.analysis.studies.state import finished
from reasonscope.data.errors import InputError
from reasonscope.data.intervals import Estimate
from reasonscope.data.storage.untrusted import parse_yaml
from reasonscope.data.summary import Summary, in_words

FINDINGS = Path(str(files("reasonscope.analysis.studies").joinpath("findings.yaml")))


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What was measured of a claim on one model.

    Attributes:
        number: Where the study that is published has it: `step: path/of/the/number`.
        check: Where the small study has it; nothing is checked if empty.
        value: The number; None until it was measured.
        low: The lower end of its 95 % interval.
        high: The upper end.
        n: Groups of problems, or traces.
        control: The control, with its numbers.
        verdict: holds, does not hold, or why it cannot be said.
        scale: By what the number is multiplied, such as -1 if the claim is of a decrease.
    """

    number: str
    check: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    control: str = ""
    verdict: str = ""
    scale: float = 1.0

    @property
    def estimate(self) -> Estimate | None:
        """The value with its interval; None until it was measured."""
        if self.value is None or self.low is None or self.high is None:
            return None
        return Estimate(value=self.value, low=self.low, high=self.high)


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """A claim of a paper, and what was found.

    Attributes:
        claim: The claim, in a sentence.
        paper: Where it is made.
        measure: What the numbers are.
        found: By model.
    """

    claim: str
    paper: str
    measure: str
    found: Mapping[str, _Finding]


@dataclass(frozen=True, kw_only=True)
class _CheckedModel:
    """A model of the table.

    Attributes:
        name: How the table calls it.
        check: The plan of the small study that measures its findings again.
        study: The plan of the study that is published.
    """

    name: str
    study: str
    check: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The published table.

    Attributes:
        models: The models by key, in the order of the columns.
        claims: The claims by key, in the order of the rows.
    """

    models: Mapping[str, _CheckedModel]
    claims: Mapping[str, _Claim] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finding beside what the small study measured.

    Attributes:
        claim: The key of the claim.
        published: The number of the table.
        again: The number of the small study; None if it could not be measured.
        why_not: Why it could not.
    """

    claim: str
    published: Estimate
    again: Estimate | None
    why_not: str = ""

    @property
    def agrees(self) -> bool | None:
        """Whether the two differ by no more than their intervals allow; None if there is nothing to compare.

        For two independent estimates, the interval of the difference ends at the root of the sum of the squares of their own distances
        to the ends that face each other (MOVER; Zou and Donner, Stat. Med. 27, 2008).
        """
        if self.again is None:
            return None
        one, other = sorted((self.published, self.again), key=lambda estimate: estimate.value)
        return other.value - one.value <= hypot(one.high - one.value, other.value - other.low)


def read_findings(path: Path = FINDINGS) -> Findings:
    """The table in a YAML file, by default the shipped one. Raises InputError for whatever does not fit."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the findings {path}: {error}") from error
    found = build(Findings, parse_yaml(text, str(path)), str(path))
    for name, claim in found.claims.items():
        for model in claim.found:
            check_known(model, found.models, f"{path}, {name}: unknown model")
    return found


def filled(found: Findings, model: str, out: str | Path) -> Findings:
    """The table with the numbers of a model from the folder of its study; what it lacks stays as it was.

    Raises InputError for an unknown model.
    """
    check_known(model, found.models, "no model of the table is called")
    numbers = _Numbers(Path(out), found.models[model].study)
    claims = {
        name: replace(claim, found={**claim.found, model: _measured(claim.found[model], numbers)})
        if model in claim.found
        else claim
        for name, claim in found.claims.items()
    }
    return replace(found, claims=claims)


def write_findings(found: Findings, path: Path) -> None:
    """Write the table as YAML, which `read_findings` reads; fields at their default are left out."""
    told = {
        "models": {key: asdict(model) for key, model in found.models.items()},
        "claims": {key: _claim_to_dict(claim) for key, claim in found.claims.items()},
    }
    path.write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def findings_table(found: Findings) -> str:
    """The table in Markdown: for each claim a row per model that was measured, with its number, its control and the verdict."""
    head = ["claim", "model", "number [95 %], n", "control", "verdict"]
    rows = [row for claim in found.claims.values() for row in _rows(claim, found.models)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def verify_claims(
    model: str,
    out: str | Path,
    *,
    found: Findings | None = None,
    source: str | None = None,
    problems: Sequence[str] = (),
) -> list[Comparison]:
    """Measure a fixed small part of the findings on a model again, in at most half an hour, and compare it with the table.

    Args:
        model: A model of the table, such as `organism`.
        out: The folder of the small study; a second call goes on there.
        found: The table; the shipped one if None.
        source: A folder or an id of the model, in place of the one that the plan names.
        problems: Other sources of problem sets, each as `set=source`.

    Returns:
        Each finding that the small study checks, beside what it measured.

    Raises:
        InputError: If the table has no such model.

    Example:
        for one in verify_claims("organism", "studies/check"):
            print(one.claim, one.published.value, one.again, one.agrees)
    """
    table = found or read_findings()
    check_known(model, table.models, "no model of the table is called")
    plan = changed(read_plan(table.models[model].check), model=source, sources=problems)
    study(plan, out, estimate=False)
    return list(compare(table, model, out))


def compare(found: Findings, model: str, out: str | Path) -> Iterator[Comparison]:
    """The findings that the small study in `out` checks, beside its numbers."""
    numbers = _Numbers(Path(out), found.models[model].check)
    for name, claim in found.claims.items():
        known = claim.found.get(model)
        if known is None or not known.check or known.estimate is None:
            continue
        again, why_not = numbers.estimate(known.check, known.scale)
        yield Comparison(claim=name, published=known.estimate, again=again, why_not=why_not)


def comparison_summary(model: str, compared: Sequence[Comparison]) -> Summary:
    """How many findings came out again, and each beside the published number."""
    if not compared:
        return Summary(finding=f"The table has no number of {model} that the small study checks.")
    words = {True: "yes", False: "no", None: "not measured"}
    rows = [(one.claim, in_words(one.published), in_words(one.again), words[one.agrees]) for one in compared]
    agree, measured = sum(one.agrees is True for one in compared), sum(one.agrees is not None for one in compared)
    return Summary(
        finding=f"{agree} of {measured} findings on {model} came out again within their intervals.",
        columns=("finding", "published", "measured again", "agrees"),
        rows=rows,
        notes=[f"{one.claim}: {one.why_not}" for one in compared if one.why_not],
    )


def _inner(value: Any, key: str) -> Any:
    """What `value` has under a key; for a list the key is a number, and `*…` is the last key that ends so."""
    if isinstance(value, Mapping):
        ends = [name for name in value if name.endswith(key[1:])] if key.startswith("*") else [key]
        return value.get(ends[-1]) if ends else None
    if isinstance(value, Sequence) and not isinstance(value, str) and key.isdecimal() and int(key) < len(value):
        return value[int(key)]
    return None


class _Numbers:
    """The numbers of a study by `step: path/of/the/number`."""

    def __init__(self, out: Path, plan: str) -> None:
        self._lab = open_lab(plan, out)

    def at(self, place: str) -> tuple[Any, str]:
        """What is there, and why it is not."""
        step, _, path = place.partition(":")
        known = finished(self._lab, step.strip())
        if known is None or known.failed:
            return None, f"{step} was not measured" + (f" ({known.failed})" if known else "")
        value: Any = known.numbers
        for key in path.strip().split("/"):
            value = _inner(value, key)
        return value, "" if value is not None else f"{step} has no number {path.strip()}"

    def estimate(self, place: str, scale: float) -> tuple[Estimate | None, str]:
        """The number with its interval, and why it is not there."""
        value, why_not = self.at(place)
        if value is None:
            return None, why_not
        known = value if isinstance(value, Mapping) else {}
        scaled = [scale * end for name in ("value", "low", "high") if isinstance(end := known.get(name), float | int)]
        if len(scaled) < 3:
            return None, f"{place} has no interval"
        return Estimate(value=scaled[0], low=min(scaled[1:]), high=max(scaled[1:])), ""


def _measured(known: _Finding, numbers: _Numbers) -> _Finding:
    found, _ = numbers.estimate(known.number, known.scale)
    if found is None:
        return known
    step = known.number.partition(":")[0]
    n = next(
        (n for key in ("n_groups", "n_problems", "traces") if isinstance(n := numbers.at(f"{step}:{key}")[0], int)),
        None,
    )
    value, low, high = (round(number, 4) for number in (found.value, found.low, found.high))
    return replace(known, value=value, low=low, high=high, n=known.n if n is None else n)


def _claim_to_dict(claim: _Claim) -> dict[str, Any]:
    default = asdict(_Finding(number=""))
    found = {
        key: {name: value for name, value in asdict(one).items() if value != default[name]}
        for key, one in claim.found.items()
    }
    return {"claim": claim.claim, "paper": claim.paper, "measure": claim.measure, "found": found}


def _rows(claim: _Claim, models: Mapping[str, _CheckedModel]) -> Iterator[list[str]]:
    """The claim with what is measured in the first row, and a row per model."""
    told = f"**{claim.claim}**{f' ({claim.paper})' if claim.paper else ''}: {claim.measure}"
    measured = [key for key in models if key in claim.found and claim.found[key].estimate is not None]
    for i, key in enumerate(measured):
        one = claim.found[key]
        size = f", n = {one.n}" if one.n else ""
        yield ["" if i else told, models[key].name, f"{in_words(one.estimate)}{size}", one.control, one.verdict]
    if not measured:
        yield [told, "–", "not measured yet", "", ""]
