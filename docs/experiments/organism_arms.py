"""Steering methods and decoding methods on the organism, on planes of thinking tokens and accuracy, for docs/methods.

Vectors, and the predictor of budget guidance, learn from ledgers of the split `train`; their effect is judged on
ledgers of 1 to 4 steps of `test`. Every arm is compared with chance: random vectors, random tokens, a predictor whose
tokens were exchanged. `--run` gets the runs, the numbers (numbers.jsonl) and the figures, which docs/images/draw.py
turns into PNG files; `--only` names some of the planes.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.figures import Figure, points, steering_front, write_figure
from reasonscope.analysis.statistics import result_of_estimates
from reasonscope.data import Problem, Sampling, load_problems
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.steps_and_sentences import steps
from reasonscope.probes import Model, Site, load_model, record
from reasonscope.steering import (
    METHODS,
    AdaptiveSteering,
    Arm,
    Condition,
    DecodingResponse,
    DoseResponse,
    SteeringExperiment,
)
from reasonscope.steering.decoding.budget import BudgetGuidance, LengthPredictor, Trust, train_predictor
from reasonscope.steering.experiments.conditions import method_conditions
from reasonscope.steering.experiments.dose_responses import Moves, run_controls
from reasonscope.steering.experiments.held_out import Asked, respond
from reasonscope.steering.methods.asc import extract_asc
from reasonscope.steering.methods.registry import ExtractionData
from reasonscope.steering.methods.seal import extract_seal
from reasonscope.steering.methods.thinking_speed import extract_speed_of_modes
from reasonscope.steering.vectors.application import VectorUse, as_intervention
from reasonscope.steering.vectors.matched_controls import random_uses
from reasonscope.steering.vectors.operators import scaled_add
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector

SAMPLING = Sampling(temperature=0.7, max_new_tokens=450, seed=0)
Response = DoseResponse | DecodingResponse

# What is drawn together: methods and controls by name, with the strengths and values to run them at; which runs they learn from is below.
PLANES: Mapping[str, tuple[str, ...]] = {
    "clamps": ("seal-clamp:0.6", "asc-clamp:1", "speed-clamp:1"),
    "strength": ("strength:0.2,0.4,0.8",),
    "speed": ("speed:0.1,0.3", "adaptive speed", "adaptive speed of modes"),
    "efficiency": ("efficiency:1,2", "length-probe:4"),
    "decoding-words": ("tip:3", "cyclic-reflex:3", "reflection-bias:-3", "suppress"),
    "decoding-closing": ("close-bias:4,8", "forced-close:0,30,60,120", "budget-forcing:1"),
    "decoding-prefills": ("nothinking", "autothink", "zerothink", "lessthink", "safepath"),
    "budget-guidance": ("budget-guidance:30,60,120,240,10000",),
    "budget-guidance-all": ("budget guidance, all trusted",),
    "added": ("added to modes",),
}
REFUSAL = ("refusal", "refusal-ablate", "refusal-published", "refusal-ablate-published")
REACHES = (0.1, 0.3)  # of the adaptive form: its highest strength as a share of the state's norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/arms"))
    parser.add_argument("--only", nargs="*", default=[*PLANES, "refusal"], help=f"any of {', '.join(PLANES)}, refusal")
    parser.add_argument("--learn", type=int, default=64, help="ledgers (and requests) that the vectors are made from")
    parser.add_argument("--n", type=int, default=40, help="ledgers that they are judged on")
    parser.add_argument("--n-controls", type=int, default=5)
    given = parser.parse_args()
    model = load_model("organism")
    for name in given.only:
        if name == "refusal":
            responses = list(on_requests(model, given.run, given.learn, given.n, given.n_controls))
            figure = refused(responses)
        else:
            responses = list(on_ledgers(model, given.run, PLANES[name], given.learn, given.n, given.n_controls))
            figure = plane(responses)
        (given.run / "figures").mkdir(exist_ok=True)
        write_figure(figure, given.run / "figures" / f"{name}.json")
        with (given.run / "numbers.jsonl").open("a", encoding="utf-8") as kept:
            for response in responses:
                kept.write(json.dumps({"plane": name, response.name: response.to_dict()}) + "\n")
                sys.stdout.write("\n".join(lines(response)) + "\n")
                sys.stdout.flush()


def ledgers(n: int, split: str, mode: str = "") -> list[Problem]:
    """Of 1 to 4 steps."""
    drawn = load_problems(f"ledger{mode}", split=split, n=2 * n)
    return [problem for problem in drawn if (problem.difficulty or 0) <= 4][:n]


def on_ledgers(
    model: Model, run: Path, asked: Sequence[str], learn: int, n: int, n_controls: int
) -> Iterator[Response]:
    experiment = SteeringExperiment(model, ledgers(n, "test"), SAMPLING)
    for one in asked:
        if one.startswith("adaptive"):
            yield adaptive(experiment, source_of(model, run, learn, one), one, n_controls)
            continue
        if one.startswith("added"):
            yield from added(experiment, source_of(model, run, learn, one), n_controls)
            continue
        if one.endswith("all trusted"):
            yield guided(experiment, source_of(model, run, learn, one), one, n_controls)
            continue
        named = Asked.parse(one)
        source = source_of(model, run, learn, named.name)
        yield respond(experiment, source, named, strengths=None, n_controls=n_controls, covariance=False)


def source_of(model: Model, run: Path, learn: int, name: str) -> ExtractionData:
    """What a method learns from: four samples of each ledger; both modes if it compares them; the sites that it needs."""
    sites = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(model.n_layers))]
    folder, problems, samples = "ledgers", ledgers(learn, "train"), 4
    if name.endswith(("clamp", "modes")):
        folder, problems, samples = "modes", [*problems, *ledgers(learn, "train", ":brief")], 1
    elif name == "strength":
        folder, sites, samples = "before", [f"resid_pre.{layer}" for layer in range(model.n_layers)], 1
    store = record(model, problems, run / folder, sites=sites, sampling=SAMPLING, samples=samples, batch_size=64)
    wanted = {problem.id for problem in problems}
    ids = [trace.id for trace in store if trace.problem.id in wanted]
    return ExtractionData(
        model=model, store=store, ids=ids, sites=[Site("resid_post", 4)] if name == "seal-clamp" else None
    )


def guided(experiment: SteeringExperiment, source: ExtractionData, name: str, n_controls: int) -> DecodingResponse:
    """Budget guidance without the released rule of trust, which gives a token no chance where its prediction is not sharp."""
    model, sites = source.model, [Site.parse(site) for site in source.store.sites]
    predictor, loss = train_predictor(source.store, sites, vocabulary=model.vocabulary, ids=source.ids)
    sys.stdout.write(json.dumps({"loss of the predictor, nats": loss}) + "\n")

    def condition(one: LengthPredictor, budget: float) -> Condition:
        trust = Trust(rate=0.0, mode=-1.0)
        guidance = BudgetGuidance(model, one, sites, budget=int(budget), temperature=SAMPLING.temperature, trust=trust)
        return Condition(name=name, multiplier=budget, intervention=guidance, processors=(guidance,))

    budgets = (30.0, 60.0, 120.0, 240.0, 10000.0)
    exchanged = [predictor.with_tokens_exchanged(seed) for seed in range(n_controls)]
    arms = [condition(predictor, budget) for budget in budgets]
    chance = [condition(one, budget) for one in exchanged for budget in budgets]
    return responded(experiment, name, "tokens", arms, chance, "its weights on other tokens")


def adaptive(experiment: SteeringExperiment, source: ExtractionData, name: str, n_controls: int) -> DecodingResponse:
    """Adaptive speed on the axis of a forced first word, or of the modes; strengths from −reach/2 to reach in steps of reach/4.

    Beside it the same vector at the one strength that moves a token as far, and random vectors in the place of that.
    """
    (part,) = METHODS["speed"].parts(source)
    vector, norms = part.vector, part.vector.provenance["stream_norms"]
    if name.endswith("modes"):
        modes = extract_speed_of_modes(source.store, list(vector.directions), read="separators", ids=source.ids)
        vector = replace(vector, directions=modes.directions)
    vector = replace(vector, directions={site: u * norms[str(site)] for site, u in vector.directions.items()})
    conditions = [adapting(experiment.model, vector, reach, name) for reach in REACHES]
    arms, steady, chance = experiment.arms([condition for condition, _ in conditions]), [], []
    for reach, (_, steering) in zip(REACHES, conditions, strict=True):
        drawn = method_conditions(
            f"{name}, the same strength everywhere", [steering.steady()], 1.0, n_controls=n_controls
        )
        constant, *random = [replace(one, multiplier=reach) for one in drawn]
        steady.append(constant)
        chance += random
    return DecodingResponse(
        name=name,
        unit="of the norm",
        base=experiment.base_arm,
        arms=(*arms, *experiment.arms(steady)),
        controls=tuple(experiment.arms(chance)),
        control_name="random vectors that move a token as far",
    )


def responded(
    experiment: SteeringExperiment,
    name: str,
    unit: str,
    arms: Sequence[Condition],
    chance: Sequence[Condition],
    control_name: str,
) -> DecodingResponse:
    """What the treatments do, and those that chance puts in their place."""
    return DecodingResponse(
        name=name,
        unit=unit,
        base=experiment.base_arm,
        arms=tuple(experiment.arms(arms)),
        controls=tuple(experiment.arms(chance)),
        control_name=control_name,
    )


def added(experiment: SteeringExperiment, source: ExtractionData, n_controls: int) -> Iterator[DecodingResponse]:
    """SEAL, ASC and speed without clamps, and what becomes of SEAL one block later, with random vectors for the first strength of each."""
    for name, (use, *strengths) in added_uses(source).items():
        arms = experiment.arms([method_conditions(name, [use], strength)[0] for strength in strengths])
        controls = [partial(random_like, name, use, strengths[0], i, arms[0].moves) for i in range(1, n_controls + 1)]
        runs = run_controls(experiment, controls, [arms[0]] * n_controls)
        chance = [experiment.arm(f"random {i}, {name}", strengths[0], run) for i, run in enumerate(runs, start=1)]
        yield DecodingResponse(
            name=name,
            unit="strength",
            base=experiment.base_arm,
            arms=tuple(arms),
            controls=tuple(chance),
            control_name="random vectors that move a token as far",
        )


def random_like(name: str, use: VectorUse, strength: float, seed: int, moves: Moves, pilot: Moves) -> Condition:
    """A random vector in place of `use`."""
    drawn = as_intervention(random_uses([use], seed, moves=moves, pilot=pilot), strength)
    return Condition(name=f"random {seed}, {name}", multiplier=strength, intervention=drawn)


def added_uses(source: ExtractionData) -> dict[str, tuple[VectorUse, *tuple[float, ...]]]:
    """Each vector with the place of its edit, then its strengths."""
    model, store = source.model, source.store
    plain = [trace.id for trace in source.traces if trace.problem.meta.get("mode") != "brief"]
    separators, prompt = Scope.thinking(model, at_separators=True), Scope(prompt_positions=(-1,))
    each_pass = Scope(prompt_positions=(-1,), generation_window=(0, None))
    early, middle, late = (Site("resid_post", layer) for layer in (2, 3, 4))
    seal = extract_seal(store, early, ids=plain)
    transition = extract_seal(store, late, ids=plain, away_from=("transition",))
    asc = {
        read: extract_asc(store, [at], read=read, verbose="default") for read, at in (("prompt", late), ("end", middle))
    }
    (speed,) = METHODS["speed"].parts(replace(source, ids=plain, sites=[middle, late]))
    moved = replace(seal, directions={middle: seal.directions[early]})
    later = extract_seal(store, middle, ids=plain)
    means = step_means(store, early, plain)
    apart = means["execution"] - means["reflection"] - means["transition"]
    norm = np.linalg.norm(seal.directions[early])
    three = replace(seal, directions={early: (apart * norm / np.linalg.norm(apart)).astype(np.float32)})
    for name, other in (("a block later", later.directions[middle]), ("E − R − T", three.directions[early])):
        sys.stdout.write(f"cosine of SEAL's vector with that of {name}: {cosine(seal.directions[early], other):.3f}\n")
    return {
        "seal": (VectorUse(vector=seal, scope=separators), 1.0, -1.0, 0.5),
        "seal, added one block later": (VectorUse(vector=moved, scope=separators), 1.0),
        "seal, E − R − T": (VectorUse(vector=three, scope=separators), 1.0),
        "seal-transition": (VectorUse(vector=transition, scope=separators), 1.0),
        "asc, end of the prompt": (VectorUse(vector=asc["prompt"], scope=prompt), 0.5, -0.5),
        "asc": (VectorUse(vector=asc["end"], scope=each_pass), 0.5),
        "speed": (VectorUse(vector=speed.vector, scope=prompt, operator=scaled_add), 0.3, -0.3),
    }


def step_means(store: TraceStore, site: Site, ids: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The mean state at the separator of each kind of step."""
    states: dict[str, list[NDArray[np.float64]]] = {}
    for id in ids:
        rows = store.activations(id, str(site))
        for step in steps(store.trace(id)):
            if step.separator < len(rows):
                states.setdefault(step.kind, []).append(np.asarray(rows[step.separator], dtype=np.float64))
    return {kind: np.mean(found, axis=0) for kind, found in states.items()}


