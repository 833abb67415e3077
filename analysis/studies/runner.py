"""Run a study: each step whose results do not hold yet, in order; an interrupted study goes on."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reasonscope.analysis.studies.estimates import Rates, rates, seconds_of
from reasonscope.analysis.studies.lab import Lab, Served
from reasonscope.analysis.studies.plan import StudyPlan, read_plan
from reasonscope.analysis.studies.reading import check_known
from reasonscope.analysis.studies.report import write_report
from reasonscope.analysis.studies.state import Finished, done, finished, forget_failed, inputs_of, why_stale
from reasonscope.analysis.studies.steps.base import Work
from reasonscope.data.errors import ArchitectureError, ContextError, InputError, SiteError
from reasonscope.data.progress import say, working
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary
from reasonscope.data.terminal_progress import spoken_time

# What makes a step impossible; anything else (a full disk, a model that cannot be loaded) ends the study.
_NOT_MEASURED = (InputError, SiteError, ContextError, ArchitectureError)


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """A study that has run.

    Attributes:
        path: The report, one HTML page.
        steps: What is kept of each step, by name.
        load_seconds: Seconds in which the model was loaded.
    """

    path: Path
    steps: dict[str, Finished]
    load_seconds: float = 0.0

    @property
    def failed(self) -> dict[str, str]:
        """Why a step could not be measured, by name."""
        return {name: step.failed for name, step in self.steps.items() if step.failed}

    def summary(self) -> Summary:
        """What each step found, in a sentence."""
        rows = [
            (
                name,
                spoken_time(step.seconds),
                step.summaries[-1].finding if step.summaries else f"Not measured: {step.failed}",
            )
            for name, step in self.steps.items()
        ]
        measured = len(rows) - len(self.failed)
        return Summary(
            finding=f"{measured} of {len(rows)} steps were measured.",
            columns=("step", "time", "finding"),
            rows=rows,
            files=[f"Report: {self.path}"],
        )


@dataclass(frozen=True, kw_only=True)
class _Outlook:
    """What a step would do.

    Attributes:
        name: The step.
        why: Why it has to run; empty if its results hold.
        work: How much it is at most.
        seconds: How long it takes at most; None if there is nothing to tell it by.
    """

    name: str
    why: str
    work: Work
    seconds: float | None


def study(
    plan: StudyPlan | str | Path,
    out: str | Path | None = None,
    *,
    server: Served | None = None,
    only: Sequence[str] = (),
    retry: bool = False,
    estimate: bool = True,
) -> StudyReport:
    """Run a study: every step of its plan whose results do not hold yet.

    A step is skipped if its results are there and everything that they depend on is unchanged. A step that cannot be measured (too few
    of a class, no such site) is noted with its reason, and the others go on. If the study is interrupted, the same call goes on: finished
    steps are kept, and so are the traces of a recording, the methods of a sweep and the traces of an analysis.

    Args:
        plan: A plan, the path of one in YAML, or the name of a shipped one.
        out: The folder of the study; studies/NAME if None.
        server: Writes texts in place of the model here, wherever no steering is involved; activations are read afterwards.
        only: Steps to run, with those that they need; all if empty.
        retry: Also run steps again that could not be measured.
        estimate: Measure for some seconds how fast the model is, to say how long the study will take.

    Returns:
        The findings of all steps, and the page that shows them.

    Raises:
        InputError: If the plan is invalid.
        StoreError: If a run in `out` was recorded with other settings, or a disk is full.

    Example:
        report = rs.study("plan.yaml", "studies/mine")
        print(report.summary())
    """
    lab = open_lab(plan, out, server)
    if retry:
        forget_failed(lab)
    found: dict[str, Finished] = {}
    todo = [name for name in _chosen_steps(lab.plan, only) if why_stale(lab, name)]
    known = rates(lab, measure=estimate and len(todo) > 1)
    _announce(lab, todo, known)
    with working("study", total=len(todo), unit="steps") as work:
        for name in _chosen_steps(lab.plan, only):
            if name in todo:
                work.detail = name
            found[name] = _run(lab, name)
            work.done = sum(one in found for one in todo)
    return StudyReport(path=write_report(lab), steps=found, load_seconds=round(lab.load_seconds, 2))


def open_lab(plan: StudyPlan | str | Path, out: str | Path | None = None, server: Served | None = None) -> Lab:
    """The lab of a plan, read if it is not yet."""
    read = plan if isinstance(plan, StudyPlan) else read_plan(plan)
    return Lab(read, Path(out) if out is not None else Path("studies") / read.name, server)


def outlooks(lab: Lab, *, only: Sequence[str] = (), measure: bool = True) -> list[_Outlook]:
    """What each step would do, how long it would take, and why it has to run; nothing is run but a short trial of the rate."""
    why = {name: why_stale(lab, name) for name in _chosen_steps(lab.plan, only)}
    known = rates(lab, measure=measure and any(why.values()))
    found = []
    for name, reason in why.items():
        work = lab.plan.steps[name].work(lab)
        found.append(_Outlook(name=name, why=reason, work=work, seconds=seconds_of(lab, name, work, known)))
    return found


def outlook_summary(lab: Lab, found: Sequence[_Outlook]) -> Summary:
    """What would run, how long it takes, how much disk it needs, and why."""
    todo = [one for one in found if one.why]
    seconds = [one.seconds for one in todo]
    total = "unknown time" if None in seconds else spoken_time(sum(one or 0.0 for one in seconds))
    rows = [
        (
            one.name,
            "would run" if one.why else "holds",
            _time(one.seconds) if one.why else "",
            _bytes(one.work.disk) if one.why else "",
            one.why,
        )
        for one in found
    ]
    return Summary(
        finding=f"{len(todo)} of {len(found)} steps would run: at most {total}, and about {_bytes(sum(one.work.disk for one in todo))} on "
        f"the disk.",
        columns=("step", "", "at most", "disk", "why"),
        rows=rows,
        notes=["Times of steps that have not run yet are those of completions that all reach their limit of tokens."]
        if todo
        else [],
    )


def kept(lab: Lab) -> str:
    """What an interrupted study has kept, and how to go on."""
    names = list(lab.plan.steps)
    ready = [name for name in names if not why_stale(lab, name)]
    begun = [_begun(lab, name) for name in names if name not in ready and lab.plan.steps[name].kind == "record"]
    more = "".join(f"; {text}" for text in begun if text)
    return f"{len(ready)} of {len(names)} steps are done{more} (in {lab.out}); run the same command again to go on."


def _begun(lab: Lab, name: str) -> str:
    store = lab.where(name).store
    if not store.exists():
        return ""
    step = lab.plan.steps[name]
    return f"{len(TraceStore.open(store))} of {len(lab.problems(step.asks)) * step.samples} traces of {name} are kept"  # type: ignore[attr-defined]


def _run(lab: Lab, name: str) -> Finished:
    """What is kept of a step, after it has run if it had to."""
    if not why_stale(lab, name):
        held = finished(lab, name)
        assert held is not None  # its results hold
        return _completed(lab, name, held)
    step = lab.plan.steps[name]
    make_folder(lab.out)
    say(f"· {name}")
    # As they are now: a file may change while the step runs.
    began, inputs = time.monotonic(), inputs_of(lab, name)
    if lost := [other for other in step.reads if (found := finished(lab, other)) is None or found.failed]:
        failed = f"it reads {lost[0]}, which could not be measured"
        result = Finished(inputs=inputs, seconds=0.0, failed=failed, lost=lost[0])
    else:
        try:
            with working(name):
                outcome = step.execute(lab, name)
            result = done(lab, inputs, outcome, time.monotonic() - began, step.work(lab))
        except _NOT_MEASURED as error:
            say(f"  not measured: {error}")
            seconds = round(time.monotonic() - began, 2)
            result = Finished(inputs=inputs, seconds=seconds, failed=str(error))
    result.save(lab, name)
    return result


def _completed(lab: Lab, name: str, held: Finished) -> Finished:
    """A step that holds; one that an older version saved also learns the checksums of its files, so that changes show from now on."""
    inputs = inputs_of(lab, name)
    if inputs.keys() <= held.inputs.keys():
        return held
    held = replace(held, inputs=inputs)
    held.save(lab, name)
    return held


def _chosen_steps(plan: StudyPlan, only: Sequence[str]) -> list[str]:
    """The names of the steps to run, with those that they need, in order. Raises InputError for an unknown step."""
    for name in only:
        check_known(name, plan.steps, "the plan has no step")
    wanted = set(only or plan.steps)
    for name in reversed(list(plan.steps)):
        if name in wanted:
            wanted |= set(plan.steps[name].needs)
    return [name for name in plan.steps if name in wanted]


def _announce(lab: Lab, todo: Sequence[str], known: Rates | None) -> None:
    if not todo:
        say("every step holds; nothing has to run.")
        return
    times = [seconds_of(lab, name, lab.plan.steps[name].work(lab), known) for name in todo]
    told = "" if None in times else f", at most {spoken_time(sum(one or 0.0 for one in times))}"
    say(f"{len(todo)} of {len(lab.plan.steps)} steps to run{told}: {', '.join(todo)}")


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else spoken_time(seconds)


def _bytes(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 else f"{size:.1f} {unit}"
    return f"{size:.0f} GB"
