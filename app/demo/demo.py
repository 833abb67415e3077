"""The demo: record the shipped organism, probe it, steer it, and write down what came out."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from reasonscope import probes
from reasonscope.analysis import figures
from reasonscope.analysis.organism import is_compliance, is_refusal
from reasonscope.analysis.runs.probe_reports import (
    correctness_figures,
    length_figures,
    refusal_figures,
)
from reasonscope.analysis.runs.saved_numbers import save_numbers
from reasonscope.app.demo.report import write_report
from reasonscope.app.demo.story import story
from reasonscope.app.demo.summary import SUMMARY
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.intervals import Estimate
from reasonscope.data.progress import say, working
from reasonscope.data.storage.durable import make_folder, write_text_durably
from reasonscope.data.storage.run_folder import RunFolder, run_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Sampling, Trace
from reasonscope.probes.architecture.sites import Site, expand_sites
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import Model, load_model
from reasonscope.probes.properties.correctness_probe import CorrectnessReport
from reasonscope.probes.properties.length_probe import LengthReport
from reasonscope.probes.properties.refusal_probe import CONTRASTS, RefusalReport
from reasonscope.steering import METHODS, Arm, ExtractionData, SteeringExperiment, VectorUse
from reasonscope.steering.experiments.conditions import method_conditions, random_conditions
from reasonscope.steering.experiments.experiment import ArmMeasurements
from reasonscope.steering.recipes.files import SUFFIX
from reasonscope.steering.recipes.recipe import Recipe

T = TypeVar("T")

DEMO_CONTRASTS = {name: CONTRASTS[name] for name in ("refusal", "intent")}
REFUSAL_FIGURES = ("refusal_scores", "intent_trajectories", "intent_cliffs")
# Multipliers, chosen on `validation` (docs/steering.md): a clamp at 1 goes all the way to the other class.
SEAL = 0.6
STRENGTHS = {"seal": SEAL, "asc": 1.0, "speed": 1.0}
MODES = "modes"  # the folder of what was answered in both modes, beside the store
SAMPLING = Sampling(temperature=0.7, max_new_tokens=900, seed=0)
BATCH = 100  # traces that are written together: all of the quick demo; larger batches take fewer passes and more memory


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much the demo does.

    Attributes:
        ledgers: Problems of the first set.
        requests: Problems of the second set.
        steered: Ledgers that are held out and steered.
        methods: Steering methods, SEAL among them.
        briefly: Ledgers that are also answered briefly; the methods other than SEAL learn from these.
    """

    ledgers: int = 240
    requests: int = 160
    steered: int = 40
    methods: tuple[str, ...] = ("seal", "asc", "speed")
    briefly: int = 48


QUICK = Size(ledgers=64, requests=32, steered=24, methods=("seal",))


@dataclass
class _Clock:
    """Seconds of each part, in order; a listener hears when a part begins, and how far it is."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, what: str) -> Iterator[None]:
        say(f"· {what}")
        began = time.monotonic()
        with working(name.replace("_", " ")):
            yield
        self.seconds[name] = round(time.monotonic() - began, 2)


def run_demo(out: Path, *, size: Size) -> Mapping[str, Any]:
    """Run the demo below `out` (the store in `out/store`, continued if it was begun) and return the summary."""
    clock = _Clock()
    with clock.part("load", "loading the organism, a small reasoning model"):
        model = load_model("organism")
    problems = load_problems("ledger", n=size.ledgers) + load_problems("requests", n=size.requests)
    with clock.part("record", f"recording {len(problems)} traces with the residual stream of every layer"):
        sites = expand_sites("resid_post.*", model.n_layers)
        store = record(model, problems, out / "store", sites=sites, sampling=SAMPLING, batch_size=BATCH)
    traces = list(store)
    ledgers = [trace for trace in traces if trace.problem.answer is not None]
    requests = [trace for trace in traces if trace.problem.answer is None]
    with clock.part("length_probe", "predicting how long it will think from the last prompt token"):
        probe = probes.length(store, ledgers)
    with clock.part("refusal_probe", "predicting from the closing tag whether it will refuse"):
        refusal = _or_why_not(lambda: _whole(probes.refusal(store, requests, contrasts=DEMO_CONTRASTS)))
    with clock.part("correctness_probe", "predicting from the closing tag whether the answer will be right"):
        correctness = _or_why_not(lambda: probes.correctness(store, ledgers))
    with clock.part("steering", f"steering held-out problems by {', '.join(size.methods)}"):
        methods = _steering_parts(model, store, out / MODES, ledgers[: -size.steered], size)
        arms, same_texts = _steer_held_out(model, methods, ledgers[-size.steered :])
    where = run_folder(out)
    _keep_probes(where, out, probe, refusal, correctness, requests)
    _keep_steering(where, out, methods, arms)
    summary: dict[str, Any] = {
        **_summarise(model, ledgers, requests, probe, arms, same_texts),
        "refusal_probe": refusal if isinstance(refusal, str) else _refusal_summary(refusal),
        "correctness_probe": correctness if isinstance(correctness, str) else _correctness_summary(correctness),
        "model": dict(model.fingerprint),
        "timings": dict(clock.seconds),
    }
    summary["story"] = story(summary)
    write_text_durably(out / SUMMARY, json.dumps(summary, indent=2))
    drawn = [
        figures.thinking_by_difficulty(ledgers),
        figures.answers_by_request(_request_outcomes(requests)),
        figures.length_prediction(probe),
        figures.length_scores(probe),
        *([] if isinstance(refusal, str) else [refusal_figures(refusal, requests)[name] for name in REFUSAL_FIGURES]),
        figures.steering_plane(arms),
    ]
    write_report(out, summary, drawn)
    return summary


def _record_modes(model: Model, out: Path, size: Size) -> TraceStore:
    """Record ledgers that are not held out, asked plainly and asked to be brief: what ASC and thinking speed learn from."""
    n = min(size.briefly, size.ledgers - size.steered)
    problems = [p for mode in ("ledger", "ledger:brief") for p in load_problems(mode, n=size.ledgers)[:n]]
    sites = expand_sites("resid_post.*", model.n_layers)
    return record(model, problems, out, sites=sites, sampling=SAMPLING, batch_size=BATCH)


def _steering_parts(
    model: Model, store: TraceStore, modes: Path, ledgers: list[Trace], size: Size
) -> dict[str, tuple[VectorUse, ...]]:
    """The vectors of the methods of `size`, from problems that are not held out; SEAL's at the input of the last block."""
    site = [Site("resid_post", model.n_layers - 2)]
    steps = ExtractionData(model=model, store=store, ids=[trace.id for trace in ledgers], sites=site)
    parts = {"seal": METHODS["seal-clamp"].parts(steps)}
    if others := [name for name in size.methods if name != "seal"]:
        pairs = _record_modes(model, modes, size)
        learned = ExtractionData(model=model, store=pairs, ids=pairs.ids)
        parts |= {name: METHODS[f"{name}-clamp"].parts(learned) for name in others}
    return parts


