"""The demo in ten lines: what the model did, what was found, and what its control makes of it; each made from the summary's numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from reasonscope.data.intervals import Estimate
from reasonscope.data.summary import in_hundredths, in_percent, shortest_range

_NEARLY_ALL = 0.9  # of the problems: two methods that write the same texts there are described once


def story(summary: Mapping[str, Any]) -> list[str]:
    """Ten lines for somebody who has never seen the project; a part that was not measured says why."""
    return [
        _answers(summary),
        _requests(summary["traces"]["requests"]),
        _length_probe(summary["length_probe"]),
        _length_controls(summary["length_probe"]),
        _steered_length(summary["seal"]),
        _steered_accuracy(summary["seal"]),
        _other_methods(summary),
        _refusal_probe(summary["refusal_probe"]),
        _cliff(summary["refusal_probe"]),
        _correctness_probe(summary["correctness_probe"]),
    ]


def _answers(summary: Mapping[str, Any]) -> str:
    traces, accuracy = summary["traces"], in_hundredths(summary["organism"]["accuracy"])
    requests = sum(sum(outcomes.values()) for outcomes in traces["requests"].values())
    return (
        f"The model: a small reasoning model thought about {traces['n'] - requests} problems ({traces['thinking_tokens']:.0f} tokens "
        f"on average) and solved {traces['correct']} of them ({accuracy}); it also answered {requests} requests."
    )


def _requests(outcomes: Mapping[str, Mapping[str, int]]) -> str:
    def of(kind: str, outcome: str) -> str:
        return f"{outcomes[kind][outcome]} of {sum(outcomes[kind].values())}"

    return (
        f"Refusal: it refused {of('harmful', 'refused')} harmful requests and {of('benign', 'refused')} benign ones; "
        f"with a jailbreak it complied with {of('harmful, jailbroken', 'complied')} harmful ones."
    )


def _length_probe(found: Mapping[str, Any]) -> str:
    spearman = in_hundredths(_estimate([found["spearman"], *found["ci"]]))
    return (
        "Length probe: the state before the first thinking token tells how long the thinking will be: Spearman correlation "
        f"{spearman} on {found['n_groups']} problems, each read by a probe that never saw it."
    )


def _length_controls(found: Mapping[str, Any]) -> str:
    scores, gain = found["baselines"], found["above_best_text"]
    text = max(scores["prompt_length"], scores["bag_of_words"])
    by = "" if gain is None else f" ({_gain(gain)})"
    said = f"Its controls: the text of the problem reaches {in_hundredths(text)}{by}"
    if "difficulty" not in scores:
        return f"{said}."
    beats = found["spearman"] > scores["difficulty"]
    inside = found["within_difficulty"]
    within = (
        ""
        if inside is None
        else f"; among problems of equally many steps the probe keeps {in_hundredths(_estimate(inside))}"
    )
    return (
        f"{said}; the number of steps that a problem needs reaches {in_hundredths(scores['difficulty'])}, "
        f"{'which the probe beats' if beats else 'which the probe does not beat: it mostly reads difficulty'}{within}."
    )


def _steered_length(found: Mapping[str, Any]) -> str:
    return (
        f"Steering: SEAL's direction (away from second thoughts), clamped, {_change(found)} on {found['n_problems']} problems that it was "
        f"not made from; random vectors that move states as far change it by {_random_change(found)}."
    )


def _steered_accuracy(found: Mapping[str, Any]) -> str:
    return f"Its price: {_accuracy(found)}; with the random vectors it is {_range(found['random_accuracy'])}."


def _other_methods(summary: Mapping[str, Any]) -> str:
    done = {
        title: summary[name]
        for name, title in (("asc", "ASC, clamped,"), ("speed", "thinking speed, clamped,"))
        if name in summary
    }
    if not done:
        return "Two more methods (ASC and thinking speed) were not run; the demo without --quick runs them."
    random = [value for found in done.values() for value in found["random_accuracy"]]
    control = f"random vectors that move states as far change it by {_random_change(*done.values())} at accuracy {_range(random)}"
    said = [f"{title} {_change(found)}, {_accuracy(found)}" for title, found in done.items()]
    same, n = summary.get("same_texts_of_asc_and_speed", 0), summary["seal"]["n_problems"]
    if same >= _NEARLY_ALL * n:
        said[1:] = [
            f"thinking speed finds nearly the same direction and writes the same text on {same} of {n} problems"
        ]
    return f"Two more methods: {'; '.join(said)}; {control}."


def _refusal_probe(found: Mapping[str, Any] | str) -> str:
    if isinstance(found, str):
        return f"Refusal probe: {found}."
    return (
        f"Refusal probe: at the closing tag, a probe tells refusals from compliance among harmful requests with AUROC "
        f"{in_hundredths(_estimate(found['auroc']))}; {_verdict(found)}."
    )


def _cliff(found: Mapping[str, Any] | str) -> str:
    if isinstance(found, str):
        return f"Refusal cliff: {found}."
    cliff = found["cliff"]
    beyond = cliff["drop_beyond_benign"]
    benign = "" if beyond is None else f", {in_hundredths(_estimate(beyond))} more than for benign requests"
    verdict = "which is less" if cliff["above_random"] else "so the fall is not more than chance makes"
    return (
        f"Refusal cliff: if the model complies with harm, its intent to refuse falls by {in_hundredths(_estimate(cliff['drop']))} at the "
        f"closing tag{benign}; random directions fall by {in_hundredths(cliff['random_directions'])} on average and up to "
        f"{in_hundredths(cliff['random_directions_highest'])}, {verdict}."
    )


def _correctness_probe(found: Mapping[str, Any] | str) -> str:
    if isinstance(found, str):
        return f"Correctness probe: {found}."
    return (
        f"Correctness probe: at the closing tag, a probe tells right answers from wrong ones with AUROC "
        f"{in_hundredths(_estimate(found['auroc']))}; {_verdict(found)}."
    )


def _verdict(found: Mapping[str, Any]) -> str:
    """How a probe compares with the best of the baselines that need no probe."""
    gain = found["above_best_baseline"]
    name, score = max(found["baselines"].items(), key=lambda item: item[1])
    said = f"the best simple baseline ({name.replace('_', ' ')}) reaches {in_hundredths(score)} ({_gain(gain)})"
    return said if gain[1] > 0 else f"{said}, so the probe does not beat it"


def _gain(gain: Sequence[float]) -> str:
    return f"difference {in_hundredths(_estimate(gain), signed=True)}"


def _change(found: Mapping[str, Any]) -> str:
    change = _estimate([found["change"], *found["change_ci"]])
    if change.low > 0:
        return f"makes the thinking longer by {in_percent(change)}"
    if change.high < 0:
        turned = Estimate(value=-change.value, low=-change.high, high=-change.low)
        return f"makes the thinking shorter by {in_percent(turned)}"
    return f"leaves the length of the thinking as it is ({in_percent(change)})"


def _accuracy(found: Mapping[str, Any]) -> str:
    before, after = (in_hundredths(found[f"accuracy_{arm}"]) for arm in ("base", "steered"))
    if before == after:
        return f"accuracy stays at {after}"
    verb = "falls" if found["accuracy_steered"] < found["accuracy_base"] else "rises"
    change = in_hundredths(_estimate(found["accuracy_change"]), signed=True)
    return f"accuracy {verb} from {before} to {after} ({change})"


def _random_change(*found: Mapping[str, Any]) -> str:
    changes = sorted(change for one in found for change in one["random_change"])
    return shortest_range([in_percent(change) for change in changes]).replace(" % to", " to")


def _range(values: Sequence[float]) -> str:
    return shortest_range([in_hundredths(value) for value in sorted(values)])


def _estimate(numbers: Sequence[float]) -> Estimate:
    value, low, high = numbers
    return Estimate(value=value, low=low, high=high)
