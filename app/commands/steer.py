"""`reasonscope steer`: extract vectors from a run, and sweep their strength."""

from dataclasses import dataclass, replace
from enum import StrEnum
from operator import attrgetter
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from reasonscope.app.commands.options import (
    HowMany,
    JsonOption,
    Load,
    ModelName,
    RunOption,
    ServedOptions,
    given_options,
    grouped,
)
from reasonscope.app.commands.show import show_summary

if TYPE_CHECKING:
    from reasonscope.steering.engine.arms import EngineArms

steer = typer.Typer(help="Extract steering vectors from a run, and sweep their strength.", no_args_is_help=True)

SitesOption = Annotated[
    str | None, typer.Option(help="Sites to steer, such as resid_post.3; by default the method's own sites.")
]
Verdict = Annotated[
    str | None,
    typer.Option(
        help="For refusal methods: the words of the thinking after which the model says whether it will refuse; "
        "by default those in its config.json."
    ),
]
Fast = Annotated[
    str | None,
    typer.Option(
        help='For speed: the first word that makes the model think fast; by default that in its config.json, else "To".'
    ),
]
PairsOption = Annotated[
    Path | None,
    typer.Option(help="For asc and speed: a JSONL file of concise and verbose answers, as `steer pairs` makes it."),
]
HeldOutOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the problems that nothing is learned from, to judge on.")
]
SeedOption = Annotated[int, typer.Option(help="Random seed of the split, the sampling and the random controls.")]
AskedSeedOption = Annotated[int, typer.Option(help="Random seed of the choice of problems and of the sampling.")]
BackendOption = Annotated[str, typer.Option(help="hooks, transformer_lens or nnsight.")]


@dataclass(frozen=True, kw_only=True)
class _ArmsOptions(ServedOptions):
    """A server of vLLM that writes every arm of a sweep."""

    server: Annotated[
        str | None,
        typer.Option(
            help="With --backend vllm: a server of vLLM with vllm-lens, http://host:port, that writes under every condition; the model "
            "here makes the vectors and reads each text once."
        ),
    ] = None

    def writer(self, backend: str) -> "EngineArms | None":
        """What writes the arms; None if the model here does."""
        from reasonscope.data.errors import InputError
        from reasonscope.steering.engine.arms import EngineArms

        if (backend == "vllm") != (self.server is not None):
            raise InputError("arms are written in vLLM by --backend vllm and --server together; give both or neither")
        if self.server is None:
            return None
        return EngineArms(url=self.server, workers=self.requests, trusted=self.trust_server, how=self.how())


class _PlaceArgument(StrEnum):
    """After what thinking may stop."""

    paragraph = "paragraph"
    sentence = "sentence"


