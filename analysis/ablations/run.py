"""Run a plan of ablations and patches over a run: every reading is kept, so that an interrupted plan goes on, and results are saved.

RUN/results/ablation/NAME.safetensors          effects beside their controls; NAME is the name of the plan
RUN/results/ablation_answers/NAME.safetensors  what the ablated model wrote
RUN/results/patching/NAME-PATCH.safetensors    activation patching, one file for each patch
RUN/figures/…                                  their figures
RUN/cells/ablation-KEY/                        what was measured of each trace; a plan that grew measures only what is new
"""

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from shlex import quote
from typing import Any

from reasonscope.analysis.ablations.head_names import heads_of, named_heads
from reasonscope.analysis.ablations.result_files import ablation_result, answers_result, patching_result
from reasonscope.analysis.ablations.summaries import study_summaries
from reasonscope.analysis.figures import to_html
from reasonscope.analysis.figures.ablations import ablation_figures
from reasonscope.analysis.results import Result, file_name, result_path
from reasonscope.data.errors import InputError
from reasonscope.data.progress import tracked
from reasonscope.data.storage.durable import make_folder, sha256_of, write_text_durably
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.response_cache import ResponseCache
from reasonscope.data.storage.run_folder import RunFolder, run_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary
from reasonscope.data.trace import Message, Problem, Sampling, Trace
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.effects import AblationEffect, Cells, ablation_effect
from reasonscope.steering.ablation.patching import PatchPair, patch_activations
from reasonscope.steering.ablation.plan import Patch, Plan, Side, read_plan
from reasonscope.steering.ablation.regeneration import RegenerationEffect, regenerate_ablated
from reasonscope.steering.ablation.targets import Ablation, How
from reasonscope.steering.experiments.held_out import model_of_run, sampling_of_run
from reasonscope.steering.recipes.description import scope_for
from reasonscope.steering.vectors.scope import Scope

HOWS: tuple[How, ...] = ("zero", "mean", "resample")


@dataclass(frozen=True, kw_only=True, eq=False)
class AblationStudy:
    """What a plan measured.

    Attributes:
        name: The name of the plan, and of its files.
        plan: The plan.
        effects: By ablation, the effect on the given answers.
        regenerated: By ablation, what the ablated model wrote; empty if it was not asked.
        unwritten: By ablation, why the ablated model was asked and did not write, such as that nothing was cut in what it wrote.
        patched: By patch, the result of activation patching.
        results: All results as they were saved.
        where: The folders of the run.

    Example:
        study = rs.analysis.ablate("runs/mine", "plan.yaml")
        study.effects["two heads"].p_value
        print(*study.summaries(), sep="\\n\\n")
    """

    name: str
    plan: Plan
    effects: Mapping[str, AblationEffect]
    regenerated: Mapping[str, RegenerationEffect]
    unwritten: Mapping[str, str]
    patched: Mapping[str, Result]
    results: tuple[Result, ...]
    where: RunFolder

    def to_dict(self) -> dict[str, Any]:
        """Every number by the name of its ablation or patch, for JSON."""
        told: dict[str, Any] = {name: one.to_dict() for name, one in self.effects.items()}
        for name, one in self.regenerated.items():
            told[name]["regenerate_ablated"] = one.to_dict()
        for name, why in self.unwritten.items():
            told[name]["regenerate_ablated"] = f"not measured: {why}"
        return told | {name: dict(one.numbers) for name, one in self.patched.items()}

    def summaries(self, *, next_command: str = "") -> list[Summary]:
        """The finding with its controls, parts of the traces, what was written again, and patches."""
        found = study_summaries(self.effects, self.regenerated, self.unwritten, self.patched)
        methods = ", ".join(dict.fromkeys(one.method for one in self.results))
        files = [f"Results: {self.where.analyses} ({methods}: {self.name}); figures: {self.where.figures}"]
        return [*found[:-1], replace(found[-1], files=files, next_command=next_command)]


def head_plan(
    heads: Sequence[Head],
    *,
    name: str = "heads",
    hows: Sequence[How] = HOWS,
    scope: Scope | None = None,
    **numbers: Any,
) -> Plan:
    """Does it matter causally? The plan that removes heads by zero, mean and resample, each beside random heads and moves as far.

    Args:
        heads: The heads.
        name: What tables call them.
        hows: In what ways they are removed.
        scope: The tokens at which they are removed; all by default.
        **numbers: Other fields of the plan, such as `traces=8` or `n_controls=20`.

    Returns:
        A plan for `ablate`.

    Raises:
        InputError: Without heads, or for another way than zero, mean and resample.

    Example:
        heads = rs.analysis.named_heads(run.where, "from:analyse/heads@top10")
        plan = rs.analysis.head_plan(heads, traces=8)
        study = rs.analysis.ablate("runs/mine", plan)
    """
    where = scope or Scope()
    ablations = tuple(Ablation(name=f"{name}, {how}", heads=tuple(heads), how=how, scope=where) for how in hows)
    return Plan(ablations=ablations, **numbers)


