"""`reasonscope steer`: extract vectors from a run and sweep their strength; `reasonscope ablate`: run a plan of ablations."""

from pathlib import Path
from typing import Annotated

import typer

from reasonscope.app.commands.loading import Load, loads_model
from reasonscope.app.commands.show import show

steer = typer.Typer(help="Extract steering vectors from a run, and sweep their strength.", no_args_is_help=True)

RunOption = Annotated[Path, typer.Option(help="The folder of a run, or of the demo.")]
ModelName = Annotated[str | None, typer.Option("--model", help="The model to steer; the run's own where not given.")]
SitesOption = Annotated[str | None, typer.Option(help="Where, as resid_post.3; the method's own where not given.")]
Verdict = Annotated[
    str | None,
    typer.Option(help="Words of the thinking that the verdict on a request follows; the organism's are known."),
]
Fast = Annotated[
    str | None, typer.Option(help="The first word that makes it think fast; the organism's is known, else To.")
]
HeldOutOption = Annotated[float, typer.Option(min=0, max=1, help="Share of the problems that are kept to judge on.")]
SeedOption = Annotated[int, typer.Option(help="Of the split, the sampling and the random controls.")]
BackendOption = Annotated[str, typer.Option(help="hooks, transformer_lens or nnsight.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]


@steer.command()
@loads_model
def extract(
    method: Annotated[str, typer.Argument(help="seal, seal-reflection, …: an unknown name lists them all.")],
    run: RunOption,
    load: Load,
    out: Annotated[
        Path | None, typer.Option(help="A .safetensors or .gguf file; RUN/steering/METHOD.safetensors where not given.")
    ] = None,
    sites: SitesOption = None,
    verdict: Verdict = None,
    fast: Fast = None,
    held_out: HeldOutOption = 0.5,
    seed: SeedOption = 0,
    model: ModelName = None,
    backend: BackendOption = "hooks",
    json_: JsonOption = False,
) -> None:
    """Make a vector from the problems of a run that are not held out, and save it."""
    from reasonscope.data.storage.durable import make_folder
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.architecture.sites import expand_sites
    from reasonscope.steering.experiments.held_out import model_of_run, source_of_run, split_run, vector_numbers
    from reasonscope.steering.methods.registry import method as by_name

    chosen, where = by_name(method), run_folder(run)
    store = TraceStore.open(where.store)
    split = split_run(store, share=held_out, n=None, seed=seed)
    loaded = model_of_run(store, model, backend=backend, **load)
    expanded = expand_sites(sites, loaded.n_layers) if sites else None
    source = source_of_run(loaded, store, split, sites=expanded, verdict=verdict, fast=fast)
    path = out or where.results / "steering" / f"{method}.safetensors"
    make_folder(path.parent)
    shown = []
    for number, part in enumerate(chosen.parts(source)):
        file = path if number == 0 else path.with_stem(f"{path.stem}-{number + 1}")
        part.vector.save(file)
        shown.append({"file": str(file), **vector_numbers(part.vector)})
    show(shown[0] if len(shown) == 1 else {"parts": shown}, json_)


@steer.command()
@loads_model
def sweep(
    methods: Annotated[
        list[str],
        typer.Argument(
            help="Methods and controls of the decoding, drawn on one plane; with strengths of their own as seal:0.5,1."
        ),
    ],
    run: RunOption,
    load: Load,
    strengths: Annotated[
        str | None, typer.Option(help="Of the methods that say none, as 0.5,1,2; each method's own where not given.")
    ] = None,
    nulls: Annotated[int, typer.Option(min=5, help="Random vectors of the same norm at each strength.")] = 5,
    covariance: Annotated[
        bool, typer.Option("--covariance", help="Give the random vectors the states' covariance.")
    ] = False,
    n: Annotated[int | None, typer.Option(min=2, help="Held-out problems to judge on; all where not given.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each problem.")] = 1,
    sites: SitesOption = None,
    verdict: Verdict = None,
    fast: Fast = None,
    held_out: HeldOutOption = 0.5,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows of a pass, a problem and an arm each; up to 256 as the memory allows where not given."
        ),
    ] = None,
    seed: SeedOption = 0,
    model: ModelName = None,
    backend: BackendOption = "hooks",
    json_: JsonOption = False,
) -> None:
    """What each strength does to length, accuracy, refusal, form and repetition, beside random vectors and the reverse."""
    from reasonscope.analysis.figures import sweep_figures
    from reasonscope.analysis.runs.saved_numbers import save_numbers
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.architecture.sites import expand_sites
    from reasonscope.steering.experiments.experiment import SteeringExperiment
    from reasonscope.steering.experiments.held_out import (
        Asked,
        model_of_run,
        numbers_from,
        respond,
        response_numbers,
        response_rows,
        sampling_of_run,
        source_of_run,
        split_run,
    )

    asked = [Asked.parse(text) for text in methods]
    given, where = numbers_from(strengths) if strengths else None, run_folder(run)
    store = TraceStore.open(where.store)
    split = split_run(store, share=held_out, n=n, seed=seed)
    loaded = model_of_run(store, model, backend=backend, **load)
    expanded = expand_sites(sites, loaded.n_layers) if sites else None
    source = source_of_run(loaded, store, split, sites=expanded, verdict=verdict, fast=fast)
    experiment = SteeringExperiment(
        loaded, split.held_out, sampling_of_run(store, seed), samples=samples, batch_size=batch_size
    )
    responses = [
        respond(
            experiment,
            source,
            one,
            strengths=given,
            n_controls=nulls,
            covariance=covariance,
            say=lambda text: typer.echo(text, err=True),
        )
        for one in asked
    ]
    numbers = {response.name: response_numbers(response) for response in responses}
    command = f"reasonscope steer sweep {' '.join(methods)} --run {run} --nulls {nulls} --seed {seed}"
    save_numbers(where, "sweep", numbers, command=command, seed=seed, figures=sweep_figures(responses))
    shown = response_numbers if json_ else response_rows
    show({response.name: shown(response) for response in responses}, json_)


