"""The findings of extraction and sweeps in words, with tables that show every number next to its control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reasonscope.data.intervals import Estimate
from reasonscope.data.summary import Summary, in_hundredths, in_percent, in_words, plural, shortest_range

if TYPE_CHECKING:  # they make their summaries here
    from reasonscope.steering.experiments.experiment import Arm

# Methods that people know by capitals.
_CAPITALS = ("seal", "asc", "tip")
# An answer that is cut off or unreadable this much more often than without steering is worth a line.
_WORSE_FORM = 0.05
REFUSED = {"refused_harmful": "harmful requests", "refused_benign": "benign requests"}


def method_title(name: str) -> str:
    """`SEAL-clamp` for `seal-clamp`: the name of a method as its paper writes it."""
    first, dash, rest = name.partition("-")
    return f"{first.upper() if first in _CAPITALS else first}{dash}{rest}"


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """A row of a sweep: a method at one strength or value, with its random controls.

    Attributes:
        arm: The method.
        controls: Random vectors or tokens in its place; empty if it has none.
        reversed: The vector with its sign reversed, for steering methods.
        beyond: Whether its change of length is beyond what the controls do, for steering methods.
    """

    arm: Arm
    controls: Sequence[Arm]
    reversed: Arm | None = None
    beyond: bool | None = None


def response_summary(
    name: str, base: Arm, rows: Sequence[ArmRow], *, control: str, unit: str = "strength", held_out: bool | None = None
) -> Summary:
    """What a method does at each strength, beside the unsteered model and beside its random controls.

    `control` names what the controls are, "" for none. `held_out` says whether the vector is known to come from other problems; None for
    decoding methods, which have no vector.
    """
    measured = [key for key in ("accuracy", *REFUSED) if key in base.measures]
    swept = any(row.reversed is not None for row in rows)
    table = [
        (
            "unsteered",
            in_words(base.tokens),
            "",
            "",
            *measures_in_words(base, measured),
            *(("", "", "") if swept else ()),
        )
    ]
    for row in rows:
        changes = in_percent(row.arm.change), range_of_changes(row.controls)
        more = (
            ()
            if row.reversed is None
            else (_distances(row), in_percent(row.reversed.change), "yes" if row.beyond else "no")
        )
        head = _multiplier(row.arm), in_words(row.arm.tokens)
        table.append((*head, *changes, *measures_in_words(row.arm, measured), *more))
    columns = (unit, "thinking tokens", "change", control or "control", *map(column, measured))
    return Summary(
        finding=_finding(name, base, rows, control, unit),
        columns=(*columns, "moved by (random)", "reversed", "beyond random?") if swept else columns,
        rows=table,
        notes=[_held_out_note(base, held_out), *_form_notes(base, [row.arm for row in rows])],
    )


def _finding(name: str, base: Arm, rows: Sequence[ArmRow], control: str, unit: str) -> str:
    """A sentence on the strength that changes most: of those beyond random controls, if there are any."""
    chosen = max(rows, key=lambda row: (row.beyond or False, abs(row.arm.change.value)))
    arm, at = chosen.arm, "" if unit == "as published" else f" at {_multiplier(chosen.arm)} {unit}"
    if unit == "strength":
        at = f" at strength {_multiplier(arm)}"
    accuracy, refusals = _accuracy_clause(base, arm), _refusal_clauses(base, arm, chosen.controls)
    outcome = "; ".join(
        [accuracy, *(said for said, moved in refusals if moved)] if accuracy else [said for said, _ in refusals]
    )
    judged = any(row.beyond is not None for row in rows)
    verdict = (
        " No strength changes the length beyond what random vectors do."
        if judged and not any(row.beyond for row in rows)
        else ""
    )
    said = f"{method_title(name)}{at} {_length_clause(arm)}{_chance_clause(control, chosen)}"
    return f"{said}{f'; {outcome}' if outcome else ''}.{verdict}"


def _length_clause(arm: Arm) -> str:
    if arm.change.value != arm.change.value:
        return "has no length to compare (the unsteered model did not think)"
    value, low, high = (100 * number for number in (arm.change.value, arm.change.low, arm.change.high))
    if low > 0:
        return f"makes the thinking {value:.0f} % longer [{low:.0f}, {high:.0f}]"
    if high < 0:
        return f"makes the thinking {-value:.0f} % shorter [{-high:.0f}, {-low:.0f}]"
    return f"leaves the length of the thinking as it is ({in_percent(arm.change)})"


def _chance_clause(control: str, row: ArmRow) -> str:
    if not row.controls:
        return ", and has no random control"
    what = control if row.reversed is None else f"{control} that move states as far"
    return f", {what} change it by {range_of_changes(row.controls)}"


def _accuracy_clause(base: Arm, arm: Arm) -> str:
    if "accuracy" not in arm.measures or "accuracy" not in base.measures:
        return ""
    return _moved("accuracy", base.measures["accuracy"], arm.measures["accuracy"], arm.differences.get("accuracy"))


def _refusal_clauses(base: Arm, arm: Arm, random: Sequence[Arm]) -> list[tuple[str, bool]]:
    """What happens to the refusals of each kind of request, and whether anything does."""
    clauses = []
    for name, what in REFUSED.items():
        if name in arm.measures and name in base.measures:
            before, after = base.measures[name], arm.measures[name]
            said = _moved(f"the refused share of {what}", before, after, arm.differences.get(name))
            chance = [other.measures[name].value for other in random if name in other.measures]
            more = f", with random controls it is {range_in_words(chance)}" if chance else ""
            clauses.append((said + more, before.value != after.value))
    return clauses


def _moved(what: str, before: Estimate, after: Estimate, difference: Estimate | None) -> str:
    if before.value == after.value:
        return f"{what} stays at {in_hundredths(after.value)}"
    verb = "falls" if after.value < before.value else "rises"
    by = "" if difference is None else f" ({in_hundredths(difference, signed=True)})"
    return f"{what} {verb} from {in_hundredths(before.value)} to {in_hundredths(after.value)}{by}"


def measures_in_words(arm: Arm, names: Sequence[str]) -> tuple[str, ...]:
    """The measures of an arm as a table shows them."""
    return tuple(in_words(arm.measures.get(name)) for name in names)


def _multiplier(arm: Arm) -> str:
    return f"{arm.multiplier:g}".replace("-", "−")


def column(name: str) -> str:
    """What a table calls a measure."""
    return f"{REFUSED[name]} refused" if name in REFUSED else name


def _distances(row: ArmRow) -> str:
    """`621 (615 to 628)`: how far the states of an edited token are moved, summed over sites, and how far by the controls."""
    theirs = sorted(arm.distance for arm in row.controls)
    return f"{in_words(row.arm.distance)} ({shortest_range([in_words(end) for end in theirs])})" if theirs else "–"


def range_of_changes(arms: Sequence[Arm]) -> str:
    """`−3 to 1 %`, the lowest and the highest mean of the controls."""
    ends = [in_percent(change) for change in sorted(arm.change.value for arm in arms)]
    return shortest_range(ends).replace(" % to", " to") if ends else "–"


def range_in_words(values: Sequence[float]) -> str:
    """The lowest and the highest share, as a table shows them."""
    return shortest_range([in_hundredths(value) for value in sorted(values)]) if values else "–"


def _held_out_note(base: Arm, held_out: bool | None) -> str:
    n = base.n_problems
    if held_out is None:
        return f"Judged on {plural(n, 'problem')}; each value answers them with the same seeds."
    if held_out:
        return f"Judged on {plural(n, 'problem')} that the vector was not made from, with the same seeds at every strength."
    return f"Judged on {plural(n, 'problem')}. The vector does not say which problems it was made from: these may be among them."


def _form_notes(base: Arm, arms: Sequence[Arm]) -> list[str]:
    """Which strengths break the form of the answer: their length is that of the token limit, and not of a thought."""
    name = "well_formed"
    if name not in base.measures:
        return []
    before = 1 - base.measures[name].value
    worse = [(arm, 1 - arm.measures[name].value) for arm in arms if name in arm.measures]
    return [
        f"At {_multiplier(arm)}, {100 * share:.0f} % of the answers are cut off at the token limit or cannot be read"
        f" ({100 * before:.0f} % unsteered)."
        for arm, share in worse
        if share > before + _WORSE_FORM
    ]
