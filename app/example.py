"""The example run that ships: what the demo makes, smaller, with the scores of every token and without the activations."""

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from reasonscope.app.places import places
from reasonscope.data.store import TraceStore

EXAMPLE = Path(str(files("reasonscope.app").joinpath("example")))
_SCORED = ("length", "intent", "correctness")
_NOTE = "activations were left out of the example; record a run of your own to probe and steer"


def write_example(
    out: Path, *, say: Callable[[str], None], ledgers: int = 96, requests: int = 64, steered: int = 48
) -> None:
    """Record the organism, probe and steer it, and leave in `out` what the app shows; what `out` held is replaced at the end.

    The activations are most of a run's bytes and stay behind; so do the report and the figures as HTML.
    """
    from reasonscope.app.demo import Size, run_demo
    from reasonscope.probes.linear import LinearProbe
    from reasonscope.probes.scores import write_scores

    with TemporaryDirectory() as temporary:
        run = Path(temporary) / "example"
        run_demo(run, size=Size(ledgers=ledgers, requests=requests, steered=steered), say=say, progress=False)
        where = places(run)
        store = TraceStore.open(where.store)
        for name in _SCORED:
            if (kept := where.probes / f"{name}.safetensors").exists():
                write_scores(LinearProbe.load(kept), store, where.scores / kept.name, name=name)
        _leave_activations_out(where.store)
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(run, out, ignore=shutil.ignore_patterns("*.html", ".lock"))


def _leave_activations_out(folder: Path) -> None:
    """Replace the store in `folder` by one that holds its traces alone."""
    whole = TraceStore.open(folder)
    light = folder.with_name("light")
    with TraceStore.create(light, meta={**whole.meta, "note": _NOTE}, sites=[]) as store:
        store.append(list(whole), {})
    shutil.rmtree(folder)
    light.rename(folder)
