"""`reasonscope analyse`: run an analysis over a run; its results lie beside the store, in RUN/results."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reasonscope.app.commands.loading import Load, loads_model

analyse = typer.Typer(
    help="What matters in a thinking: tokens, sentences, heads, and the signals around them.", no_args_is_help=True
)

RunOption = Annotated[Path, typer.Option(help="The folder of a run, or of the demo.")]
Chosen = Annotated[
    list[str] | None, typer.Option("--trace", help="A trace's id; may be given again. All where not given.")
]
Name = Annotated[str | None, typer.Option(help="The model that wrote the traces, where the run does not say it.")]
Server = Annotated[str | None, typer.Option(help="http://host:port of a server of this model, to write the rollouts.")]
Served = Annotated[
    str | None, typer.Option("--served-as", help="What the server calls the model; as here where not given.")
]
Timeout = Annotated[
    float,
    typer.Option("--server-timeout", min=0.1, help="Seconds that a request to the server may take, to its last byte."),
]
SitesOption = Annotated[
    str, typer.Option(help="Stored sites to look at, with commas; a sensible choice where not given.")
]
Base = Annotated[str, typer.Option(help="The model from before the reasoning phase, of the same tokenizer.")]
Own = Annotated[bool, typer.Option("--own", help="Compare with the model's own answer, not the reference solution.")]
Samples = Annotated[int, typer.Option(min=1, help="Forced answers at each cut.")]
Longest = Annotated[int, typer.Option(min=1, help="Tokens of a completion, at most.")]
SeedOption = Annotated[int, typer.Option(help="Of all that is drawn.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Share the traces out by Ray Data (what looks at all of them together goes to one worker): local, auto (the cluster of "
        "this machine) or an address.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers of Ray; as many as fit where not given.")]
Gpus = Annotated[float, typer.Option(min=0, help="Accelerators of each worker; give --device too.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]


@analyse.command()
@loads_model
def mi(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None, sites: SitesOption = "",
    own: Own = False,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """Where the hidden state depends most on the answer (MI peaks), and which words stand there."""
    gold = "own" if own else "reference"
    _run(
        "mi",
        run,
        trace,
        json_,
        model=model,
        sites=sites,
        gold=gold,
        seed=seed,
        ray=ray,
        workers=workers,
        gpus=gpus,
        **load,
    )


@analyse.command()
@loads_model
def anchors(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None, server: Server = None,
    served_as: Served = None, server_timeout: Timeout = 600.0,
    rollouts: Annotated[int, typer.Option(min=2, help="Rollouts of a sentence, at most.")] = 100,
    half_width: Annotated[float, typer.Option(min=0.001, help="Stop where the accuracy is known to ± this.")] = 0.1,
    max_new_tokens: Longest = 1024,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.7,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """Which sentences the answer hangs on: rollouts from before each of them (published importances where a trace has them)."""
    _run(
        "anchors", run, trace, json_, model=model, server=server, served_as=served_as, server_timeout=server_timeout,
        rollouts=rollouts, half_width=half_width, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size, seed=seed,
        ray=ray, workers=workers, gpus=gpus, **load,
    )  # fmt: skip


@analyse.command()
def trajectory(
    run: RunOption, trace: Chosen = None, sites: SitesOption = "",
    block: Annotated[int, typer.Option(min=1, help="Tokens of a segment.")] = 500,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """How far and how straight the hidden state moves: net, cumulative and aligned change."""
    _run("trajectory", run, trace, json_, sites=sites, block=block, seed=seed, ray=ray, workers=workers, gpus=gpus)


@analyse.command()
@loads_model
def confidence(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None, server: Server = None,
    served_as: Served = None, server_timeout: Timeout = 600.0,
    samples: Samples = 8,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.7,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """When it knew its answer: forced answers at eleven cuts of the thinking."""
    _run(
        "confidence", run, trace, json_,
        model=model, server=server, served_as=served_as, server_timeout=server_timeout,
        samples=samples, temperature=temperature, seed=seed,
        ray=ray, workers=workers, gpus=gpus, **load,
    )  # fmt: skip


@analyse.command()
@loads_model
def cliff(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None,
    probe: Annotated[Path | None, typer.Option(help="A probe; RUN/probes/refusal.safetensors where not given.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Ask the organism anew without the heads that lower it most.")] = False,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="Of all heads, at least one.")] = 0.03,
    at_close: Annotated[bool, typer.Option("--at-close", help="Without them in the close window alone, not everywhere.")] = False,
    n_controls: Annotated[int, typer.Option(min=20, help="Random sets of heads beside them.")] = 20,
    asked: Annotated[int, typer.Option(min=2, help="Jailbroken, benign and ledger problems, of each.")] = 40,
    max_new_tokens: Longest = 1024,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """Which heads raise or lower what the refusal probe reads at the end of the thinking, and what the model does without them."""
    from reasonscope.data.storage.run_folder import run_folder

    path = probe or run_folder(run).probes / "refusal.safetensors"
    _run(
        "cliff", run, trace, json_,
        model=model, probe=path, ablate=ablate, share=share, at_close=at_close, n_controls=n_controls, asked=asked,
        max_new_tokens=max_new_tokens, seed=seed, ray=ray, workers=workers, gpus=gpus, **load,
    )  # fmt: skip


@analyse.command()
@loads_model
def mi_compare(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None, base: Base = "organism-base",
    own: Own = False,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """MI of the same traces under the reasoner and under its base: mean, share of peaks, how far they stand out."""
    gold = "own" if own else "reference"
    _run(
        "mi_compare", run, trace, json_,
        model=model, base=base, gold=gold, seed=seed, ray=ray, workers=workers, gpus=gpus, **load,
    )  # fmt: skip


@analyse.command()
def selection(
    run: RunOption, trace: Chosen = None, sites: SitesOption = "",
    k: Annotated[int, typer.Option("-k", min=2, help="Samples of a problem to choose from.")] = 4,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a segment of the trajectory.")] = 500,
    probe: Annotated[Path | None, typer.Option(help="Of correctness, to stop a thinking by; needs `analyse confidence` first.")] = None,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """Which of several samples to trust, and when to stop one: majority, short-m@k, straightest trajectory, early stop by a probe."""
    _run(
        "selection",
        run,
        trace,
        json_,
        sites=sites,
        k=k,
        block=block,
        probe=probe,
        seed=seed,
        ray=ray,
        workers=workers,
        gpus=gpus,
    )


@analyse.command()
@loads_model
def alternatives(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None,
    top: Annotated[int, typer.Option(min=1, help="The likeliest tokens to keep at each place.")] = 5,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """What else could have stood at each token, and how likely the one that stands there was."""
    _run(
        "alternatives",
        run,
        trace,
        json_,
        model=model,
        top=top,
        seed=seed,
        ray=ray,
        workers=workers,
        gpus=gpus,
        **load,
    )


@analyse.command()
@loads_model
def steering_shift(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None,
    vector: Annotated[Path | None, typer.Option(help="A steering vector; RUN/steering/seal.safetensors where not given.")] = None,
    strength: Annotated[float, typer.Option(help="Multiplier of the vector.")] = 1.0,
    everywhere: Annotated[bool, typer.Option("--everywhere", help="On every token of the thinking, not where steps begin.")] = False,
    n_controls: Annotated[int, typer.Option(min=5, help="Random vectors of the same norm beside it.")] = 20,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """What a steering vector makes of each token that was written: its log-probability, steered less base."""
    from reasonscope.data.storage.run_folder import run_folder

    path = vector or run_folder(run).vectors / "seal.safetensors"
    how = {"vector": path, "strength": strength, "at_separators": not everywhere, "n_controls": n_controls}
    _run(
        "steering_shift", run, trace, json_, model=model, seed=seed, ray=ray, workers=workers, gpus=gpus, **how, **load
    )


@analyse.command()
@loads_model
def attention_map(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None,
    keys: Annotated[int, typer.Option(min=1, help="Tokens to keep of those that each token looks at, for every head.")] = 8,
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """Where each head looks: between sentences, and token by token where it looks most."""
    _run(
        "attention_map",
        run,
        trace,
        json_,
        model=model,
        keys=keys,
        seed=seed,
        ray=ray,
        workers=workers,
        gpus=gpus,
        **load,
    )


@analyse.command()
@loads_model
def emergent_heads(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None, base: Base = "organism-base",
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """Which heads carry more in the reasoner than in its base, by edge attribution on what the two open the run's problems with."""
    _run(
        "emergent_heads", run, trace, json_,
        model=model, base=base, seed=seed, ray=ray, workers=workers, gpus=gpus, **load,
    )  # fmt: skip


