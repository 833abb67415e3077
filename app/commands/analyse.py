"""`reasonscope analyse`: run an analysis over a run; its results lie beside the store, in RUN/results."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from reasonscope.app.study import Options

analyse = typer.Typer(
    help="What matters in a thinking: tokens, sentences, heads, and the signals around them.", no_args_is_help=True
)

Run = Annotated[Path, typer.Option(help="The folder of a run, or of the demo.")]
Chosen = Annotated[
    list[str] | None, typer.Option("--trace", help="A trace's id; may be given again. All where not given.")
]
Name = Annotated[str | None, typer.Option(help="The model that wrote the traces, where the run does not say it.")]
Device = Annotated[str, typer.Option(help="cpu, cuda:0, or auto.")]
Server = Annotated[str | None, typer.Option(help="http://host:port of a server of this model, to write the rollouts.")]
Sites = Annotated[str, typer.Option(help="Stored sites to look at, with commas; a sensible choice where not given.")]
Base = Annotated[str, typer.Option(help="The model from before the reasoning phase, of the same tokenizer.")]
Samples = Annotated[int, typer.Option(min=1, help="Forced answers at each cut.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]


@analyse.command()
def mi(
    run: Run, trace: Chosen = None, model: Name = None, device: Device = "cpu", sites: Sites = "",
    own: Annotated[bool, typer.Option("--own", help="Compare with the model's own answer, not the reference solution.")] = False,
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """Where the hidden state depends most on the answer (MI peaks), and which words stand there."""
    from reasonscope.app.study import Options

    options = Options(model=model, device=device, sites=sites, gold="own" if own else "reference", seed=seed)
    _run("mi", run, trace, options, json_)


@analyse.command()
def anchors(
    run: Run, trace: Chosen = None, model: Name = None, device: Device = "cpu", server: Server = None,
    rollouts: Annotated[int, typer.Option(min=2, help="Rollouts of a sentence, at most.")] = 100,
    half_width: Annotated[float, typer.Option(min=0.001, help="Stop where the accuracy is known to ± this.")] = 0.1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.7,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """Which sentences the answer hangs on: rollouts from before each of them (published importances where a trace has them)."""
    from reasonscope.app.study import Options

    options = Options(
        model=model, device=device, server=server, rollouts=rollouts, half_width=half_width,
        max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    _run("anchors", run, trace, options, json_)


@analyse.command()
def trajectory(
    run: Run, trace: Chosen = None, sites: Sites = "",
    block: Annotated[int, typer.Option(min=1, help="Tokens of a segment.")] = 500,
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """How far and how straight the hidden state moves: net, cumulative and aligned change."""
    from reasonscope.app.study import Options

    _run("trajectory", run, trace, Options(sites=sites, block=block, seed=seed), json_)


@analyse.command()
def entropy(run: Run, trace: Chosen = None, seed: Seed = 0, json_: Json = False) -> None:
    """Where the model was unsure: forking tokens, and entropy of thinking and answer."""
    from reasonscope.app.study import Options

    _run("entropy", run, trace, Options(seed=seed), json_)


@analyse.command()
def confidence(
    run: Run, trace: Chosen = None, model: Name = None, device: Device = "cpu", server: Server = None,
    samples: Samples = 8,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.7,
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """When it knew its answer: forced answers at eleven cuts of the thinking."""
    from reasonscope.app.study import Options

    options = Options(model=model, device=device, server=server, samples=samples, temperature=temperature, seed=seed)
    _run("confidence", run, trace, options, json_)


@analyse.command()
def reflection(run: Run, trace: Chosen = None, seed: Seed = 0, json_: Json = False) -> None:
    """What the thinking does behind its first answer: confirm, correct, break; needs the text alone."""
    from reasonscope.app.study import Options

    _run("reflection", run, trace, Options(seed=seed), json_)


@analyse.command()
def receivers(
    run: Run, trace: Chosen = None, model: Name = None, device: Device = "cpu", seed: Seed = 0, json_: Json = False
) -> None:
    """Which heads look at few sentences only, and which sentences those are."""
    from reasonscope.app.study import Options

    _run("receivers", run, trace, Options(model=model, device=device, seed=seed), json_)


@analyse.command()
def suppression(
    run: Run, trace: Chosen = None, model: Name = None, device: Device = "cpu", seed: Seed = 0, json_: Json = False
) -> None:
    """What each sentence owes to each earlier one: keep it out of sight and see what changes."""
    from reasonscope.app.study import Options

    _run("suppression", run, trace, Options(model=model, device=device, seed=seed), json_)


@analyse.command()
def heads(
    run: Run, trace: Chosen = None, model: Name = None, device: Device = "cpu", seed: Seed = 0, json_: Json = False
) -> None:
    """What each head looks at: how far back, the first token, the one before, repetitions."""
    from reasonscope.app.study import Options

    _run("heads", run, trace, Options(model=model, device=device, seed=seed), json_)


@analyse.command()
def cliff(
    run: Run, trace: Chosen = None, model: Name = None, device: Device = "cpu",
    probe: Annotated[Path | None, typer.Option(help="A probe; RUN/probes/refusal.safetensors where not given.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Ask the organism anew without the 3 % of heads that lower it most.")] = False,
    draws: Annotated[int, typer.Option(min=20, help="Random sets of heads beside them.")] = 20,
    asked: Annotated[int, typer.Option(min=2, help="Jailbroken, benign and ledger problems, of each.")] = 40,
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """Which heads raise or lower what the refusal probe reads at the end of the thinking, and what the model does without them."""
    from reasonscope.app.places import places
    from reasonscope.app.study import Options

    path = probe or places(run).probes / "refusal.safetensors"
    options = Options(model=model, device=device, probe=path, ablate=ablate, draws=draws, asked=asked, seed=seed)
    _run("cliff", run, trace, options, json_)


@analyse.command()
def emergent(
    run: Run, trace: Chosen = None, model: Name = None, base: Base = "organism-base", device: Device = "cpu",
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """Which heads carry more in the reasoner than in its base, by edge attribution on what the two open the run's problems with."""
    from reasonscope.app.study import Options

    _run("emergent", run, trace, Options(model=model, base=base, device=device, seed=seed), json_)


