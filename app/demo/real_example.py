"""The example runs that ship: a part of a study of a real model, the same problems steered, and the organism."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from reasonscope.analysis.results import file_name, result_path
from reasonscope.app.demo.bundled import EXAMPLE
from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.manifest import LOCK
from reasonscope.data.storage.run_folder import RunFolder, run_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Trace

REAL, STEERED = "example-gsm8k", "example-gsm8k-steered"
# By the name that the app shows, the one that it opens first.
EXAMPLES: Mapping[str, Path] = {
    "GSM8K": EXAMPLE.with_name(REAL),
    "GSM8K, steered": EXAMPLE.with_name(STEERED),
    "example": EXAMPLE,
}
MOST_BYTES = 8_000_000  # of both runs together
_LARGEST = 250_000  # bytes of a result; attention maps of long traces are larger
_SCORED = ("length", "correctness")
_NOTE = "{n} of the {all} traces that the numbers are of; the activations were left out"


def write_real_example(
    study: Path,
    out: Path,
    *,
    licence: Path,
    run: str = "open",
    plain: str = "plain",
    steered: str = "steered",
    n: int = 12,
) -> list[str]:
    """Write the examples of a real model from the folder of its study into `out`, and replace those that are there.

    The first holds `n` traces of the step `run` with everything that was measured on them, and the traces of the step `plain`; the second
    the same problems as the step `steered` answered them. `licence` is the licence of the problems, which is put into both.

    Returns:
        What was left out, because it is too large.

    Raises:
        InputError: If the study lacks one of the steps, fewer than `n` traces were analysed, its model is named by a folder of this
            machine, or the examples are too large.
    """
    where, folder = run_folder(study / run), out / REAL
    store = _store(study, run)
    shown = _analysed(store, where, n)
    name = str(shown[0].model.get("name"))
    if Path(name).is_absolute():
        raise InputError(
            f"the model of {study} is named {name}, which the examples would show; run the study with the id that it has on the hub"
        )
    shutil.rmtree(folder, ignore_errors=True)
    _write_store(folder, store, [*shown, *_store(study, plain)])
    left_out = _copy_measured(where, run_folder(folder), [trace.id for trace in shown])
    _write_scores(store, where, folder, shown)
    shutil.rmtree(out / STEERED, ignore_errors=True)
    other = _store(study, steered)
    _write_store(out / STEERED, other, list(other))
    for name in (REAL, STEERED):
        shutil.copy(licence, out / name / "LICENSE-problems")
    size = sum(file.stat().st_size for name in (REAL, STEERED) for file in (out / name).rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise InputError(f"the examples have {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}; take fewer traces")
    return left_out


def _store(study: Path, step: str) -> TraceStore:
    where = run_folder(study / step)
    if not where.store.exists():
        raise InputError(
            f"{study} has no traces of the step {step}; run: reasonscope study … --out {study} --only {step}"
        )
    return TraceStore.open(where.store)


def _analysed(store: TraceStore, where: RunFolder, n: int) -> list[Trace]:
    """The traces with results of the most methods; of equally many, the first by id."""
    methods = [path.name for path in where.analyses.iterdir() if path.is_dir()] if where.analyses.exists() else []
    counts = {id: sum(result_path(where.analyses, name, id).exists() for name in methods) for id in store.ids}
    best = sorted(counts, key=lambda id: (-counts[id], id))[:n]
    if len(best) < n or not counts[best[-1]]:
        raise InputError(f"fewer than {n} traces of {where.results} were analysed; run the steps that analyse it")
    return [store.trace(id) for id in best]


def _write_store(folder: Path, store: TraceStore, traces: Sequence[Trace]) -> None:
    """The traces without activations."""
    make_folder(folder)
    meta = {**store.meta, "note": _NOTE.format(n=len(traces), all=len(store))}
    with TraceStore.create(folder / "store", meta=meta, sites=[]) as part:
        part.append(list(traces), {})
    (folder / "store" / LOCK).unlink()  # an empty file, which packages leave out
    if store.recipe is not None and store.recipe.exists() and part.recipe is not None:
        shutil.copy(store.recipe, part.recipe)


def _copy_measured(where: RunFolder, to: RunFolder, ids: Sequence[str]) -> list[str]:
    """Probes, numbers, figures and recipes, and the results of the traces `ids` and of all traces; gives what was too large."""
    for source, target in ((where.probes, to.probes), (where.vectors, to.vectors), (where.numbers, to.numbers)):
        _copy(source.glob("*"), target)
    _copy((path for path in where.figures.glob("*.json") if not _of_a_trace(path)), to.figures)
    wanted, left_out = {*map(file_name, ids), "all"}, []
    for path in sorted(where.analyses.glob("*/*.safetensors")):
        if path.stem not in wanted:
            continue
        if path.stat().st_size > _LARGEST:
            left_out.append(f"{path.parent.name} of {path.stem}")
        else:
            _copy([path], to.analyses / path.parent.name)
    return left_out


def _of_a_trace(path: Path) -> bool:
    """Whether a figure is of a result, which the app draws itself."""
    return "%2F" in path.name or "-all-" in path.name


def _copy(paths: Iterator[Path] | Sequence[Path], folder: Path) -> None:
    for path in paths:
        make_folder(folder)
        shutil.copy(path, folder / path.name)


def _write_scores(store: TraceStore, where: RunFolder, folder: Path, traces: Sequence[Trace]) -> None:
    """What the probes say at every token of the traces."""
    from reasonscope.probes.fitting.linear_probes import LinearProbe
    from reasonscope.probes.properties.scores import write_scores

    for name in _SCORED:
        if (kept := where.probes / f"{name}.safetensors").exists():
            make_folder(folder / "scores")
            path = run_folder(folder).scores / kept.name
            write_scores(LinearProbe.load(kept), store, path, name=name, ids=[trace.id for trace in traces])