def ablate(
    run: str | Path,
    plan: Plan | str | Path,
    *,
    model: Model | str | None = None,
    name: str = "",
    fresh: bool = False,
    command: str = "",
    **load: Any,
) -> AblationStudy:
    """Run a plan of ablations and patches over a run, as `reasonscope ablate` does.

    Args:
        run: The folder of a run.
        plan: A plan, or the YAML file of one.
        model: The model, or its name; by default the model that wrote the run.
        name: The name of the results; by default that of the file.
        fresh: Measure everything again, and keep nothing of what was measured before.
        command: The command that makes the results again; by default that of a plan's file.
        **load: Passed to `load_model`, such as `device="cuda:0"`.

    Returns:
        What was measured. It is also saved in RUN/results, with figures in RUN/figures.

    Raises:
        InputError: The plan is invalid, or names what the run or the model lacks.
        SiteError: It names a layer that the model lacks.

    Example:
        study = rs.analysis.ablate("runs/mine", "plan.yaml")
        for result in study.results:
            print(result.method, result.values, result.null.high)
    """
    where = run_folder(Path(run))
    store = TraceStore.open(where.store)
    loaded = model if isinstance(model, Model) else model_of_run(store, model, **load)
    chosen = plan if isinstance(plan, Plan) else read_plan(Path(plan), loaded, heads_from=partial(named_heads, where))
    called = name or ("plan" if isinstance(plan, Plan) else Path(plan).stem)
    chosen.check(loaded)
    again = command if isinstance(plan, Plan) else f"reasonscope ablate {quote(str(plan))} --run {quote(str(run))}"
    runner = _Runner(where=where, store=store, model=loaded, plan=chosen, name=called, command=again)
    return runner.run(fresh=fresh)