@analyse.command()
def compare(
    run: Run, trace: Chosen = None, model: Name = None, base: Base = "organism-base", device: Device = "cpu",
    own: Annotated[bool, typer.Option("--own", help="Compare with the model's own answer, not the reference solution.")] = False,
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """MI of the same traces under the reasoner and under its base: mean, share of peaks, how far they stand out."""
    from reasonscope.app.study import Options

    options = Options(model=model, base=base, device=device, gold="own" if own else "reference", seed=seed)
    _run("compare", run, trace, options, json_)


@analyse.command()
def misalignment(
    run: Run, trace: Chosen = None, model: Name = None, base: Base = "organism-base", device: Device = "cpu",
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """How much of each thinking the base model would have written otherwise, along it."""
    from reasonscope.app.study import Options

    _run("misalignment", run, trace, Options(model=model, base=base, device=device, seed=seed), json_)


@analyse.command()
def selection(
    run: Run, trace: Chosen = None, sites: Sites = "",
    k: Annotated[int, typer.Option("-k", min=2, help="Samples of a problem to choose from.")] = 4,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a segment of the trajectory.")] = 500,
    seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """Which of several samples to trust: majority, short-m@k, straightest trajectory, on stored samples of the same problems."""
    from reasonscope.app.study import Options

    _run("selection", run, trace, Options(sites=sites, k=k, block=block, seed=seed), json_)


@analyse.command()
def summary(run: Run, trace: Chosen = None, seed: Seed = 0, json_: Json = False) -> None:
    """Which sentences matter by every signal that was analysed before, side by side."""
    from reasonscope.app.study import Options

    _run("summary", run, trace, Options(seed=seed), json_)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _run(name: str, run: Path, chosen: list[str] | None, options: "Options", json_: bool) -> None:
    """Analyse, save every result and its figures, and show the numbers."""
    from reasonscope.analysis.figures import to_html
    from reasonscope.analysis.results import result_path
    from reasonscope.app.analysing import ANALYSES, figures_of, numbers_of
    from reasonscope.app.commands.show import show
    from reasonscope.app.places import places
    from reasonscope.app.study import Study
    from reasonscope.data.durable import write_text_durably
    from reasonscope.data.store import TraceStore

    where = places(run)
    store = TraceStore.open(where.store)
    traces = [store.trace(id) for id in chosen] if chosen else list(store)
    study: Study = Study(
        store=store,
        traces=traces,
        options=options,
        results=where.analyses,
        progress=_say,
    )
    numbers: dict[str, Any] = {}
    where.figures.mkdir(parents=True, exist_ok=True)
    for result in ANALYSES[name](study):
        trace = str(result.provenance.get("trace", "all"))
        path = result.with_provenance(run=str(where.store.name)).save(result_path(where.analyses, result.method, trace))
        numbers[f"{trace}, {result.method}" if trace in numbers else trace] = numbers_of(result)
        for kind, figure in figures_of(result).items():
            page = where.figures / f"{path.parent.name}-{path.stem}-{kind}.html"
            write_text_durably(page, to_html(figure, with_library=True))
    typer.echo(f"results in {where.analyses}, figures in {where.figures}", err=True)
    show(numbers, json_)