@steer.command("extract")
@grouped
def _extract(
    method: Annotated[
        str,
        typer.Argument(
            help="seal, asc, refusal, …, adaptive-speed, budget-guidance, or a decoding method; an unknown name lists them all."
        ),
    ],
    run: RunOption,
    load: Load,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file of the recipe, or a .gguf file if that can hold it; by default RUN/steering/METHOD.recipe.safetensors."
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="The strength of the recipe, by default the middle one of the method's own; for adaptive-speed its highest strength "
            "as a share of the state's norm, for budget-guidance the budget in tokens, for a decoding method its value."
        ),
    ] = None,
    sites: SitesOption = None,
    verdict: Verdict = None,
    fast: Fast = None,
    pairs: PairsOption = None,
    held_out: HeldOutOption = 0.5,
    seed: SeedOption = 0,
    model: ModelName = None,
    backend: BackendOption = "hooks",
    json_: JsonOption = False,
) -> None:
    """Make a recipe from the problems of a run that are not held out: vectors with their tokens, operators and strength.

    A decoding method learns nothing, and its recipe holds its name and its value.
    """
    from reasonscope.data.storage.durable import make_folder
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.architecture.sites import expand_sites
    from reasonscope.steering.experiments.extraction import extraction_summary, vector_numbers
    from reasonscope.steering.experiments.held_out import model_of_run, source_of_run, split_run
    from reasonscope.steering.methods.asc import load_pairs
    from reasonscope.steering.methods.registry import METHODS
    from reasonscope.steering.recipes.files import SUFFIX
    from reasonscope.steering.recipes.learned import check_without_vectors, recipe_without_vectors
    from reasonscope.steering.recipes.recipe import Recipe

    where = run_folder(run)
    chosen = METHODS.get(method)
    if chosen is None:
        check_without_vectors(method)
    store = TraceStore.open(where.store)
    split = split_run(store, share=held_out, n=None, seed=seed)
    loaded = model_of_run(store, model, backend=backend, **load)
    expanded = expand_sites(sites, loaded.n_layers) if sites else None
    given_pairs = load_pairs(pairs) if pairs else None
    source = source_of_run(loaded, store, split, sites=expanded, verdict=verdict, fast=fast, pairs=given_pairs)
    path = out or where.vectors / f"{method}{SUFFIX}"
    make_folder(path.parent)
    asked = {key: store.meta[key] for key in ("prompt", "thinking") if key in store.meta}
    about = {"method": method, "run": str(run), **asked}
    if chosen is None:
        recipe = recipe_without_vectors(method, source, strength, provenance=about)
        recipe.save(path)
        files, following = [f"recipe: {path} (hash {recipe.hash})"], f"reasonscope steer sweep {path} --run {run}"
        shown_recipe = replace(recipe.summary(), files=files, next_command=following)
        show_summary(shown_recipe, {"file": str(path), **recipe.to_dict()}, json_)
        return
    parts, middle = chosen.parts(source), chosen.strengths[len(chosen.strengths) // 2]
    recipe = Recipe.of(parts, name=method, multiplier=middle if strength is None else strength, provenance=about)
    recipe.save(path)
    vectors = [vector_numbers(part.vector) for part in parts]
    shown = vectors[0] if len(vectors) == 1 else {"parts": vectors}
    summary = extraction_summary(
        method,
        parts,
        store,
        split.ids,
        files=[f"recipe: {path} (hash {recipe.hash})"],
        next_command=f"reasonscope steer sweep {path} --run {run}",
    )
    show_summary(summary, {"file": str(path), **recipe.meta, **shown}, json_)


@steer.command("show")
def _show(recipes: Annotated[list[Path], typer.Argument(help="Files of recipes.")], json_: JsonOption = False) -> None:
    """Say what recipes do: vectors, tokens, operators, strengths, decoding, and what they were made from."""
    from reasonscope.steering.recipes.recipe import Recipe

    found = [Recipe.load(path) for path in recipes]
    show_summary([recipe.summary() for recipe in found], {recipe.name: recipe.to_dict() for recipe in found}, json_)


@steer.command("merge")
def _merge(
    recipes: Annotated[list[Path], typer.Argument(help="Files of recipes, applied in this order.")],
    out: Annotated[Path, typer.Option(help="The file of the merged recipe.")],
    name: Annotated[str, typer.Option(help="Its name; by default the names of all.")] = "",
    json_: JsonOption = False,
) -> None:
    """Join recipes into one. It is an error if two of them clamp one site on tokens that overlap."""
    from functools import reduce

    from reasonscope.steering.recipes.recipe import Recipe

    merged = reduce(Recipe.merged, [Recipe.load(path) for path in recipes])
    merged = replace(merged, name=name or merged.name)
    merged.save(out)
    summary = replace(
        merged.summary(), files=[f"recipe: {out}"], next_command=f"reasonscope steer apply {out} --prompt …"
    )
    show_summary(summary, {"file": str(out), **merged.to_dict()}, json_)


@steer.command("apply")
@grouped
def _apply(
    recipe: Annotated[Path, typer.Argument(help="The file of a recipe.")],
    load: Load,
    prompt: Annotated[list[str] | None, typer.Option(help="A question; may be repeated.")] = None,
    problems: Annotated[
        str | None, typer.Option(help="Problems instead: ledger, requests, a JSONL file, or hf:NAME.")
    ] = None,
    n: HowMany = None,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 512,
    seed: AskedSeedOption = 0,
    model: Annotated[
        str | None, typer.Option(help="The model to steer; by default the one that the recipe was made for.")
    ] = None,
    backend: BackendOption = "hooks",
    json_: JsonOption = False,
) -> None:
    """Answer with and without a recipe, from the same seed, and show both answers beside each other."""
    from reasonscope.data.errors import InputError
    from reasonscope.data.exchange.problem_sets import load_problems
    from reasonscope.data.trace import Sampling
    from reasonscope.probes.models.model import load_model
    from reasonscope.probes.models.prompting import as_recorded
    from reasonscope.steering.recipes.answers import answer_with, question
    from reasonscope.steering.recipes.recipe import Recipe

    if bool(prompt) == (problems is not None):
        raise InputError("give either --prompt or --problems")
    loaded = Recipe.load(recipe)
    source = model or (loaded.provenance.get("model") or {}).get("name")
    if not source:
        raise InputError(f"{recipe} does not say which model it was made for; give --model")
    asked = load_problems(problems, n=n, seed=seed) if problems else [question(text) for text in prompt or ()]
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    how = as_recorded(loaded.provenance, {"backend": backend, **load}, source)
    found = answer_with(loaded, load_model(source, **how), asked, sampling)
    show_summary(found.summary(), found.to_dict(), json_)


@steer.command("pairs")
@grouped
def _pairs(
    problems: Annotated[str, typer.Option(help="A problem file, or hf:NAME, as `record` takes it.")],
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    load: Load,
    model: Annotated[str, typer.Option(help="Any model: the one to steer.")],
    concise: Annotated[str | None, typer.Option(help="What follows each question for a brief answer.")] = None,
    verbose: Annotated[str | None, typer.Option(help="What follows it for a long answer.")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="How many problems; by default all.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer; pairs with one that is cut are left out.")
    ] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that are written together.")] = 32,
    seed: AskedSeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Make pairs for asc and speed with any model: the same problems answered under two instructions."""
    from reasonscope.data.exchange.problem_sets import load_problems
    from reasonscope.data.trace import Sampling
    from reasonscope.probes.models.model import load_model
    from reasonscope.steering.methods.pairs import CONCISE, VERBOSE, make_pairs

    asked = load_problems(problems, n=n, seed=seed)
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    made = make_pairs(
        load_model(model, **load),
        asked,
        concise=concise or CONCISE,
        verbose=verbose or VERBOSE,
        sampling=sampling,
        batch_size=batch_size,
    )
    made.save(out)
    following = f"reasonscope steer extract asc --pairs {quote(str(out))} --run RUN"
    summary = replace(made.summary(), files=[f"Pairs: {out}"], next_command=following)
    show_summary(summary, {**made.to_dict(), "file": str(out)}, json_)


@steer.command("sweep")
@grouped
def _sweep(
    context: typer.Context,
    methods: Annotated[
        list[str],
        typer.Argument(
            help="Steering and decoding methods and files of recipes, drawn in one figure; with strengths of its own: seal:0.5,1."
        ),
    ],
    run: RunOption,
    load: Load,
    served: _ArmsOptions,
    strengths: Annotated[
        str | None,
        typer.Option(help="For methods that name none, such as 0.5,1,2; by default each method's own."),
    ] = None,
    n_controls: Annotated[
        int,
        typer.Option(
            help="Random controls at each strength, at least 5: vectors that move states as far, or random tokens."
        ),
    ] = 5,
    covariance: Annotated[
        bool, typer.Option("--covariance", help="Draw the random vectors with the covariance of the states.")
    ] = False,
    n: Annotated[int | None, typer.Option(min=2, help="Held-out problems to judge on; by default all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per problem.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion, in tokens; by default that of the run.")
    ] = None,
    sites: SitesOption = None,
    verdict: Verdict = None,
    fast: Fast = None,
    pairs: PairsOption = None,
    held_out: HeldOutOption = 0.5,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Completions that are written together; by default as many as fit, up to 256."),
    ] = None,
    seed: SeedOption = 0,
    model: ModelName = None,
    backend: Annotated[
        str, typer.Option(help="hooks, transformer_lens or nnsight; vllm if a --server writes under every condition.")
    ] = "hooks",
    json_: JsonOption = False,
) -> None:
    """Measure what each strength does to length, accuracy, refusal and form, beside random vectors and the reversed vector."""
    from reasonscope.analysis.figures import sweep_figures
    from reasonscope.analysis.runs.saved_numbers import save_numbers
    from reasonscope.analysis.studies.steps.measured import command_line
    from reasonscope.data.progress import tracked
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.architecture.sites import expand_sites
    from reasonscope.steering.experiments.dose_responses import check_controls
    from reasonscope.steering.experiments.experiment import SteeringExperiment
    from reasonscope.steering.experiments.held_out import (
        Asked,
        check_titles,
        model_of_run,
        numbers_from,
        respond,
        sampling_of_run,
        source_of_run,
        split_run,
    )
    from reasonscope.steering.methods.asc import load_pairs

    asked, writer = [Asked.parse(text) for text in methods], served.writer(backend)
    check_titles(asked)
    check_controls(n_controls)
    given, where = numbers_from(strengths) if strengths else None, run_folder(run)
    store = TraceStore.open(where.store)
    split = split_run(store, share=held_out, n=n, seed=seed)
    loaded = model_of_run(store, model, backend="hooks" if writer else backend, **load)
    expanded = expand_sites(sites, loaded.n_layers) if sites else None
    given_pairs = load_pairs(pairs) if pairs else None
    source = source_of_run(loaded, store, split, sites=expanded, verdict=verdict, fast=fast, pairs=given_pairs)
    sampling = sampling_of_run(store, seed)
    if max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=max_new_tokens)
    experiment = SteeringExperiment(
        loaded, split.held_out, sampling, samples=samples, batch_size=batch_size, writer=writer
    )
    responses = [
        respond(
            experiment,
            source,
            one,
            strengths=given,
            n_controls=n_controls,
            covariance=covariance,
        )
        for one in tracked(asked, "steering", "methods", name=attrgetter("name"))
    ]
    numbers = {response.name: response.to_dict() for response in responses}
    command = command_line(f"reasonscope steer sweep {' '.join(map(quote, methods))}", given_options(context))
    drawn = sweep_figures(responses)
    save_numbers(where, "sweep", numbers, command=command, seed=seed, figures=drawn)
    files = [f"numbers: {where.numbers / 'sweep.json'}; figures: {where.figures} ({', '.join(drawn)})"]
    summaries = [response.summary() for response in responses]
    summaries[-1] = replace(summaries[-1], files=files, next_command=f"reasonscope app {run}")
    show_summary(summaries, numbers, json_)


@steer.command("exit")
@grouped
def _exit(
    context: typer.Context,
    run: RunOption,
    load: Load,
    probe: Annotated[
        Path | None,
        typer.Option(
            help="A saved probe that may stop; by default one is fitted on the problems that are not held out."
        ),
    ] = None,
    live: Annotated[
        list[Path] | None,
        typer.Option(
            help="A run of the same problems and samples in which record --steer or --monitor stopped the model; may be repeated."
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Accuracy that a threshold may cost on the problems it is chosen by; JSON has 0, .02, .05 and .1, too.",
        ),
    ] = 0.02,
    at: Annotated[
        list[str] | None,
        typer.Option(help='A rule at a threshold of your own, such as "fixed budget=120"; may be repeated.'),
    ] = None,
    places: Annotated[
        _PlaceArgument, typer.Option(help="After what the thinking may stop.")
    ] = _PlaceArgument.paragraph,
    every: Annotated[int, typer.Option(min=1, help="The fewest tokens of thinking between two such places.")] = 4,
    false_alarms: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="With --probe: judge the threshold, too, that it passes at a wrong answer in at most this share of problems.",
        ),
    ] = None,
    recipes: Annotated[
        Path | None, typer.Option(help="A folder for the rules as recipes; by default RUN/steering.")
    ] = None,
    n: Annotated[int | None, typer.Option(min=2, help="Held-out problems to judge on; by default all.")] = None,
    held_out: HeldOutOption = 0.5,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that are forced together.")] = 32,
    seed: SeedOption = 0,
    model: ModelName = None,
    json_: JsonOption = False,
) -> None:
    """What would stopping the thinking early save, by a probe, by confidence, by stable answers and by other rules?

    The rules are saved as recipes, with which `record --steer` stops the model while it writes. Forced answers are kept.
    """
    from reasonscope.analysis.exits.run import early_exits, exit_recipes
    from reasonscope.analysis.exits.summary import exit_summary
    from reasonscope.analysis.figures import exit_frontier
    from reasonscope.analysis.runs.saved_numbers import save_numbers
    from reasonscope.analysis.studies.steps.measured import command_line
    from reasonscope.data.storage.durable import make_folder
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.fitting.linear_probes import LinearProbe
    from reasonscope.steering.experiments.held_out import model_of_run
    from reasonscope.steering.recipes.files import SUFFIX

    where = run_folder(run)
    store = TraceStore.open(where.store)
    study = early_exits(
        store,
        model_of_run(store, model, **load),
        probe=LinearProbe.load(probe) if probe else None,
        live={f"live: {path.name}": TraceStore.open(run_folder(path).store) for path in live or []},
        at=[_rule_at(text) for text in at or ()],
        tolerance=tolerance,
        held_out=held_out,
        n=n,
        kind="sentence" if places is _PlaceArgument.sentence else "paragraph",
        every=every,
        batch_size=batch_size,
        keep=where.results / "exits",
        false_alarms=false_alarms,
        seed=seed,
    )
    numbers = study.report.to_dict()
    probes = {"exit": study.fitted.probe} if study.fitted else {}
    command = command_line("reasonscope steer exit", given_options(context))
    drawn = {"exit_frontier": exit_frontier(study.report)}
    save_numbers(where, "exit", numbers, command=command, seed=seed, figures=drawn, probes=probes)
    files = [f"numbers: {where.numbers / 'exit.json'}; figure: {where.figures / 'exit_frontier.html'}"]
    folder = recipes or where.vectors
    about = {"run": str(run), **{key: store.meta[key] for key in ("model", "prompt", "thinking") if key in store.meta}}
    made = exit_recipes(study, tolerance, provenance=about)
    make_folder(folder)
    for recipe in made:
        recipe.save(folder / f"{recipe.name}{SUFFIX}")
    if made:
        files.append(f"recipes: {folder} ({', '.join(recipe.name for recipe in made)})")
    first = next((recipe.name for recipe in made if recipe.name == "exit-probe"), made[0].name if made else None)
    source = quote(str(model or (store.meta.get("model") or {}).get("name") or "MODEL"))
    following = (
        f"reasonscope record --model {source} --problems PROBLEMS --steer {folder / first}{SUFFIX} --out stopped"
        if first
        else f"reasonscope app {run}"
    )
    summary = exit_summary(study, tolerance=tolerance, files=files, next_command=following)
    show_summary(summary, numbers, json_)


def _rule_at(text: str) -> tuple[str, float]:
    """Read `fixed budget=120`."""
    from reasonscope.data.errors import InputError
    from reasonscope.steering.exits.rules import rule_named

    name, _, number = text.rpartition("=")
    rule = rule_named(name).name if name else ""
    try:
        return rule, float(number if rule else "")
    except ValueError as error:
        raise InputError(f"invalid --at {text!r}: write a rule and a threshold, such as fixed budget=120") from error