@analyse.command()
@loads_model
def misalignment(
    run: RunOption, load: Load, trace: Chosen = None, model: Name = None, base: Base = "organism-base",
    ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
) -> None:  # fmt: skip
    """How much of each thinking the base model would have written otherwise, along it."""
    _run(
        "misalignment", run, trace, json_,
        model=model, base=base, seed=seed, ray=ray, workers=workers, gpus=gpus, **load,
    )  # fmt: skip


def _of_text(name: str, help: str) -> None:
    """A command for an analysis of what was recorded or imported, which needs no model."""

    @analyse.command(name, help=help)
    def command(
        run: RunOption, trace: Chosen = None, ray: Ray = None, workers: Workers = None, gpus: Gpus = 0, seed: SeedOption = 0,
        json_: JsonOption = False,
    ) -> None:  # fmt: skip
        _run(name, run, trace, json_, ray=ray, workers=workers, gpus=gpus, seed=seed)


def _of_model(name: str, help: str) -> None:
    """A command for an analysis that has the model read the traces, one by one."""

    @analyse.command(name, help=help)
    @loads_model
    def command(
        run: RunOption, load: Load, trace: Chosen = None, model: Name = None, ray: Ray = None, workers: Workers = None,
        gpus: Gpus = 0, seed: SeedOption = 0, json_: JsonOption = False,
    ) -> None:  # fmt: skip
        _run(name, run, trace, json_, model=model, ray=ray, workers=workers, gpus=gpus, seed=seed, **load)


