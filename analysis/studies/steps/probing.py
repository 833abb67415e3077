"""Probes of a run with their controls: what `reasonscope probe` measures, and the step of a study that does the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from reasonscope import probes
from reasonscope.analysis.runs.probe_reports import (
    aft_scores,
    choose_traces,
    correctness_along,
    correctness_figures,
    label_figures,
    length_figures,
    refusal_figures,
    refusal_verdicts,
    remaining_figures,
)
from reasonscope.analysis.studies.lab import Lab
from reasonscope.analysis.studies.steps.base import Outcome, Step, Work
from reasonscope.analysis.studies.steps.measured import Measured, command_line
from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import in_hundredths, plural
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site, expand_sites
from reasonscope.probes.fitting.positions import POSITIONS, Position, position_name
from reasonscope.probes.properties.correctness_probe import positions_summary
from reasonscope.probes.properties.label_probe import probe_kind
from reasonscope.probes.properties.labels import file_name, label_task
from reasonscope.probes.properties.refusal_probe import refusal_maps
from reasonscope.probes.properties.remaining_probe import with_read_thinking
from reasonscope.probes.properties.request_outcomes import CONTRASTS
from reasonscope.steering.experiments.held_out import split_run


def measure_length(store: TraceStore, *, aft: bool = False, folds: int = 5, seed: int = 0) -> Measured:
    """How long the model will think, from the last token of each prompt; requests are left out."""
    traces = choose_traces(store, "problems")
    found = probes.length(store, traces, folds=folds, seed=seed)
    numbers, summary = found.to_dict(), found.summary()
    if aft:
        scores = aft_scores(store, traces, found, seed=seed)
        numbers["aft"] = {name: score.to_dict() for name, score in scores.items()}
        rows = [
            (f"accelerated failure time, {name}", in_hundredths(score), str(found.comparison.n_problems))
            for name, score in scores.items()
        ]
        summary = replace(summary, rows=[*summary.rows, *rows])
    return Measured(
        name="length",
        summaries=[summary],
        numbers=numbers,
        figures=length_figures(found),
        probes={"length": found.probe},
        command=_command("length", store, aft=aft, folds=folds, seed=seed),
        seed=seed,
    )


def measure_remaining(store: TraceStore, *, per_trace: int = 8, folds: int = 5, seed: int = 0) -> Measured:
    """How much thinking is left, at positions all along it; requests, and traces without any thinking that was read, are left out."""
    traces = with_read_thinking(choose_traces(store, "problems"))
    found = probes.remaining(store, traces, per_trace=per_trace, folds=folds, seed=seed)
    summary, asked = found.summary(), sum("harmful" not in trace.problem.meta for trace in store)
    note = f"{plural(asked - len(traces), 'trace')} without a thinking token that the model read: left out."
    return Measured(
        name="remaining",
        summaries=[replace(summary, notes=[*summary.notes, note]) if len(traces) < asked else summary],
        numbers=found.to_dict(),
        figures=remaining_figures(found),
        probes={"remaining": found.probe},
        command=_command("remaining", store, per_trace=per_trace, folds=folds, seed=seed),
        seed=seed,
    )


def measure_refusal(
    store: TraceStore,
    *,
    keep: Path,
    plateau: float = 0.5,
    directions: int = 100,
    labels: Path | None = None,
    judge: tuple[str, str] | None = None,
    contrasts: Sequence[str] = tuple(CONTRASTS),
    maps: bool = True,
    folds: int = 5,
    seed: int = 0,
) -> Measured:
    """Whether the model means to refuse, by the traces of requests; replies of a judge are kept in the folder `keep`."""
    traces, chosen = choose_traces(store, "requests"), {name: CONTRASTS[name] for name in contrasts}
    verdicts = refusal_verdicts(traces, labels, judge, keep)
    told: dict[str, Any] = {"verdicts": verdicts, "folds": folds, "seed": seed}
    found = probes.refusal(store, traces, contrasts=chosen, plateau=plateau, n_controls=directions, **told)
    drawn = refusal_maps(store, traces, contrasts=found.contrasts, **told) if maps else None
    shown = {"plateau": plateau, "directions": directions, "labels": labels, "judge": judge}
    return Measured(
        name="refusal",
        summaries=[found.summary()],
        numbers=found.to_dict(),
        figures=refusal_figures(found, traces, drawn),
        probes=found.probes,
        command=_command("refusal", store, **shown, folds=folds, seed=seed),
        seed=seed,
    )


def measure_correctness(
    store: TraceStore,
    *,
    held_out: float = 0.0,
    labels: Path | None = None,
    positions: Sequence[Position] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Measured:
    """Whether the answer will be right, at positions from the prompt to the end of the thinking."""
    traces = _not_held_out(store, held_out, seed)
    found, undefined = correctness_along(store, traces, labels=labels, positions=positions, folds=folds, seed=seed)
    numbers: dict[str, Any] = {position_name(one.position): one.to_dict() for one in found}
    return Measured(
        name="correctness",
        summaries=[positions_summary(found, undefined)],
        numbers={**numbers, "undefined": undefined},
        figures=correctness_figures(found),
        probes={"correctness": found[-1].probe},
        command=_command("correctness", store, held_out=held_out, labels=labels, folds=folds, seed=seed),
        seed=seed,
    )


def measure_label(
    store: TraceStore,
    label: str,
    *,
    position: str | None = None,
    kind: str = "linear",
    sites: str | None = None,
    task: str = "classification",
    positive: str | None = None,
    name: str | None = None,
    held_out: float = 0.0,
    folds: int = 5,
    seed: int = 0,
) -> Measured:
    """Whether a label of your own can be read from the states."""
    n_layers = 1 + max((Site.parse(site).layer for site in store.sites), default=0)
    found = probes.fit(
        store,
        label,
        _not_held_out(store, held_out, seed),
        position=position,
        task=label_task(task),
        positive=positive,
        kind=probe_kind(kind),
        sites=expand_sites(sites, n_layers) if sites else None,
        folds=folds,
        seed=seed,
    )
    called = name or file_name(label)
    told = {"label": label, "position": found.place.name, "kind": kind, "task": task, "sites": sites}
    more = {"positive": positive, "name": name, "held_out": held_out or None}
    return Measured(
        name=called,
        summaries=[found.summary()],
        numbers=found.to_dict(),
        figures=label_figures(found, called),
        probes={called: found.probe},
        command=_command("fit", store, **told, **more, folds=folds, seed=seed),
        seed=seed,
    )


def _not_held_out(store: TraceStore, share: float, seed: int) -> list[Trace] | None:
    """The traces of all problems but a `share`; None, for all, if nothing is held out."""
    if not share:
        return None
    return [store.trace(id) for id in split_run(store, share=share, n=None, seed=seed).ids]


def _command(probe: str, store: TraceStore, **options: Any) -> str:
    run = store.path.parent if store.path.name == "store" else store.path
    return command_line(f"reasonscope probe {probe}", {"run": run, **options})


@dataclass(frozen=True, kw_only=True)
class ProbeStep(Step):
    """Fit a probe on a run, with its baselines, its shuffled labels and its intervals.

    Attributes:
        probe: length, remaining, refusal, correctness, or fit for a label of your own.
        run: The step that recorded the run.
        folds: Number of folds.
        aft: length: also fit an accelerated failure time model.
        per_trace: remaining: positions per trace.
        plateau: refusal: the share of the thinking whose median is the plateau.
        directions: refusal: random directions.
        contrasts: refusal: the contrasts to fit; all if empty.
        maps: refusal: also draw the layers and positions that show it.
        labels: refusal, correctness: a file of labels in place of the rules.
        judge: refusal: URL and model that labels the answers.
        positions: correctness: the positions to read; all six if empty.
        held_out: correctness, fit: share of the problems that the probe never sees.
        label: fit: the label, `meta.FIELD` or a file.
        position: fit: the position to read.
        sites: fit: sites to choose from.
        name: fit: name of the probe.
    """

    kind: ClassVar[str] = "probe"

    probe: Literal["length", "remaining", "refusal", "correctness", "fit"]
    run: str
    folds: int = 5
    aft: bool = False
    per_trace: int = 8
    plateau: float = 0.5
    directions: int = 100
    contrasts: tuple[str, ...] = ()
    maps: bool = True
    labels: Path | None = None
    judge: tuple[str, ...] | None = None
    positions: tuple[str, ...] = ()
    held_out: float = 0.0
    label: str = ""
    position: str | None = None
    sites: str | None = None
    name: str | None = None

    def work(self, lab: Lab) -> Work:
        return Work(disk=10e6)

    def execute(self, lab: Lab, name: str) -> Outcome:
        store, where = lab.store(self.run), lab.where(self.run)
        common = {"folds": self.folds, "seed": lab.plan.seed}
        measure: Mapping[str, Callable[[], Measured]] = {
            "length": lambda: measure_length(store, aft=self.aft, **common),
            "remaining": lambda: measure_remaining(store, per_trace=self.per_trace, **common),
            "refusal": lambda: self._refusal(store, where.results / "judge", common),
            "correctness": lambda: self._correctness(store, common),
            "fit": lambda: self._label(store, common),
        }
        found = measure[self.probe]().save(where)
        return Outcome(
            summaries=tuple(found.summaries),
            numbers=found.numbers,
            files=tuple(found.files(where)),
            figures=tuple(found.drawn(where)),
        )

    def _refusal(self, store: TraceStore, keep: Path, common: Mapping[str, Any]) -> Measured:
        judge = (self.judge[0], self.judge[1]) if self.judge else None
        told: dict[str, Any] = {"plateau": self.plateau, "directions": self.directions, "maps": self.maps}
        chosen = self.contrasts or tuple(CONTRASTS)
        return measure_refusal(store, keep=keep, labels=self.labels, judge=judge, contrasts=chosen, **told, **common)

    def _correctness(self, store: TraceStore, common: Mapping[str, Any]) -> Measured:
        known = {position_name(position): position for position in POSITIONS}
        if wrong := [name for name in self.positions if name not in known]:
            raise InputError(f"unknown position {wrong[0]!r}; choose from {', '.join(known)}")
        chosen = [known[name] for name in self.positions] or None
        return measure_correctness(store, held_out=self.held_out, labels=self.labels, positions=chosen, **common)

    def _label(self, store: TraceStore, common: Mapping[str, Any]) -> Measured:
        if not self.label:
            raise InputError("a probe of a label of your own needs label: meta.FIELD, or a file")
        told: dict[str, Any] = {"position": self.position, "sites": self.sites, "name": self.name}
        return measure_label(store, self.label, held_out=self.held_out, **told, **common)
