"""The example run that ships: results of the demo, a sweep and the analyses on the organism, for a part of its traces."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from reasonscope.app.demo.summary import SUMMARY
from reasonscope.data.progress import tracked
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.run_folder import RunFolder, run_folder
from reasonscope.data.storage.store import TraceStore

EXAMPLE = Path(str(files("reasonscope.app").joinpath("example")))
_SHOWN = 4  # every fourth trace ships
_ANALYSED = 2  # traces that are analysed sentence by sentence
MANY = 30  # traces whose words at peaks and receiver heads are looked at together
KEPT = 6  # as many of these ship with curves of their own
_SWEPT = ("seal", "length-probe")
_JUDGED = 20  # held-out problems of the sweep
_SCORED = ("length", "intent", "correctness")
_ANALYSES = (
    *(
        "mi",
        "mi_compare",
        "entropy",
        "alternatives",
        "steering_shift",
        "reflection",
        "heads",
        "attention_map",
        "receivers",
    ),
    *("suppression", "anchors", "confidence", "trajectory", "agreement", "cliff"),
)
_DRAWN_LIVE = ("thinking_by_difficulty", "answers_by_request")  # figures that the app draws from the traces
_OF_MANY = ("mi", "mi_base", "head_kurtosis", "receiver_scores")


def write_example(
    out: Path, *, begun: Path, plan: str | Path = "demo", rollouts: int = 20, every: int = _SHOWN
) -> None:
    """Record, probe, steer and analyse the organism, and write what the app shows to `out`, which is replaced at the end.

    The numbers of probes and steering are those of the whole demo. Only one of `every` traces ships; the sweep and the analyses are made on
    these. The activations, which are most of a run's bytes, are left out, and so are the report and the HTML figures. Until all is there it
    is in `begun`, and a call that was interrupted goes on from its last finished step.
    """
    from reasonscope.analysis.studies.plan import read_plan
    from reasonscope.app.demo.demo import run_demo

    once = _Once(begun / "finished")
    once("demo", lambda: run_demo(read_plan(plan), begun))
    where = run_folder(begun)  # what it is shows only now
    once("part", lambda: _keep_part(where.store, TraceStore.open(where.store).ids[::every]))
    _measure(where, once, rollouts=rollouts)
    store = TraceStore.open(where.store)
    n = json.loads((begun / SUMMARY).read_text(encoding="utf-8"))["traces"]["n"]
    note = f"{len(store)} of the {n} traces that the numbers are of; the activations were left out"
    once("without activations", lambda: _keep_part(where.store, store.ids, note=note))
    for numbers in where.numbers.glob("*.json"):
        text = numbers.read_text(encoding="utf-8").replace(str(begun), "runs/demo")
        numbers.write_text(json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    unread = ("*.html", ".lock", "modes", "steps", once.folder.name, *(f"{name}.json" for name in _DRAWN_LIVE))
    shutil.copytree(begun, out, ignore=shutil.ignore_patterns(*unread))
    shutil.rmtree(begun)


@dataclass(frozen=True)
class _Once:
    """Does each step unless an earlier call finished it; `folder` has an empty file for each that is finished."""

    folder: Path

    def __call__(self, name: str, step: Callable[[], object]) -> None:
        if not (mark := self.folder / name).exists():
            step()
            make_folder(self.folder)
            mark.touch()


def _measure(where: RunFolder, once: _Once, *, rollouts: int) -> None:
    """Score, sweep and analyse the run in `where`, whose store has the residual stream after every block."""
    from reasonscope.probes.fitting.linear_probes import LinearProbe
    from reasonscope.probes.properties.scores import write_scores

    store = TraceStore.open(where.store)
    for kept in [where.probes / f"{name}.safetensors" for name in _SCORED]:
        if kept.exists():
            once(
                kept.name,
                partial(write_scores, LinearProbe.load(kept), store, where.scores / kept.name, name=kept.stem),
            )
    once("sweep", lambda: _sweep(where, store))
    _analyse(where, once, store, rollouts)


def _sweep(where: RunFolder, store: TraceStore) -> None:
    """The dose-response of two methods on held-out problems, and their recipes."""
    from reasonscope.analysis.figures import sweep_figures
    from reasonscope.analysis.runs.saved_numbers import save_numbers
    from reasonscope.steering.experiments.experiment import SteeringExperiment
    from reasonscope.steering.experiments.held_out import (
        Asked,
        model_of_run,
        respond,
        sampling_of_run,
        source_of_run,
        split_run,
    )
    from reasonscope.steering.methods.registry import method
    from reasonscope.steering.recipes.files import SUFFIX
    from reasonscope.steering.recipes.recipe import Recipe

    model = model_of_run(store, None)
    split = split_run(store, share=0.5, n=_JUDGED, seed=0)
    source = source_of_run(model, store, split)
    experiment = SteeringExperiment(model, split.held_out, sampling_of_run(store, 0))
    responses = []
    for name in _SWEPT:
        recipe = Recipe.of(method(name).parts(source), name=name, provenance={"method": name, "run": "runs/demo"})
        recipe.save(where.vectors / f"{name}{SUFFIX}")
        asked = Asked(name=name)
        responses.append(respond(experiment, source, asked, strengths=None, n_controls=5, covariance=False))
    command = f"reasonscope steer sweep {' '.join(_SWEPT)} --run runs/demo --n {_JUDGED}"
    numbers = {response.name: response.to_dict() for response in responses}
    save_numbers(where, "sweep", numbers, command=command, seed=0, figures=sweep_figures(responses))


def _analyse(where: RunFolder, once: _Once, store: TraceStore, rollouts: int) -> None:
    """Every analysis of the app's pages, on the first few ledgers with a right answer and some thinking."""
    from reasonscope.analysis.results import result_path
    from reasonscope.analysis.runs.context import Study
    from reasonscope.analysis.runs.options import make_options
    from reasonscope.analysis.runs.registry import ANALYSES

    ledgers = [trace for trace in store if trace.problem.answer is not None]
    fit = [trace for trace in ledgers if trace.correct and 100 <= trace.n_thinking_tokens <= 250][:_ANALYSED]
    many = list({trace.id: trace for trace in [*fit, *ledgers[:MANY]]}.values())
    shown = {trace.id for trace in many[:KEPT]}
    requests = [trace for trace in store if "harmful" in trace.problem.meta]
    chosen = {
        "mi": many,
        "mi_compare": many,
        "receivers": many,
        "cliff": requests,
        "alternatives": [*fit, *requests[:6]],
    }
    sites = ",".join(store.sites)
    options: dict[str, dict[str, Any]] = {
        "mi": {"sites": sites},
        "anchors": {"rollouts": rollouts, "half_width": 0.2, "max_new_tokens": 400},
        "trajectory": {"sites": sites, "block": 20},
        # The longest ledgers take more room than the rollouts of the short ones that are analysed.
        "cliff": {"ablate": True, "asked": 24, "max_new_tokens": 900},
    }

    def analyse(name: str) -> None:
        if name == "cliff" and not (where.probes / "refusal.safetensors").exists():
            return
        told = make_options(ANALYSES[name].question.options, options.get(name, {})).for_run(where)
        study = Study(store=store, traces=chosen.get(name, fit), options=told, results=where.analyses)
        for result in ANALYSES[name](study):
            trace = str(result.provenance.get("trace", "all"))
            if result.method not in _OF_MANY or trace in shown or trace == "all":
                result.save(result_path(where.analyses, result.method, trace))

    for name in tracked(_ANALYSES, "analysing", "analyses", name=str):
        once(name, partial(analyse, name))


def _keep_part(folder: Path, ids: Sequence[str], *, note: str = "") -> None:
    """Replace the store in `folder` by one with only the traces `ids`. With a `note`, which goes into its card, drop the activations."""
    whole = TraceStore.open(folder)
    part = folder.with_name("part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted call left
    sites = [] if note else list(whole.sites)
    traces = [whole.trace(id) for id in ids]
    meta = {**whole.meta, "note": note} if note else whole.meta
    with TraceStore.create(part, meta=meta, sites=sites) as store:
        store.append(traces, {site: [whole.activations(id, site) for id in ids] for site in sites})
    shutil.rmtree(folder)
    part.rename(folder)
