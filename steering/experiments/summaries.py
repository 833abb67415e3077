"""The findings of extraction, sweeps and ablations in words, with tables that show every number next to its control."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from reasonscope.data.intervals import Estimate
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths, in_percent, in_words, shortest_range
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering.experiments.ablation import AblationEffect, RegenerationEffect
from reasonscope.steering.experiments.decoding_responses import DecodingResponse
from reasonscope.steering.experiments.dose_responses import Dose, DoseResponse
from reasonscope.steering.experiments.experiment import Arm
from reasonscope.steering.experiments.held_out import thinking_states
from reasonscope.steering.vectors.application import VectorUse
from reasonscope.steering.vectors.vector import SteeringVector

# Traces whose states say how long the stream is at a site.
_NORM_TRACES = 16
# Methods that people know by capitals.
_CAPITALS = ("seal", "asc", "tip")
# An answer that is cut off or unreadable this much more often than without steering is worth a line.
_WORSE_FORM = 0.05
_REFUSED = {"refused_harmful": "harmful requests", "refused_benign": "benign requests"}


def method_title(name: str) -> str:
    """`SEAL-clamp` for `seal-clamp`: the name of a method as its paper writes it."""
    first, dash, rest = name.partition("-")
    return f"{first.upper() if first in _CAPITALS else first}{dash}{rest}"


def extraction_summary(
    name: str,
    uses: Sequence[VectorUse],
    store: TraceStore,
    ids: Sequence[str],
    *,
    files: Sequence[str] = (),
    next_command: str = "",
) -> Summary:
    """What was extracted, from how much, and how long each vector is beside the states that it will be added to."""
    each = [(use, site) for use in uses for site in use.vector.directions]
    norms = {site: _state_norm(store, ids, site) for site in dict.fromkeys(site for _, site in each)}
    rows = [
        (str(site), in_words(use.vector.norms[site]), in_words(_share(use, site, norms[site])), cosine)
        for (use, site), cosine in zip(each, _cosines_with_the_one_above(each), strict=True)
    ]
    sites = ", ".join(dict.fromkeys(str(site) for _, site in each))
    first = uses[0].vector
    length = "" if len(each) > 1 or rows[0][2] == "–" else f"; its norm is {rows[0][2]} of the state's"
    vectors = "vector" if len(each) == 1 else f"vectors ({len(each)})"
    return Summary(
        finding=f"{method_title(name)} {vectors} at {sites} from {_sources(first)}{length}.",
        columns=("site", "norm", "norm / norm of the state", "cosine with the one above"),
        rows=rows if len(each) > 1 else (),
        notes=[f"A positive strength goes {first.sign}."] if first.sign else [],
        files=files,
        next_command=next_command,
    )


def sweep_summaries(
    responses: Sequence[DoseResponse | DecodingResponse], *, files: Sequence[str] = (), next_command: str = ""
) -> list[Summary]:
    """One for each method, by `response_summary`; the last says where the numbers went and what comes next."""
    each = [response_summary(response) for response in responses]
    last = each.pop()
    return [*each, Summary(**{**vars(last), "files": files, "next_command": next_command})]


def response_summary(response: DoseResponse | DecodingResponse) -> Summary:
    """What a method does at each strength, beside the unsteered model and beside its random controls."""
    arms, random = _arms(response), _random(response)
    measured = [name for name in ("accuracy", *_REFUSED) if name in response.base.measures]
    swept = isinstance(response, DoseResponse)
    rows = [("unsteered", in_words(response.base.tokens), "", "", *_measures(response.base, measured))]
    for arm, chance in zip(arms, random, strict=True):
        changes = in_percent(arm.change), _range_of_changes(chance)
        rows.append((f"{arm.multiplier:g}", in_words(arm.tokens), *changes, *_measures(arm, measured)))
    if isinstance(response, DoseResponse):
        both = [("", ""), *((in_percent(dose.reversed.change), _beyond(dose)) for dose in response.doses)]
        rows = [(*row, *more) for row, more in zip(rows, both, strict=True)]
    return Summary(
        finding=_finding(response, arms, random),
        columns=(
            "strength" if swept else response.unit,
            "thinking tokens",
            "change",
            response.null_name or "control",
            *map(_column, measured),
            *(("reversed", "beyond random?") if swept else ()),
        ),
        rows=rows,
        notes=[*_held_out_note(response), *_form_notes(response.base, arms)],
    )


def ablation_summary(
    effects: Mapping[str, AblationEffect], *, files: Sequence[str] = (), next_command: str = ""
) -> Summary:
    """How much less likely each ablation makes the given answers, beside random ablations of the same size."""
    rows = [
        (
            name,
            in_words(found.effect),
            _middle_95(found.null),
            f"{len(found.null)}",
            in_words(found.p_value),
            in_words(found.smallest_p),
            in_words(found.side_effects["kl_thinking"]),
        )
        for name, found in effects.items()
    ]
    return Summary(
        finding=_ablation_finding(effects),
        columns=(
            "ablation",
            "answer, nats per token",
            "random controls",
            "how many",
            "p",
            "smallest p",
            "KL of the thinking",
        ),
        rows=rows,
        notes=_few_controls(effects),
        files=files,
        next_command=next_command,
    )


def regeneration_summary(
    effects: Mapping[str, RegenerationEffect], *, not_measured: Sequence[str] = (), next_command: str = ""
) -> Summary | None:
    """What the ablated model writes when it answers again, beside random ablations; None if no ablation was asked for that."""
    notes = [
        f"{name}: attention edges are cut in finished text only, so it did not answer again" for name in not_measured
    ]
    if not effects:
        return None if not notes else Summary(finding="No ablated model answered again.", notes=notes)
    measured = [name for name in ("accuracy", *_REFUSED) if any(name in one.arm.measures for one in effects.values())]
    rows = [
        (
            name,
            in_words(one.arm.tokens),
            in_percent(one.arm.change),
            _range_of_changes(one.random),
            *_measures(one.arm, measured),
            *(_range([arm.measures[key].value for arm in one.random if key in arm.measures]) for key in measured),
        )
        for name, one in effects.items()
    ]
    of_random = [f"{_column(name)}, random" for name in measured]
    n = next(iter(effects.values())).arm.n_problems
    return Summary(
        finding=f"When the ablated model answers {n} problems again:",
        columns=("ablation", "thinking tokens", "change", "random", *map(_column, measured), *of_random),
        rows=rows,
        notes=notes,
        next_command=next_command,
    )


def _state_norm(store: TraceStore, ids: Sequence[str], site: Site) -> float | None:
    """The mean norm of the states at `site` along the thinking of the first traces; None if the run did not store them."""
    if str(site) not in store.sites:
        return None
    states = thinking_states(store, ids[:_NORM_TRACES], site)
    return float(np.linalg.norm(states, axis=1).mean()) if len(states) else None


def _share(use: VectorUse, site: Site, norm: float | None) -> float | None:
    return None if norm is None else use.vector.norms[site] / norm


def _cosines_with_the_one_above(each: Sequence[tuple[VectorUse, Site]]) -> list[str]:
    directions = [use.vector.directions[site] for use, site in each]
    return ["", *(in_words(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))) for a, b in pairwise(directions))]


def _sources(vector: SteeringVector) -> str:
    """`12 problems (112 steps)`, from what the extraction noted."""
    about = vector.provenance
    problems = f"{len(about.get('groups', ()))} problems"
    if "steps" in about:
        return f"{problems} ({sum(about['steps'].values())} steps)"
    return f"{problems} ({about['pairs']} pairs)" if "pairs" in about else problems


def _arms(response: DoseResponse | DecodingResponse) -> list[Arm]:
    if isinstance(response, DecodingResponse):
        return list(response.arms)
    return [dose.steered for dose in response.doses]


def _random(response: DoseResponse | DecodingResponse) -> list[list[Arm]]:
    """The random controls of each arm; of the decoding those with its value."""
    if isinstance(response, DoseResponse):
        return [list(dose.random) for dose in response.doses]
    return [[null for null in response.nulls if null.multiplier == arm.multiplier] for arm in response.arms]


def _finding(response: DoseResponse | DecodingResponse, arms: Sequence[Arm], random: Sequence[Sequence[Arm]]) -> str:
    """A sentence on the strength that changes most: of those beyond random controls, if there are any."""
    beyond = [dose.beyond_random for dose in response.doses] if isinstance(response, DoseResponse) else []
    chosen = max(range(len(arms)), key=lambda i: (beyond[i] if beyond else False, abs(arms[i].change.value)))
    arm, at = arms[chosen], f" at strength {arms[chosen].multiplier:g}"
    if isinstance(response, DecodingResponse):
        at = "" if response.unit == "as published" else f" at {arm.multiplier:g} {response.unit}"
    length, accuracy = _length_clause(arm), _accuracy_clause(response.base, arm)
    chance = _chance_clause(response, arm, random[chosen])
    outcome = "; ".join([*filter(None, [accuracy]), *_refusal_clauses(response.base, arm, random[chosen])])
    verdict = ""
    if beyond and not any(beyond):
        verdict = " No strength changes the length beyond what random vectors do."
    return f"{method_title(response.name)}{at} {length}{chance}{f'; {outcome}' if outcome else ''}.{verdict}"


def _length_clause(arm: Arm) -> str:
    value, low, high = (100 * number for number in (arm.change.value, arm.change.low, arm.change.high))
    if low > 0:
        return f"makes the thinking {value:.0f} % longer [{low:.0f}, {high:.0f}]"
    if high < 0:
        return f"makes the thinking {-value:.0f} % shorter [{-high:.0f}, {-low:.0f}]"
    return f"leaves the length of the thinking as it is ({in_percent(arm.change)})"


def _chance_clause(response: DoseResponse | DecodingResponse, arm: Arm, random: Sequence[Arm]) -> str:
    if not random:
        return ", and has no random control"
    what = "random vectors that move states as far" if isinstance(response, DoseResponse) else response.null_name
    return f", {what} change it by {_range_of_changes(random)}"


def _accuracy_clause(base: Arm, arm: Arm) -> str:
    if "accuracy" not in arm.measures or "accuracy" not in base.measures:
        return ""
    return _moved("accuracy", base.measures["accuracy"], arm.measures["accuracy"], arm.differences.get("accuracy"))


def _refusal_clauses(base: Arm, arm: Arm, random: Sequence[Arm]) -> list[str]:
    clauses = []
    for name, what in _REFUSED.items():
        if name in arm.measures and name in base.measures:
            said = _moved(
                f"the refused share of {what}", base.measures[name], arm.measures[name], arm.differences.get(name)
            )
            chance = [other.measures[name].value for other in random if name in other.measures]
            clauses.append(said + (f", with random controls it is {_range(chance)}" if chance else ""))
    return clauses


def _moved(what: str, before: Estimate, after: Estimate, difference: Estimate | None) -> str:
    if before.value == after.value:
        return f"{what} stays at {in_hundredths(after.value)}"
    verb = "falls" if after.value < before.value else "rises"
    by = "" if difference is None else f" ({in_hundredths(difference, signed=True)})"
    return f"{what} {verb} from {in_hundredths(before.value)} to {in_hundredths(after.value)}{by}"


def _measures(arm: Arm, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(in_words(arm.measures.get(name)) for name in names)


def _column(name: str) -> str:
    return f"{_REFUSED[name]} refused" if name in _REFUSED else name


def _beyond(dose: Dose) -> str:
    return "yes" if dose.beyond_random else "no"


def _range_of_changes(arms: Sequence[Arm]) -> str:
    """`−3 to 1 %`, the lowest and the highest mean of the controls."""
    ends = [in_percent(change) for change in sorted(arm.change.value for arm in arms)]
    return shortest_range(ends).replace(" % to", " to") if ends else "–"


def _range(values: Sequence[float]) -> str:
    return shortest_range([in_hundredths(value) for value in sorted(values)]) if values else "–"


def _middle_95(null: Sequence[float]) -> str:
    """The median of the controls and the interval that holds 95 % of them."""
    middle, low, high = np.quantile(null, [0.5, 0.025, 0.975])
    return in_words(Estimate(value=float(middle), low=float(low), high=float(high)))


def _held_out_note(response: DoseResponse | DecodingResponse) -> list[str]:
    n = response.base.n_problems
    if isinstance(response, DecodingResponse):
        return [f"Judged on {n} problems; each value answers them with the same seeds."]
    if response.held_out:
        return [f"Judged on {n} problems that the vector was not made from, with the same seeds at every strength."]
    return [
        f"Judged on {n} problems. The vector does not say which problems it was made from: these may be among them."
    ]


def _form_notes(base: Arm, arms: Sequence[Arm]) -> list[str]:
    """Which strengths break the form of the answer: their length is that of the token limit, and not of a thought."""
    name = "well_formed"
    if name not in base.measures:
        return []
    before = 1 - base.measures[name].value
    worse = [(arm, 1 - arm.measures[name].value) for arm in arms if name in arm.measures]
    return [
        f"At {arm.multiplier:g}, {100 * share:.0f} % of the answers are cut off at the token limit or cannot be read"
        f" ({100 * before:.0f} % unsteered)."
        for arm, share in worse
        if share > before + _WORSE_FORM
    ]


def _ablation_finding(effects: Mapping[str, AblationEffect]) -> str:
    if len(effects) == 1:
        ((name, found),) = effects.items()
        return (
            f"{name}: the given answers become {_less_likely(found.effect)} per token; {found.control} give "
            f"{_middle_95(found.null)} (p = {in_words(found.p_value)}, at best {in_words(found.smallest_p)})."
        )
    found_beyond = [name for name, found in effects.items() if found.p_value <= 0.05]
    which = f": {', '.join(found_beyond)}" if found_beyond else ""
    return (
        f"{len(found_beyond)} of {len(effects)} ablations make the given answers less likely than random ablations"
        f" of the same size do (p ≤ 0.05){which}."
    )


def _less_likely(effect: Estimate) -> str:
    more = effect.value < 0
    turned = Estimate(value=-effect.value, low=-effect.high, high=-effect.low) if more else effect
    return f"{in_words(turned)} nats {'more' if more else 'less'} likely"


def _few_controls(effects: Mapping[str, AblationEffect]) -> list[str]:
    few = [name for name, found in effects.items() if found.smallest_p > 0.05]
    if not few:
        return []
    return [
        f"{', '.join(few)}: fewer than 19 other ablations of this size exist, so p cannot reach 0.05 (see “smallest p”); "
        "look at the effect beside its controls, or use a model with more heads and layers."
    ]