@loads_model
def ablate(
    plan: Annotated[
        Path, typer.Argument(help="A YAML file of ablations; see reasonscope.steering.experiments.ablation_plan.")
    ],
    run: RunOption,
    load: Load,
    model: ModelName = None,
    json_: JsonOption = False,
) -> None:
    """Take heads, MLPs, layers, tokens or attention edges away: what it does to the answer, beside random others, and to the thinking."""
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.steering.experiments.ablation import ablation_effect, regenerate_ablated
    from reasonscope.steering.experiments.ablation_plan import read_plan
    from reasonscope.steering.experiments.held_out import ablation_numbers, anew_numbers, model_of_run, sampling_of_run

    store = TraceStore.open(run_folder(run).store)
    loaded = model_of_run(store, model, **load)
    chosen = read_plan(plan, loaded)
    traces = list(store)[: chosen.traces]
    problems = list({trace.problem.id: trace.problem for trace in traces}.values())[: chosen.problems]
    shown = {}
    for one in chosen.ablations:
        typer.echo(one.name, err=True)
        found = ablation_effect(loaded, traces, one, n_controls=chosen.n_controls, seed=chosen.seed)
        shown[one.name] = ablation_numbers(found)
        if problems and one.edges is not None:
            shown[one.name]["regenerate_ablated"] = (
                "not measured: attention edges are cut in passes over finished text alone"
            )
        elif problems:
            sampling = sampling_of_run(store, chosen.seed)
            anew = regenerate_ablated(
                loaded, one, traces, problems, sampling, n_controls=chosen.n_regeneration_controls, seed=chosen.seed
            )
            shown[one.name]["regenerate_ablated"] = anew_numbers(anew)
    show(shown, json_)