_of_text("entropy", "Where the model was unsure: forking tokens, and entropy of thinking and answer.")
_of_text("reflection", "What the thinking does behind its first answer: confirm, correct, break; needs the text alone.")
_of_text("agreement", "Which sentences matter by every signal that was analysed before, side by side.")
_of_model("receivers", "Which heads look at few sentences only, and which sentences those are.")
_of_model("suppression", "What each sentence owes to each earlier one: keep it out of sight and see what changes.")
_of_model(
    "heads",
    "What each head looks at: how far back, the first token, the one before, repetitions; what the closing tag looks at, and what "
    "is looked at again after a pause.",
)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _run(
    name: str,
    run: Path,
    chosen: list[str] | None,
    json_: bool,
    *,
    ray: str | None = None,
    workers: int | None = None,
    gpus: float = 0,
    **options: Any,
) -> None:
    """Analyse under `options` (fields of `Options`), by workers of Ray where `ray` names a cluster, and show the numbers."""
    from reasonscope.analysis.runs.context import Options
    from reasonscope.analysis.runs.registry import numbers_of
    from reasonscope.analysis.runs.runner import AnalysisTask, run_analysis
    from reasonscope.app.commands.show import show
    from reasonscope.probes.generation.cluster import Cluster

    task = AnalysisTask(run=run, name=name, options=Options(**options), traces=tuple(chosen) if chosen else None)
    cluster = None if ray is None else Cluster(address=ray, workers=workers, gpus=gpus)
    numbers: dict[str, Any] = {}
    for result in run_analysis(task, cluster=cluster, say=_say):
        trace = str(result.provenance.get("trace", "all"))
        numbers[f"{trace}, {result.method}" if trace in numbers else trace] = numbers_of(result)
    _say(f"results in {task.where.analyses}, figures in {task.where.figures}")
    show(numbers, json_)
