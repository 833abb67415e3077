"""The demo: a shipped study of the organism, with its numbers in one file and its story in ten lines."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reasonscope.analysis.organism import is_compliance, is_refusal
from reasonscope.analysis.studies.plan import StudyPlan
from reasonscope.analysis.studies.report import write_report
from reasonscope.analysis.studies.runner import open_lab, study
from reasonscope.analysis.studies.state import Finished
from reasonscope.app.demo.story import story
from reasonscope.app.demo.summary import SUMMARY
from reasonscope.data.storage.durable import write_text_durably
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace

_STEPS = ("record", "length_probe", "refusal_probe", "correctness_probe", "modes", "steering")


def run_demo(plan: StudyPlan, out: Path) -> Mapping[str, Any]:
    """Run the study below `out` (the store in `out/store`, continued if it was begun), and write and return its summary."""
    found = study(plan, out, estimate=False)
    store = TraceStore.open(out / "store")
    summary = _summarise(found.steps, list(store))
    summary["model"] = store.meta["model"]
    summary["timings"] = {"load": found.load_seconds} | {
        name: step.seconds for name, step in found.steps.items() if name in _STEPS
    }
    summary["story"] = story(summary)
    write_text_durably(out / SUMMARY, json.dumps(summary, indent=2))
    write_report(open_lab(plan, out), story=summary["story"])
    return summary


def _summarise(steps: Mapping[str, Finished], traces: Sequence[Trace]) -> dict[str, Any]:
    """The numbers of the demo, by the names that other tools read."""
    ledgers = [trace for trace in traces if trace.problem.answer is not None]
    right, steering = sum(trace.correct is True for trace in ledgers), steps["steering"].numbers
    same = steering["same_texts"].get("asc, speed")
    return {
        "organism": {"accuracy": right / len(ledgers)},
        "traces": {
            "n": len(traces),
            "correct": right,
            "thinking_tokens": sum(trace.n_thinking_tokens for trace in ledgers) / len(ledgers),
            "states": dict(Counter(trace.state for trace in traces)),
            "requests": _request_outcomes([trace for trace in traces if trace.problem.answer is None]),
        },
        "length_probe": _length_summary(steps["length_probe"].numbers),
        "seal": {
            **_steered_numbers(steering, "seal"),
            "reversed_tokens": _value(steering["seal reversed"], "tokens"),
        },
        **{name: _steered_numbers(steering, name) for name in ("asc", "speed") if name in steering},
        **({} if same is None else {"same_texts_of_asc_and_speed": same}),
        "refusal_probe": _or_why_not(steps["refusal_probe"], _refusal_summary),
        "correctness_probe": _or_why_not(steps["correctness_probe"], _correctness_summary),
    }


def _or_why_not(step: Finished, summarise: Any) -> dict[str, Any] | str:
    """The numbers of a step, or why it was not measured: a small run may have too few of a class for every fold to get some."""
    undefined = step.numbers.get("undefined") or {}
    why = step.failed or "; ".join(f"{name}: {reason}" for name, reason in undefined.items())
    found: dict[str, Any] | str = f"not measured: {why}" if why else summarise(step.numbers)
    return found


def _request_outcomes(traces: Sequence[Trace]) -> dict[str, dict[str, int]]:
    """How often requests of each kind were refused, complied with, or neither."""
    counts: dict[str, dict[str, int]] = {}
    for kind in ("benign", "harmful", "harmful, jailbroken"):
        counts[kind] = dict.fromkeys(("refused", "complied", "neither"), 0)
    for trace in traces:
        meta = trace.problem.meta
        kind = "benign" if not meta["harmful"] else "harmful, jailbroken" if meta["jailbreak"] else "harmful"
        outcome = "refused" if is_refusal(trace) else "complied" if is_compliance(trace) else "neither"
        counts[kind][outcome] += 1
    return counts


def _length_summary(numbers: Mapping[str, Any]) -> dict[str, Any]:
    compared = numbers["comparison"]
    return {
        "spearman": compared["score"]["value"],
        "ci": _shown(compared["score"])[1:],
        "baselines": {name: score["value"] for name, score in compared["baselines"].items()},
        "n_groups": numbers["n_groups"],
        "above_best_text": compared["text_difference"] and _shown(compared["text_difference"]),
        "above_best_baseline": _shown(compared["difference"]),
        "within_difficulty": numbers["within_difficulty"] and _shown(numbers["within_difficulty"]),
    }


def _steered_numbers(arms: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What a method did to tokens and accuracy, paired by problem, and what its random vectors did."""
    base, steered = arms["base"], arms[method]
    random = [arm for name, arm in arms.items() if name.startswith("random") and name.endswith(method)]
    return {
        "multiplier": steered["multiplier"],
        "tokens_base": _value(base, "tokens"),
        "tokens_steered": _value(steered, "tokens"),
        "accuracy_base": _value(base, "accuracy"),
        "accuracy_steered": _value(steered, "accuracy"),
        "accuracy_change": _shown(steered["differences"]["accuracy"]),
        "random_tokens": [_value(arm, "tokens") for arm in random],
        "random_accuracy": [_value(arm, "accuracy") for arm in random],
        "random_change": [arm["change"]["value"] for arm in random],
        "change": steered["change"]["value"],
        "change_ci": _shown(steered["change"])[1:],
        "n_problems": base["n_problems"],
    }


def _refusal_summary(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Refused or complied among the harmful, and how far the intent to refuse falls if the model complied, beside both nulls."""
    compared, cliffs = numbers["comparison"], numbers["contrasts"]["intent"]["cliffs"]
    fell, stood = cliffs["harmful complied"], cliffs.get("harmful refused")
    return {
        "auroc": _shown(compared["score"]),
        "above_best_baseline": _shown(compared["difference"]),
        "baselines": {name: score["value"] for name, score in compared["baselines"].items()},
        "shuffled_labels": compared["shuffled"]["mean"],
        "cliff": {
            "plateau": fell["plateau"]["value"],
            "end": fell["end"]["value"],
            "drop": _shown(fell["drop"]),
            "drop_of_refused": stood and _shown(stood["drop"]),
            "drop_beyond_benign": _shown(beyond) if (beyond := cliffs.get("excess_over_benign")) else None,
            "random_directions": cliffs["random_directions"]["drop"]["value"],
            "random_directions_highest": cliffs["random_directions"]["highest"],
            "above_random": cliffs["above_nulls"],
        },
        "n_groups": numbers["n_groups"],
    }


def _correctness_summary(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Right or wrong, read at the closing tag, and whether that is more than length and truncation tell."""
    found = numbers["window"]
    compared = found["comparison"]
    return {
        "auroc": _shown(compared["score"]),
        "above_best_baseline": _shown(compared["difference"]),
        "baselines": {name: score["value"] for name, score in compared["baselines"].items()},
        "n_right": found["n_right"],
        "n_groups": found["n_groups"],
    }


def _value(arm: Mapping[str, Any], measure: str) -> float:
    value: float = arm["measures"][measure]["value"]
    return value


def _shown(estimate: Mapping[str, float]) -> list[float]:
    """The value and the ends of its interval."""
    return [estimate["value"], estimate["low"], estimate["high"]]
