"""Steps that make pairs of answers and steering vectors, and what every step that learns from a run shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from reasonscope.analysis.studies.lab import Lab, sites_of
from reasonscope.analysis.studies.steps.base import Outcome, Step, Work
from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Problem, Sampling
from reasonscope.steering.experiments.extraction import extraction_summary, vector_numbers
from reasonscope.steering.methods.asc import CompletionPair, load_pairs
from reasonscope.steering.methods.pairs import CONCISE, VERBOSE, make_pairs
from reasonscope.steering.methods.registry import ExtractionData, method
from reasonscope.steering.recipes.files import SUFFIX
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.application import VectorUse


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
        path = pairs_file(lab, name)
        made.save(path)
        return Outcome(
            summaries=(replace(made.summary(), files=[f"Pairs: {path}"]),), numbers=made.to_dict(), files=(path,)
        )


def pairs_file(lab: Lab, step: str) -> Path:
    """The file of the pairs that a step made."""
    return lab.out / "pairs" / f"{step}.jsonl"


@dataclass(frozen=True, kw_only=True)
class LearnsFromRun(Step):
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
            pairs=None if pairs is None else load_pairs(pairs_file(lab, pairs)),
        )


def unseen(pairs: Sequence[CompletionPair] | None, judged: Sequence[Problem]) -> Sequence[CompletionPair] | None:
    """Pairs of problems that are not judged on. Raises InputError if none is left."""
    held = {problem.group for problem in judged}
    left = None if pairs is None else [pair for pair in pairs if pair.id not in held]
    if pairs and not left:
        raise InputError(f"all {len(pairs)} pairs are of problems that are judged on; make pairs of others")
    return left


def other_traces(store: TraceStore, judged: Sequence[Problem]) -> tuple[str, ...]:
    """The traces of problems in other groups than those that are judged on. Raises InputError if every trace is of such a group."""
    held = {problem.group for problem in judged}
    ids = tuple(trace.id for trace in store if trace.problem.group not in held)
    if not ids:
        raise InputError(f"all problems of {store.path} are judged on; judge on others")
    return ids


def save_recipe(path: Path, of: str, uses: Sequence[VectorUse], run: str) -> Path:
    make_folder(path.parent)
    Recipe.of(uses, name=of, provenance={"method": of, "run": run}).save(path)
    return path


@dataclass(frozen=True, kw_only=True)
class ExtractStep(LearnsFromRun):
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