def ablate_heads(
    run: str | Path,
    heads: str,
    *,
    hows: Sequence[str] = HOWS,
    on: str = "all",
    model: str | None = None,
    fresh: bool = False,
    load: Mapping[str, object] | None = None,
    **numbers: Any,
) -> AblationStudy:
    """What `reasonscope ablate --heads` does: `head_plan` for heads that are written out or named after a result of the run."""
    where = run_folder(Path(run))
    name, chosen = heads_of(where, heads)
    store = TraceStore.open(where.store)
    if on == "think" and not any(trace.n_thinking_tokens for trace in store):
        raise InputError(
            f"no trace of {store.path} thinks, so heads cannot be removed from the thinking; leave out --on think"
        )
    loaded = model_of_run(store, model, **(load or {}))
    scope = scope_for({} if on == "all" else {"on": on}, loaded)
    plan = head_plan(chosen, name=name, hows=hows, scope=scope, **numbers)  # type: ignore[arg-type]  # checked by Ablation
    told = "".join(f" --{key.replace('_', '-')} {value}" for key, value in numbers.items() if value is not None)
    ways = "".join(f" --how {how}" for how in hows)
    command = f"reasonscope ablate --heads {quote(heads)}{ways} --on {on}{told} --run {quote(str(run))}"
    called = name if on == "all" else f"{name} on {on}"
    return ablate(run, plan, model=loaded, name=called, fresh=fresh, command=command)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Runner:
    """A plan on the traces of a run."""

    where: RunFolder
    store: TraceStore
    model: Model
    plan: Plan
    name: str
    command: str = ""
    traces: list[Trace] = field(default_factory=list)

    def run(self, *, fresh: bool) -> AblationStudy:
        self.traces[:] = list(self.store)[: self.plan.traces]
        if fresh:
            shutil.rmtree(self._folder, ignore_errors=True)
        cells = ResponseCache(self._folder)
        effects = {
            one.name: ablation_effect(
                self.model,
                self.traces,
                one,
                n_controls=self.plan.n_controls,
                n_matched=self.plan.n_matched,
                seed=self.plan.seed,
                cells=cells,
            )
            for one in tracked(self.plan.ablations, "ablating", "ablations", name=attrgetter("name"))
        }
        written, unwritten = self._regenerated(cells)
        patched = {one.name: self._patched(one, cells) for one in self.plan.patches}
        results = [ablation_result(effects, self.plan.sweeps, self._provenance)] if effects else []
        results += [answers_result(written, self._provenance)] if written else []
        saved = [self._save(one, self.name) for one in results]
        named = {key: self._save(one, f"{self.name}-{key}") for key, one in patched.items()}
        return AblationStudy(
            name=self.name,
            plan=self.plan,
            effects=effects,
            regenerated=written,
            unwritten=unwritten,
            patched=named,
            results=(*saved, *named.values()),
            where=self.where,
        )

    @property
    def _folder(self) -> Path:
        """Where what was measured is kept: a folder for this model, these traces and this version."""
        return self.where.results / "cells" / f"ablation-{_hash(self._reads)[:16]}"

    @property
    def _reads(self) -> dict[str, Any]:
        """What every number depends on, besides the ablation itself."""
        return {
            "model": dict(self.model.fingerprint),
            "store": sha256_of(self.store.path / NAME),
            "traces": [trace.id for trace in self.traces],
            "version": version("reasonscope"),
        }

    @property
    def _provenance(self) -> dict[str, Any]:
        """What a result says about itself: the plan in full, and a hash of everything that it depends on."""
        told = {one.name: one.describe() for one in self.plan.ablations}
        patches = [str(one) for one in self.plan.patches]
        numbers = {key: getattr(self.plan, key) for key in ("n_controls", "n_matched", "problems", "seed")}
        whole = {**self._reads, "ablations": told, "patches": patches, **numbers}
        return {
            "plan": self.name,
            "command": self.command,
            "hash": _hash(whole),
            "model": str(self.model.fingerprint.get("name")),
            "run": self.store.path.name,
            "ablations": told,
            **numbers,
        }

    def _regenerated(self, cells: Cells) -> tuple[dict[str, RegenerationEffect], dict[str, str]]:
        """What each ablated model wrote, or why it did not: what was read before is not lost because nothing was cut here."""
        problems = list({trace.problem.id: trace.problem for trace in self.traces}.values())[: self.plan.problems]
        asked = self.plan.ablations if problems else ()
        sampling = sampling_of_run(self.store, self.plan.seed)
        written, unwritten = dict[str, RegenerationEffect](), dict[str, str]()
        for one in tracked(asked, "answering again", "ablations", name=attrgetter("name")):
            try:
                written[one.name] = self._written(one, problems, sampling, cells)
            except InputError as error:
                unwritten[one.name] = str(error)
        return written, unwritten

    def _written(
        self, ablation: Ablation, problems: Sequence[Problem], sampling: Sampling, cells: Cells
    ) -> RegenerationEffect:
        n, seed = self.plan.n_regeneration_controls, self.plan.seed
        asked = [ablation.describe(), [problem.id for problem in problems], str(sampling), n, seed]
        key = f"written/{_hash(asked)[:24]}"
        if (known := cells.get(key)) is not None:
            found = RegenerationEffect.from_dict(known)
            return replace(found, arm=replace(found.arm, name=ablation.name))
        found = regenerate_ablated(self.model, ablation, self.traces, problems, sampling, n_controls=n, seed=seed)
        cells.put(key, found.to_dict())
        return found

    def _patched(self, patch: Patch, cells: Cells) -> Result:
        pair = self._pair(patch)
        pair.check(patch.last)
        others = self._unrelated(patch, patch.last or len(pair.corrupted))
        found = patch_activations(self.model, pair, at=patch.at, last=patch.last, unrelated=others, cells=cells)
        about = {**self._provenance, "patch": patch.name, "clean": str(patch.clean), "corrupted": str(patch.corrupted)}
        return patching_result(self.model, found, pair, {**about, "unrelated": len(others)})

    def _pair(self, patch: Patch) -> PatchPair:
        if patch.clean.trace is not None and patch.corrupted.trace is not None:
            return PatchPair.of_traces(self.store.trace(patch.clean.trace), self.store.trace(patch.corrupted.trace))
        answers = patch.clean.answer or "", patch.corrupted.answer or ""
        texts = (self._ids(side) for side in (patch.clean, patch.corrupted))
        return PatchPair.of_texts(self.model, next(texts), next(texts), answers)

    def _ids(self, side: Side) -> list[int]:
        if side.prompt is not None:
            return self.model.encode_text(side.prompt)
        problem = Problem(id="patch", messages=(Message(role="user", content=side.question or ""),))
        return self.model.encode_prompt(problem, prefill=side.prefill)

    def _unrelated(self, patch: Patch, window: int) -> list[list[int]]:
        """Traces of other problems that are long enough, at random. Raises InputError if controls are asked for and no trace is."""
        own = {
            self.store.trace(id).problem.group for id in (patch.clean.trace, patch.corrupted.trace) if id is not None
        }
        able = [
            trace.token_ids.tolist()
            for trace in self.traces
            if trace.problem.group not in own and len(trace.token_ids) >= window
        ]
        if patch.n_controls and not able:
            raise InputError(
                f"patch {patch.name!r}: no trace of another problem has {window} tokens to patch in as a control; "
                "read more traces, patch the last few tokens only (last: 8), or set n_controls: 0"
            )
        random.Random(self.plan.seed).shuffle(able)
        return able[: patch.n_controls]

    def _save(self, result: Result, name: str) -> Result:
        path = result.save(result_path(self.where.analyses, result.method, name))
        make_folder(self.where.figures)
        for kind, figure in ablation_figures(result).items():
            file = self.where.figures / f"{result.method}-{file_name(name)}-{kind}.html"
            write_text_durably(file, to_html(figure, with_library=True))
        return Result.load(path)


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, default=str, sort_keys=True).encode()).hexdigest()