def cosine(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def adapting(model: Model, vector: SteeringVector, reach: float, name: str) -> tuple[Condition, AdaptiveSteering]:
    """The condition, and what steers in it, which knows afterwards how far it moved a token."""
    steering = AdaptiveSteering(
        model, vector, monitored=range(model.n_layers - 1), lowest=-reach / 2, highest=reach, step=reach / 4
    )
    return Condition(name=name, multiplier=reach, intervention=steering, processors=(steering,)), steering


def on_requests(model: Model, run: Path, learn: int, n: int, n_controls: int) -> Iterator[Response]:
    """Learned from requests on half of the topics, judged on the other half."""
    kinds = {kind: load_problems(f"requests:{kind}", n=4 * n) for kind in ("harmful", "twin")}
    topics = sorted({problem.group for problem in kinds["harmful"]})
    learned = set(topics[: len(topics) // 2])
    asked = [one for one in load_problems("requests", split="train", n=3 * learn) if one.group in learned][:learn]
    judged = [one for drawn in kinds.values() for one in [p for p in drawn if p.group not in learned][: 2 * n // 3]]
    sites = [f"resid_pre.{layer}" for layer in range(model.n_layers)]
    store = record(model, asked, run / "requests", sites=sites, sampling=SAMPLING, batch_size=64)
    experiment, source = (
        SteeringExperiment(model, judged, SAMPLING),
        ExtractionData(model=model, store=store, ids=store.ids),
    )
    for name in REFUSAL:
        try:
            yield respond(
                experiment,
                source,
                Asked(name=name),
                strengths=None,
                n_controls=n_controls,
                covariance=False,
            )
        except ValueError as error:  # the published rule may find no direction
            sys.stdout.write(f"{name}: {error}\n")


def plane(responses: Sequence[Response]) -> Figure:
    """The plane of all, from the lowest accuracy on that any arm may have."""
    arms = [
        arm for one in responses for arm in (*one.controls, *(arm for curve in one.curves.values() for arm in curve))
    ]
    lowest = min(arm.accuracy.low for arm in arms)
    return steering_front(responses).update_yaxes(range=[max(0.0, lowest - 0.1), 1.08])


def refused(responses: Sequence[Response]) -> Figure:
    """Share of harmful requests and of benign twins that are refused, by arm; grey is the range of the random directions."""
    measures = {"refused_harmful": "harmful requests refused", "refused_benign": "benign twins refused"}
    rows = {"unsteered": (responses[0].base, ())}
    rows |= {arm.name: (arm, one.controls) for one in responses for arm in next(iter(one.curves.values()))}
    found = {name: {text: arm.measures[key] for key, text in measures.items()} for name, (arm, _) in rows.items()}
    chance = {}
    for name, (_, controls) in rows.items():
        drawn = {text: [arm.measures[key].value for arm in controls] for key, text in measures.items()}
        chance[name] = {text: (min(values), max(values)) for text, values in drawn.items() if values}
    return points(
        result_of_estimates(
            found,
            chance,
            method="refusal",
            quantity="share of requests that are refused",
            null="range of random directions, moved as far",
        )
    )


def lines(response: Response) -> Iterator[str]:
    """Every arm in a line: tokens, their change, and the difference of what it is judged by, with 95 % intervals over problems."""
    arms = [response.base, *(arm for curve in response.curves.values() for arm in curve), *response.controls]
    yield f"{response.name}, {response.base.n_problems} problems"
    for arm in arms:
        shown = {"tokens": arm.tokens, "change": arm.change}
        shown |= {
            f"Δ {name}": one for name, one in arm.differences.items() if name in ("accuracy", "kl", "well_formed")
        }
        shown |= {name: one for name, one in arm.measures.items() if name.startswith("refused_")}
        numbers = "  ".join(f"{name} {one.value:.3f} ({one.low:.3f} … {one.high:.3f})" for name, one in shown.items())
        yield f"  {arm.name} at {arm.multiplier:g}: {numbers}  touched {arm.n_edited}, moved by {moved(arm)}"


def moved(arm: Arm) -> str:
    """The distance of an edited token in total, and at each site if there are several."""
    each = ", ".join(f"{site} {by:.0f}" for site, by in arm.distances.items()) if len(arm.distances) > 1 else ""
    return f"{arm.distance:.0f}" + (f" ({each})" if each else "")


if __name__ == "__main__":
    main()