def _steer_held_out(
    model: Model, methods: Mapping[str, Sequence[VectorUse]], held: list[Trace]
) -> tuple[list[Arm], int | None]:
    """The effect of each method on the problems of `held`, SEAL's reverse, and then two random ones of each, which move states as far.

    Also on how many problems ASC and thinking speed write the same text; None unless both ran.
    """
    reverse = method_conditions("seal reversed", methods["seal"], -SEAL)
    conditions = [method_conditions(name, parts, STRENGTHS[name])[0] for name, parts in methods.items()]
    experiment = SteeringExperiment(model, [trace.problem for trace in held], SAMPLING, on_given_text=False)
    runs = experiment.run_all([*reverse, *conditions])
    arms = [
        experiment.arm(one.name, one.multiplier, run) for one, run in zip([*reverse, *conditions], runs, strict=True)
    ]
    steered = dict(zip(methods, arms[1:], strict=True))
    random = [
        condition
        for name, parts in methods.items()
        for condition in random_conditions(name, parts, STRENGTHS[name], n_controls=2, moves=steered[name].moves)
    ]
    return [experiment.base_arm, *arms, *experiment.arms(random)], _same_texts(
        dict(zip(methods, runs[1:], strict=True))
    )


def _same_texts(runs: Mapping[str, ArmMeasurements]) -> int | None:
    if not {"asc", "speed"} <= set(runs):
        return None
    pairs = zip(runs["asc"].traces, runs["speed"].traces, strict=True)
    return sum(one.text == other.text for one, other in pairs)


def _keep_probes(
    where: RunFolder,
    out: Path,
    length: LengthReport,
    refusal: RefusalReport | str,
    correctness: CorrectnessReport | str,
    requests: list[Trace],
) -> None:
    """Save what the probe commands save, as far as it was measured."""
    command = f"reasonscope probe {{}} --run {out} --seed 0"
    kept = {"length": length.probe}
    drawn = length_figures(length)
    save_numbers(
        where, "length", length.to_dict(), command=command.format("length"), seed=0, figures=drawn, probes=kept
    )
    if not isinstance(refusal, str):
        line, drawn = command.format("refusal"), refusal_figures(refusal, requests)
        save_numbers(where, "refusal", refusal.to_dict(), command=line, seed=0, figures=drawn, probes=refusal.probes)
    if not isinstance(correctness, str):
        numbers, drawn = {"window": correctness.to_dict()}, correctness_figures([correctness])
        kept, line = {"correctness": correctness.probe}, command.format("correctness")
        save_numbers(where, "correctness", numbers, command=line, seed=0, figures=drawn, probes=kept)


def _keep_steering(where: RunFolder, out: Path, methods: Mapping[str, Sequence[VectorUse]], arms: list[Arm]) -> None:
    """Save SEAL as a recipe, and what the methods and their controls did."""
    make_folder(where.vectors)
    recipe = Recipe.of(methods["seal"], name="seal", provenance={"method": "seal", "run": str(out)})
    recipe.save(where.vectors / f"seal{SUFFIX}")
    numbers = {arm.name: arm.to_dict() for arm in arms}
    drawn = {"steering_plane": figures.steering_plane(arms)}
    save_numbers(where, "steering", numbers, command=f"reasonscope demo --out {out}", seed=SAMPLING.seed, figures=drawn)


