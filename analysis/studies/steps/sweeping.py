"""A step that sweeps steering methods over strengths with matched controls."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, TypeAlias

from reasonscope.analysis.figures import sweep_figures
from reasonscope.analysis.studies.lab import Lab, sites_of
from reasonscope.analysis.studies.state import key_of
from reasonscope.analysis.studies.steps.base import Outcome, Work
from reasonscope.analysis.studies.steps.extracting import LearnsFromRun, other_traces, pairs_file, unseen
from reasonscope.analysis.studies.steps.measured import Measured, run_line, study_line
from reasonscope.data.arrays import plain
from reasonscope.data.progress import say, tracked
from reasonscope.data.storage.durable import make_folder, write_text_durably
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.untrusted import parse_json, wrap_errors
from reasonscope.data.trace import Problem
from reasonscope.steering.engine.arms import EngineArms
from reasonscope.steering.experiments.decoding_responses import DECODING_METHODS, DecodingResponse
from reasonscope.steering.experiments.dose_responses import DoseResponse
from reasonscope.steering.experiments.experiment import SteeringExperiment
from reasonscope.steering.experiments.held_out import Asked, check_titles, respond, sampling_of_run, split_run
from reasonscope.steering.methods.registry import ExtractionData, method

Response: TypeAlias = DoseResponse | DecodingResponse


@dataclass(frozen=True, kw_only=True)
class SweepStep(LearnsFromRun):
    """Steer problems that no vector was made from at several strengths, beside the reverse and random vectors that move states as far.

    Attributes:
        methods: Steering and decoding methods; with strengths of their own: `seal:0.5,1`.
        run: The run that vectors are made from.
        problems: What is judged on: sets or parts; a share of the run's own problems if empty.
        strengths: For methods that name none; by default each method's own.
        n_controls: Random controls at each strength.
        covariance: Draw the random vectors with the covariance of the states.
        held_out: Without problems: the share of the run's problems that is judged on.
        n: At most so many problems.
        samples: Completions of each problem.
        sites: Where the vectors act; the method's own sites if empty.
        pairs: The step that made pairs.
        verdict: Words after which the model says whether it will refuse.
        fast: The first word of fast thinking.
        batch_size: Completions that are written together; as many as fit if not given.
        max_new_tokens: Longest completion; that of the run if not given.
    """

    kind: ClassVar[str] = "sweep"

    methods: tuple[str, ...]
    run: str
    problems: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    n_controls: int = 5
    covariance: bool = False
    held_out: float = 0.5
    n: int | None = None
    samples: int = 1
    sites: tuple[str, ...] = ()
    pairs: str | None = None
    verdict: str | None = None
    fast: str | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None

    def work(self, lab: Lab) -> Work:
        problems = self._n_problems(lab)
        longest = self.max_new_tokens or lab.plan.steps[self.run].max_new_tokens  # type: ignore[attr-defined]  # it records
        written = float(problems * self.samples * longest)
        arms = 1 + sum(self._arms(Asked.parse(text)) for text in self.methods)
        return Work(written=written * arms, read=2 * written * arms, disk=20e6)

    def _arms(self, asked: Asked) -> int:
        own = (
            (DECODING_METHODS[asked.name].values, 1)
            if asked.name in DECODING_METHODS
            else (method(asked.name).strengths, 2)
        )
        return len(asked.values or self.strengths or own[0]) * (own[1] + self.n_controls)

    def _n_problems(self, lab: Lab) -> int:
        known = len(lab.problems(self.problems or lab.plan.steps[self.run].asks))
        share = known if self.problems else round(known * self.held_out)
        return min(share, self.n or share)

    def execute(self, lab: Lab, name: str) -> Outcome:
        asked = [Asked.parse(text) for text in self.methods]
        check_titles(asked)
        store, where = lab.store(self.run), lab.where(self.run)
        ids, judged = self._sides(lab, store)
        source = self.source(lab, self.run, ids, vars(self))
        source = replace(source, pairs=unseen(source.pairs, judged))
        sampling = sampling_of_run(store, lab.plan.seed)
        if self.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=self.max_new_tokens)
        writer = self.writer(lab)
        experiment = SteeringExperiment(
            source.model,
            judged,
            sampling,
            samples=self.samples,
            batch_size=self.batch_size,
            writer=writer,
        )
        kept = lab.out / "steps" / name / key_of(lab, name, without="methods")
        found = [
            self._response(experiment, source, one, kept / f"{text.replace(':', ' ')}.json")
            for one, text in tracked(list(zip(asked, self.methods, strict=True)), "sweeping", "methods", name=_of_asked)
        ]
        saved = Measured(
            name="sweep",
            summaries=[one.summary() for one in found],
            numbers={one.name: one.to_dict() for one in found},
            figures=sweep_figures(found),
            command=self._command(lab, name, in_vllm=writer is not None),
            seed=lab.plan.seed,
        ).save(where)
        return Outcome(
            summaries=tuple(saved.summaries),
            numbers=saved.numbers,
            files=tuple(kept / f"{text.replace(':', ' ')}.json" for text in self.methods),
            figures=tuple(saved.drawn(where)),
        )

    def _command(self, lab: Lab, name: str, *, in_vllm: bool) -> str:
        """The line that sweeps the same again: `steer sweep`, or `study` for problems that are not of the run."""
        if self.problems:
            return study_line(lab, name)
        told = {name: value for name, value in self.settings().items() if name not in ("methods", "run", "after")}
        named = {
            "strengths": ",".join(map(str, self.strengths)) or None,
            "sites": ",".join(map(str, sites_of(self.sites, lab.model_of(self.run).n_layers))) or None,
            "pairs": None if self.pairs is None else pairs_file(lab, self.pairs),
        }
        server = lab.server.options() if lab.server is not None and in_vllm else {}
        methods = " ".join(map(quote, self.methods))
        return run_line(f"reasonscope steer sweep {methods}", lab, self.run, {**told, **named, **server})

    def writer(self, lab: Lab) -> EngineArms | None:
        """What writes the arms in vLLM, if the study has one and it can write those of every method."""
        here = [text for text in self.methods if Asked.parse(text).name in DECODING_METHODS]
        if here and lab.arms() is not None:
            say(
                f"The arms of this sweep are written here: vLLM does not change how tokens are chosen ({', '.join(here)})."
            )
        return None if here else lab.arms()

    def _sides(self, lab: Lab, store: TraceStore) -> tuple[tuple[str, ...], list[Problem]]:
        """The traces to learn from, and the problems to judge on; no group of problems is on both sides."""
        if not self.problems:
            split = split_run(store, share=self.held_out, n=self.n, seed=lab.plan.seed)
            return split.ids, list(split.held_out)
        judged = lab.problems(self.problems)[: self.n]
        return other_traces(store, judged), judged

    def _response(self, experiment: SteeringExperiment, source: ExtractionData, asked: Asked, path: Path) -> Response:
        """What a method does; it is kept in `path`, and not measured again if the step was interrupted after it."""
        if path.exists():
            with wrap_errors(path):
                return _response_of(asked, parse_json(path.read_bytes(), str(path)))
        found = respond(
            experiment,
            source,
            asked,
            strengths=self.strengths or None,
            n_controls=self.n_controls,
            covariance=self.covariance,
        )
        make_folder(path.parent)
        write_text_durably(path, json.dumps(plain(found.to_dict()), allow_nan=False))
        return found


def _of_asked(item: tuple[Asked, str]) -> str:
    return item[0].name


def _response_of(asked: Asked, known: Mapping[str, Any]) -> Response:
    kind: Any = DecodingResponse if asked.name in DECODING_METHODS else DoseResponse
    found: Response = kind.from_dict(asked.name, known)
    return found
