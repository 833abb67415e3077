"""Steps that steer: pairs, vectors, sweeps with matched controls, several methods side by side, and early exits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from reasonscope.analysis.exits.run import early_exits
from reasonscope.analysis.exits.summary import exit_summary
from reasonscope.analysis.figures import exit_frontier, steering_plane, sweep_figures
from reasonscope.analysis.studies.lab import Lab, sites_of
from reasonscope.analysis.studies.state import key_of
from reasonscope.analysis.studies.steps.base import Outcome, Step, Work
from reasonscope.analysis.studies.steps.measured import Measured
from reasonscope.data.arrays import plain
from reasonscope.data.errors import InputError
from reasonscope.data.progress import say, tracked
from reasonscope.data.storage.durable import make_folder, write_text_durably
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.untrusted import parse_json, wrap_errors
from reasonscope.data.summary import Summary, in_hundredths, in_percent, in_words, plural
from reasonscope.data.trace import Problem, Sampling
from reasonscope.steering.engine.arms import EngineArms
from reasonscope.steering.experiments.conditions import method_conditions, random_conditions
from reasonscope.steering.experiments.decoding_responses import DECODING_METHODS, DecodingResponse
from reasonscope.steering.experiments.dose_responses import DoseResponse
from reasonscope.steering.experiments.experiment import Arm, ArmMeasurements, SteeringExperiment
from reasonscope.steering.experiments.extraction import extraction_summary, vector_numbers
from reasonscope.steering.experiments.held_out import Asked, check_titles, respond, sampling_of_run, split_run
from reasonscope.steering.methods.asc import CompletionPair, load_pairs
from reasonscope.steering.methods.pairs import CONCISE, VERBOSE, make_pairs
from reasonscope.steering.methods.registry import ExtractionData, method
from reasonscope.steering.recipes.files import SUFFIX
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.application import VectorUse

_CUTS = 6  # of a trace, for the estimate of early exits
Response: TypeAlias = DoseResponse | DecodingResponse


@dataclass(frozen=True, kw_only=True)
class PairsStep(Step):
    """Answer the same problems briefly and at length, for ASC and thinking speed.

    Attributes:
        problems: Sets of problems, or parts of them; none of them should be judged on.
        concise: What follows each question for a brief answer.
        verbose: What follows it for a long answer.
        max_new_tokens: Most tokens of an answer; pairs with one that is cut are left out.
        temperature: Sampling temperature.
        batch_size: Answers that are written together.
    """

    kind: ClassVar[str] = "pairs"

    problems: tuple[str, ...]
    concise: str = CONCISE
    verbose: str = VERBOSE
    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 32

    def work(self, lab: Lab) -> Work:
        n = len(lab.problems(self.problems))
        return Work(written=2.0 * n * self.max_new_tokens, disk=n * 4e3)

    def execute(self, lab: Lab, name: str) -> Outcome:
        sampling = Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=lab.plan.seed)
        model = lab.model() if lab.server is None else lab.prompting()
        made = make_pairs(
            model,
            lab.problems(self.problems),
            concise=self.concise,
            verbose=self.verbose,
            sampling=sampling,
            batch_size=self.batch_size,
            server=lab.writer(model, lab.out / "steps" / name),
        )
        path = _pairs_file(lab, name)
        made.save(path)
        return Outcome(
            summaries=(replace(made.summary(), files=[f"Pairs: {path}"]),), numbers=made.to_dict(), files=(path,)
        )


def _pairs_file(lab: Lab, step: str) -> Path:
    """The file of the pairs that a step made."""
    return lab.out / "pairs" / f"{step}.jsonl"


@dataclass(frozen=True, kw_only=True)
class _LearnsFromRun(Step):
    """A step whose vectors are made from a run: from all of it, or from the problems that are not held out."""

    def source(self, lab: Lab, run: str, ids: Sequence[str], asked: Mapping[str, Any]) -> ExtractionData:
        """What a method may learn from; `asked` has sites, verdict, fast and the name of the step that made pairs."""
        model, pairs = lab.model_of(run), asked["pairs"]
        sites = sites_of(asked["sites"], model.n_layers)
        return ExtractionData(
            model=model,
            store=lab.store(run),
            ids=ids,
            sites=sites or None,
            verdict=asked["verdict"],
            fast=asked["fast"],
            pairs=None if pairs is None else load_pairs(_pairs_file(lab, pairs)),
        )


@dataclass(frozen=True, kw_only=True)
class ExtractStep(_LearnsFromRun):
    """Make a recipe of a method from all traces of a run.

    Attributes:
        extract: The method: seal, asc, refusal, …
        run: The step that recorded the run.
        strength: The strength of the recipe; the middle one of the method's own if not given.
        sites: Where it acts; the method's own sites if empty.
        pairs: The step that made pairs.
        verdict: Words after which the model says whether it will refuse.
        fast: The first word of fast thinking.
    """

    kind: ClassVar[str] = "extract"

    extract: str
    run: str
    strength: float | None = None
    sites: tuple[str, ...] = ()
    pairs: str | None = None
    verdict: str | None = None
    fast: str | None = None

    def work(self, lab: Lab) -> Work:
        return Work(disk=1e6)

    def execute(self, lab: Lab, name: str) -> Outcome:
        store, where, chosen = lab.store(self.run), lab.where(self.run), method(self.extract)
        uses = chosen.parts(self.source(lab, self.run, store.ids, vars(self)))
        middle = chosen.strengths[len(chosen.strengths) // 2]
        asked = {key: store.meta[key] for key in ("prompt", "thinking") if key in store.meta}
        recipe = Recipe.of(
            uses,
            name=name,
            multiplier=middle if self.strength is None else self.strength,
            provenance={"method": self.extract, "run": self.run, **asked},
        )
        paths = [where.vectors / f"{self.extract}{SUFFIX}", lab.out / "vectors" / f"{name}{SUFFIX}"]
        for path in paths:
            make_folder(path.parent)
            recipe.save(path)
        summary = extraction_summary(self.extract, uses, store, store.ids, files=[f"recipe: {paths[0]}"])
        numbers = {"hash": recipe.hash, "vectors": [vector_numbers(use.vector) for use in uses]}
        return Outcome(summaries=(summary,), numbers=numbers, files=tuple(paths))


@dataclass(frozen=True, kw_only=True)
class SweepStep(_LearnsFromRun):
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
        source = replace(source, pairs=_unseen(source.pairs, judged))
        sampling = sampling_of_run(store, lab.plan.seed)
        if self.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=self.max_new_tokens)
        experiment = SteeringExperiment(
            source.model,
            judged,
            sampling,
            samples=self.samples,
            batch_size=self.batch_size,
            writer=self.writer(lab),
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
            command=f"reasonscope steer sweep {' '.join(self.methods)} --run {where.results} --n-controls {self.n_controls}",
            seed=lab.plan.seed,
        ).save(where)
        return Outcome(
            summaries=tuple(saved.summaries),
            numbers=saved.numbers,
            files=tuple(kept / f"{text.replace(':', ' ')}.json" for text in self.methods),
            figures=tuple(saved.drawn(where)),
        )

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
        return _other_traces(store, judged), judged

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


def _unseen(pairs: Sequence[CompletionPair] | None, judged: Sequence[Problem]) -> Sequence[CompletionPair] | None:
    """Pairs of problems that are not judged on. Raises InputError if none is left."""
    held = {problem.group for problem in judged}
    left = None if pairs is None else [pair for pair in pairs if pair.id not in held]
    if pairs and not left:
        raise InputError(f"all {len(pairs)} pairs are of problems that are judged on; make pairs of others")
    return left


@dataclass(frozen=True, kw_only=True)
class _SideArm:
    """A method at one strength, beside others.

    Attributes:
        method: The method, such as seal-clamp.
        run: The run that its vectors are made from, without the problems that are judged on.
        strength: Its strength.
        sites: Where it acts; its own sites if empty.
        reversed: Also run its reverse.
    """

    method: str
    run: str
    strength: float = 1.0
    sites: tuple[str, ...] = ()
    reversed: bool = False


@dataclass(frozen=True, kw_only=True)
class SideBySideStep(_LearnsFromRun):
    """Steer the same problems by several methods at one strength each, all in one batch, with random vectors for each.

    Attributes:
        side_by_side: What to compare, by the name that figures use.
        problems: What is judged on: sets or parts.
        run: The run whose sampling is used, and beside which the numbers are saved.
        n_controls: Random vectors for each method.
    """

    kind: ClassVar[str] = "side_by_side"

    side_by_side: Mapping[str, _SideArm]
    problems: tuple[str, ...]
    run: str
    n_controls: int = 2

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.run, *(arm.run for arm in self.side_by_side.values())]))

    def work(self, lab: Lab) -> Work:
        longest = lab.plan.steps[self.run].max_new_tokens  # type: ignore[attr-defined]  # it records
        arms = 1 + sum(1 + arm.reversed + self.n_controls for arm in self.side_by_side.values())
        return Work(written=float(len(lab.problems(self.problems)) * longest * arms), disk=10e6)

    def execute(self, lab: Lab, name: str) -> Outcome:
        judged, where = lab.problems(self.problems), lab.where(self.run)
        uses = {of: self._uses(lab, arm, judged) for of, arm in self.side_by_side.items()}
        sampling = sampling_of_run(lab.store(self.run), lab.plan.seed)
        experiment = SteeringExperiment(lab.model_of(self.run), judged, sampling, on_given_text=False)
        arms, written = self._run(experiment, uses)
        paths = [_save_recipe(where.vectors / f"{of}{SUFFIX}", of, parts, self.run) for of, parts in uses.items()]
        saved = Measured(
            name="steering",
            summaries=[_side_by_side_summary(arms)],
            numbers={**{arm.name: arm.to_dict() for arm in arms}, "same_texts": _same_texts(written)},
            figures={"steering_plane": steering_plane(arms)},
            command=f"reasonscope study {lab.plan.name} --out {lab.out}",
            seed=lab.plan.seed,
        ).save(where)
        return Outcome(
            summaries=tuple(saved.summaries),
            numbers=saved.numbers,
            files=(*saved.files(where), *paths),
            figures=tuple(saved.drawn(where)),
        )

    def _uses(self, lab: Lab, arm: _SideArm, judged: Sequence[Problem]) -> tuple[VectorUse, ...]:
        ids = _other_traces(lab.store(arm.run), judged)
        told = {"sites": arm.sites, "pairs": None, "verdict": None, "fast": None}
        return method(arm.method).parts(self.source(lab, arm.run, ids, told))

    def _run(
        self, experiment: SteeringExperiment, uses: Mapping[str, tuple[VectorUse, ...]]
    ) -> tuple[list[Arm], dict[str, ArmMeasurements]]:
        """The unsteered model, reverses, methods and random vectors, and what was written under each method."""
        told = self.side_by_side
        back = [
            condition
            for of, arm in told.items()
            if arm.reversed
            for condition in method_conditions(f"{of} reversed", uses[of], -arm.strength)
        ]
        steered = [method_conditions(of, uses[of], arm.strength)[0] for of, arm in told.items()]
        runs = experiment.run_all([*back, *steered])
        named = [*back, *steered]
        arms = [experiment.arm(one.name, one.multiplier, run) for one, run in zip(named, runs, strict=True)]
        moves = dict(zip(told, (arm.moves for arm in arms[len(back) :]), strict=True))
        random = [
            condition
            for of, arm in told.items()
            for condition in random_conditions(of, uses[of], arm.strength, n_controls=self.n_controls, moves=moves[of])
        ]
        written = dict(zip(told, runs[len(back) :], strict=True))
        return [experiment.base_arm, *arms, *experiment.arms(random)], written


def _side_by_side_summary(arms: Sequence[Arm]) -> Summary:
    """Every arm in a row, the random vectors among them."""
    base, *others = arms
    rows = [("unsteered", in_words(base.tokens), "", in_hundredths(base.accuracy), "")]
    rows += [
        (arm.name, in_words(arm.tokens), in_percent(arm.change), in_hundredths(arm.accuracy), in_words(arm.distance))
        for arm in others
    ]
    return Summary(
        finding=f"{len(others)} arms on {plural(base.n_problems, 'problem')} that no vector was made from, with the same seeds.",
        columns=("arm", "thinking tokens", "change", "accuracy", "moved by"),
        rows=rows,
    )


def _other_traces(store: TraceStore, judged: Sequence[Problem]) -> tuple[str, ...]:
    """The traces of problems in other groups than those that are judged on. Raises InputError if every trace is of such a group."""
    held = {problem.group for problem in judged}
    ids = tuple(trace.id for trace in store if trace.problem.group not in held)
    if not ids:
        raise InputError(f"all problems of {store.path} are judged on; judge on others")
    return ids


def _save_recipe(path: Path, of: str, uses: Sequence[VectorUse], run: str) -> Path:
    make_folder(path.parent)
    Recipe.of(uses, name=of, provenance={"method": of, "run": run}).save(path)
    return path


def _same_texts(written: Mapping[str, ArmMeasurements]) -> dict[str, int]:
    """On how many problems two methods write the same text, by their names."""
    return {
        f"{one}, {other}": sum(
            a.text == b.text for a, b in zip(written[one].traces, written[other].traces, strict=True)
        )
        for one, other in combinations(written, 2)
    }


@dataclass(frozen=True, kw_only=True)
class ExitStep(Step):
    """What stopping the thinking early would save, by a probe, by confidence, by stable answers and by other rules.

    Attributes:
        exit: The step that recorded the run.
        held_out: Share of the problems that the rules are judged on.
        places: An answer is forced at the end of each paragraph or sentence.
        every: The fewest tokens of thinking between two of these.
        tolerance: Accuracy that a threshold may cost, for the summary.
        n: At most so many problems to judge on.
        batch_size: Answers that are forced together.
    """

    kind: ClassVar[str] = "exit"

    exit: str
    held_out: float = 0.5
    places: Literal["paragraph", "sentence"] = "paragraph"
    every: int = 4
    tolerance: float = 0.02
    n: int | None = None
    batch_size: int = 32

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.exit,)

    def work(self, lab: Lab) -> Work:
        step: Any = lab.plan.steps[self.exit]
        traces = len(lab.problems(step.problems)) * step.samples
        return Work(written=traces * _CUTS * 16.0, read=traces * _CUTS * step.max_new_tokens / 2.0, disk=10e6)

    def execute(self, lab: Lab, name: str) -> Outcome:
        where = lab.where(self.exit)
        study = early_exits(
            lab.store(self.exit),
            lab.model_of(self.exit),
            held_out=self.held_out,
            n=self.n,
            kind=self.places,
            every=self.every,
            batch_size=self.batch_size,
            keep=lab.out / "steps" / name,
            seed=lab.plan.seed,
        )
        saved = Measured(
            name="exit",
            summaries=[exit_summary(study, tolerance=self.tolerance)],
            numbers=study.report.to_dict(),
            figures={"exit_frontier": exit_frontier(study.report)},
            probes={"exit": study.fitted.probe} if study.fitted else {},
            command=f"reasonscope steer exit --run {where.results} --held-out {self.held_out}",
            seed=lab.plan.seed,
        ).save(where)
        return Outcome(
            summaries=tuple(saved.summaries),
            numbers=saved.numbers,
            files=tuple(saved.files(where)),
            figures=tuple(saved.drawn(where)),
        )