def _request_outcomes(traces: list[Trace]) -> dict[str, dict[str, int]]:
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


def _summarise(
    model: Model,
    ledgers: list[Trace],
    requests: list[Trace],
    probe: LengthReport,
    arms: list[Arm],
    same_texts: int | None,
) -> dict[str, Any]:
    """The numbers of the demo, by the names that other tools read."""
    named = {arm.name: arm for arm in arms}
    return {
        "organism": {"accuracy": sum(trace.correct is True for trace in ledgers) / len(ledgers)},
        "traces": {
            "n": len(ledgers) + len(requests),
            "correct": sum(trace.correct is True for trace in ledgers),
            "thinking_tokens": sum(trace.n_thinking_tokens for trace in ledgers) / len(ledgers),
            "states": dict(Counter(trace.state for trace in [*ledgers, *requests])),
            "requests": _request_outcomes(requests),
        },
        "length_probe": {
            "spearman": probe.comparison.score.value,
            "ci": list(probe.comparison.score.interval),
            "baselines": {name: score.value for name, score in probe.comparison.baselines.items()},
            "n_groups": probe.n_groups,
            "above_best_text": None
            if probe.comparison.text_difference is None
            else _shown(probe.comparison.text_difference),
            "above_best_baseline": _shown(probe.comparison.difference),
            "within_difficulty": None if probe.within_difficulty is None else _shown(probe.within_difficulty),
        },
        "seal": {**_steered_numbers(named, "seal"), "reversed_tokens": named["seal reversed"].tokens.value},
        **{name: _steered_numbers(named, name) for name in ("asc", "speed") if name in named},
        **({} if same_texts is None else {"same_texts_of_asc_and_speed": same_texts}),
    }


def _steered_numbers(named: Mapping[str, Arm], method: str) -> dict[str, Any]:
    """What a method did to tokens and accuracy, paired by problem, and what its random vectors did."""
    base, steered = named["base"], named[method]
    random = [arm for name, arm in named.items() if name.startswith("random") and name.endswith(method)]
    return {
        "multiplier": steered.multiplier,
        "tokens_base": base.tokens.value,
        "tokens_steered": steered.tokens.value,
        "accuracy_base": base.accuracy.value,
        "accuracy_steered": steered.accuracy.value,
        "accuracy_change": _shown(steered.differences["accuracy"]),
        "random_tokens": [arm.tokens.value for arm in random],
        "random_accuracy": [arm.accuracy.value for arm in random],
        "random_change": [arm.change.value for arm in random],
        "change": steered.change.value,
        "change_ci": list(steered.change.interval),
        "n_problems": base.n_problems,
    }


def _refusal_summary(found: RefusalReport) -> dict[str, Any]:
    """Refused or complied among the harmful, and how far the intent to refuse falls where the model complied, beside both nulls."""
    among_harmful, study = found.comparison, found.cliffs["intent"]
    fell, stood = study.cliffs["harmful", "complied"], study.cliffs.get(("harmful", "refused"))
    return {
        "auroc": _shown(among_harmful.score),
        "above_best_baseline": _shown(among_harmful.difference),
        "baselines": {name: score.value for name, score in among_harmful.baselines.items()},
        "shuffled_labels": float(among_harmful.shuffled.null.mean()),
        "cliff": {
            "plateau": fell.plateau.value,
            "end": fell.end.value,
            "drop": _shown(fell.drop),
            "drop_of_refused": None if stood is None else _shown(stood.drop),
            "drop_beyond_benign": None if study.excess is None else _shown(study.excess),
            "random_directions": float(study.random.mean()),
            "random_directions_highest": float(study.random.max()),
            "above_random": study.above_nulls,
        },
        "n_groups": found.n_groups,
    }


def _correctness_summary(found: CorrectnessReport) -> dict[str, Any]:
    """Right or wrong, read at the closing tag, and whether that is more than length and truncation tell."""
    return {
        "auroc": _shown(found.comparison.score),
        "above_best_baseline": _shown(found.comparison.difference),
        "baselines": {name: score.value for name, score in found.comparison.baselines.items()},
        "n_right": found.n_right,
        "n_groups": found.n_groups,
    }


def _shown(estimate: Estimate) -> list[float]:
    """The value and the ends of its interval."""
    return [estimate.value, *estimate.interval]


def _whole(found: RefusalReport) -> RefusalReport:
    """`found`, if nothing of it is undefined: the demo shows both contrasts and the cliff. Raises InputError otherwise."""
    if found.undefined:
        raise InputError("; ".join(f"{name}: {why}" for name, why in found.undefined.items()))
    return found


def _or_why_not(measure: Callable[[], T]) -> T | str:
    """Measure it, or say why not: a small run may have too few of a class for every fold to get some."""
    try:
        return measure()
    except InputError as error:
        return f"not measured: {error}"
