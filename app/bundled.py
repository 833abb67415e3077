"""The example run that ships: what the demo and the analyses make of the organism, for a part of its traces, without activations."""

import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from reasonscope.app.places import Places, places
from reasonscope.data.store import TraceStore

if TYPE_CHECKING:
    from reasonscope.app.demo import Size

EXAMPLE = Path(str(files("reasonscope.app").joinpath("example")))
SHOWN = 4  # one trace of so many ships
ANALYSED = 2  # traces that are analysed sentence by sentence
_SCORED = ("length", "intent", "correctness")
_ANALYSES = (
    "mi", "compare", "entropy", "alternatives", "shift", "reflection", "heads", "attention", "receivers", "suppression", "cliff", "anchors",
)  # fmt: skip


def write_example(
    out: Path,
    *,
    say: Callable[[str], None],
    size: "Size | None" = None,
    rollouts: int = 20,
    every: int = SHOWN,
    ablate: bool = True,
) -> None:
    """Record the organism, probe, steer and analyse it, and leave in `out` what the app shows; what `out` held is replaced at the end.

    The numbers are those of the whole demo; of its traces every so many ship. The activations, most of a run's bytes, stay behind, and
    so do the report and the figures as HTML.
    """
    from reasonscope.app.demo import Size, run_demo
    from reasonscope.probes.linear import LinearProbe
    from reasonscope.probes.scores import write_scores

    with TemporaryDirectory() as temporary:
        run = Path(temporary) / "example"
        run_demo(run, size=size or Size(), say=say, progress=False)
        where = places(run)
        n = len(TraceStore.open(where.store))
        _keep_part(where.store, TraceStore.open(where.store).ids[::every])
        store = TraceStore.open(where.store)
        for name in _SCORED:
            if (kept := where.probes / f"{name}.safetensors").exists():
                write_scores(LinearProbe.load(kept), store, where.scores / kept.name, name=name)
        _analyse(where, store, rollouts, ablate, say)
        note = f"{len(store)} of the {n} traces that the numbers are of; the activations were left out"
        _keep_part(where.store, store.ids, note=note)
        for numbers in where.numbers.glob("*.json"):
            text = numbers.read_text(encoding="utf-8")
            numbers.write_text(text.replace(str(run), "runs/demo"), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(run, out, ignore=shutil.ignore_patterns("*.html", ".lock"))


def _analyse(where: Places, store: TraceStore, rollouts: int, ablate: bool, say: Callable[[str], None]) -> None:
    """Every analysis of the app's pages, on the first few ledgers that were answered right and took some thinking."""
    from reasonscope.analysis.results import result_path
    from reasonscope.app.analysing import ANALYSES
    from reasonscope.app.study import Options, Study

    ledgers = [trace for trace in store if trace.problem.answer is not None]
    fit = [trace for trace in ledgers if trace.correct and 100 <= trace.n_thinking_tokens <= 250][:ANALYSED]
    many = list({trace.id: trace for trace in [*fit, *ledgers[:30]]}.values())
    # Words at all peaks, and heads over all traces, come from more traces than are looked at one by one.
    chosen = {
        "mi": many,
        "compare": many,
        "receivers": many,
        "cliff": [t for t in store if "harmful" in t.problem.meta],
    }
    probe = where.probes / "refusal.safetensors"
    vector = where.vectors / "seal.safetensors"
    options = Options(rollouts=rollouts, half_width=0.2, max_new_tokens=400, probe=probe, vector=vector, ablate=ablate)
    for name in _ANALYSES:
        if name == "cliff" and not probe.exists():
            continue
        say(f"analysing: {name}")
        traces = chosen.get(name, fit)
        study = Study(store=store, traces=traces, options=options, results=where.analyses)
        for result in ANALYSES[name](study):
            trace = str(result.provenance.get("trace", "all"))
            if result.method == "mi_base" and trace not in {one.id for one in fit}:
                continue  # the comparison is over many traces; a second curve is drawn for few
            result.save(result_path(where.analyses, result.method, trace))


def _keep_part(folder: Path, ids: Sequence[str], *, note: str = "") -> None:
    """Replace the store in `folder` by one that holds the traces `ids`; with a `note`, which goes into its card, without activations."""
    whole = TraceStore.open(folder)
    part = folder.with_name("part")
    sites = [] if note else list(whole.sites)
    traces = [whole.trace(id) for id in ids]
    meta = {**whole.meta, "note": note} if note else whole.meta
    with TraceStore.create(part, meta=meta, sites=sites) as store:
        store.append(traces, {site: [whole.activations(id, site) for id in ids] for site in sites})
    shutil.rmtree(folder)
    part.rename(folder)
