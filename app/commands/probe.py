"""`reasonscope probe`: fit probes on a run, judge them on held-out problems, save them, and score every token with one."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonscope.app.commands.options import JsonOption, Load, grouped
from reasonscope.app.commands.show import show_summary

if TYPE_CHECKING:
    from reasonscope.analysis.studies.steps.measured import Measured
    from reasonscope.data.storage.store import TraceStore

probe = typer.Typer(
    help="Fit probes on a run, judge them on held-out problems, and score tokens with them.", no_args_is_help=True
)

RunOption = Annotated[Path, typer.Option(help="The folder of a run, as `record` or the demo wrote it.")]
Folds = Annotated[int, typer.Option(min=2, help="Number of folds; a problem is never in two of them.")]
SeedOption = Annotated[int, typer.Option(help="Random seed.")]


@probe.command("length")
def _length(
    run: RunOption,
    aft: Annotated[
        bool,
        typer.Option(
            "--aft", help="Also fit an accelerated failure time model, which knows that cut-off traces are longer."
        ),
    ] = False,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """How long will the model think? Reads the last token of each prompt. Requests (see refusal) are left out."""
    from reasonscope.analysis.studies.steps.probing import measure_length

    _show(measure_length(_store(run), aft=aft, folds=folds, seed=seed), run, json_)


@probe.command("remaining")
def _remaining(
    run: RunOption,
    per_trace: Annotated[int, typer.Option(min=1, help="Positions per trace, spread evenly over its thinking.")] = 8,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """How much thinking is left? Reads positions all along the thinking; the position itself is a baseline."""
    from reasonscope.analysis.studies.steps.probing import measure_remaining

    _show(measure_remaining(_store(run), per_trace=per_trace, folds=folds, seed=seed), run, json_)


@probe.command("forecast")
@grouped
def _forecast(
    probe: Annotated[Path, typer.Argument(help="A probe that `probe length` saved: RUN/probes/length.safetensors.")],
    prompts: Annotated[list[str], typer.Argument(help="Questions, as a user asks them.")],
    load: Load,
    model: Annotated[
        str | None, typer.Option(help="The model that the probe was fitted on; by default the one that it names.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """How long will the model think about a new prompt? In tokens, with an interval, before it writes the first of them."""
    from reasonscope.analysis.runs.probe_reports import forecast_numbers, forecast_summary
    from reasonscope.probes.fitting.linear_probes import LinearProbe
    from reasonscope.probes.models.model import load_model
    from reasonscope.probes.models.prompting import as_recorded

    fitted = LinearProbe.load(probe)
    source = model or str(fitted.model.get("name"))
    how = as_recorded({**fitted.provenance, "model": fitted.model}, {**load}, source)
    numbers = forecast_numbers(load_model(source, **how), fitted, prompts)
    show_summary(forecast_summary(numbers, as_fitted="prompt" in fitted.provenance), numbers, json_)


@probe.command("refusal")
def _refusal(
    run: RunOption,
    plateau: Annotated[
        float, typer.Option(help="Share of the thinking, counted from its end, whose median score is the plateau.")
    ] = 0.5,
    directions: Annotated[int, typer.Option(min=100, help="Random directions that the cliff is compared with.")] = 100,
    labels: Annotated[
        Path | None,
        typer.Option(help="A CSV or JSONL file with id and label (refused, complied, unclear), in place of the rules."),
    ] = None,
    judge: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="URL MODEL",
            help="A chat model on an OpenAI-compatible server that labels the answers, in place of the rules.",
        ),
    ] = None,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Does the model mean to refuse? Reads requests: problems whose meta says whether they are harmful."""
    from reasonscope.analysis.studies.steps.probing import measure_refusal
    from reasonscope.data.storage.run_folder import run_folder

    found = measure_refusal(
        _store(run),
        keep=run_folder(run).results / "judge",
        plateau=plateau,
        directions=directions,
        labels=labels,
        judge=judge,
        folds=folds,
        seed=seed,
    )
    _show(found, run, json_)


@probe.command("correctness")
def _correctness(
    run: RunOption,
    held_out: Annotated[
        float,
        typer.Option(
            min=0, max=0.9, help="Share of the problems that the probe never sees, for `analyse selection --probe`."
        ),
    ] = 0.0,
    labels: Annotated[
        Path | None,
        typer.Option(help="A CSV or JSONL file with id and label (right or wrong), in place of the gold answers."),
    ] = None,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Will the answer be right? Reads problems with a gold answer, at six positions from the prompt to the end of the thinking."""
    from reasonscope.analysis.studies.steps.probing import measure_correctness

    _show(measure_correctness(_store(run), held_out=held_out, labels=labels, folds=folds, seed=seed), run, json_)


@probe.command("fit")
def _fit(
    run: RunOption,
    label: Annotated[
        str,
        typer.Option(
            help="meta.FIELD of the traces or problems, or a CSV or JSONL file with id (trace or problem) and label."
        ),
    ],
    position: Annotated[
        str | None,
        typer.Option(
            help="last_prompt, first_thinking, closing, last, mean, every:N, or a share of the thinking such as 0.5. By default closing, "
            "or mean for a probe of all tokens."
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="linear (one state), or a probe of all thinking tokens: attention or multi-max (slow).")
    ] = "linear",
    sites: Annotated[
        str | None,
        typer.Option(help="Sites to choose from, such as resid_post.8-20; by default all, or three of them if slow."),
    ] = None,
    task: Annotated[str, typer.Option(help="classification or regression.")] = "classification",
    positive: Annotated[
        str | None, typer.Option(help="The class to predict against all others; needed if there are more than two.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the probe's files; by default that of the label, without `meta.`.")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            min=0, max=0.9, help="Share of the problems that the probe never sees, for `probe apply --label`."
        ),
    ] = 0.0,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Can any label of yours be read from the states? Reads one place of each trace, or every N-th token of the thinking."""
    from reasonscope.analysis.studies.steps.probing import measure_label

    found = measure_label(
        _store(run),
        label,
        position=position,
        kind=kind,
        sites=sites,
        task=task,
        positive=positive,
        name=name,
        held_out=held_out,
        folds=folds,
        seed=seed,
    )
    _show(found, run, json_)


@probe.command("apply")
def _apply(
    probe: Annotated[
        Path, typer.Argument(help="A probe that one of these commands saved: RUN/probes/NAME.safetensors.")
    ],
    run: RunOption,
    label: Annotated[
        str | None,
        typer.Option(
            help="Also judge the probe by this label, on problems that it did not learn from: meta.FIELD, or a file."
        ),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="The class that the probe predicts; by default as it was fitted.")
    ] = None,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Score every token of every trace of a run with a saved probe, and write the scores to RUN/scores."""
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.summary import Summary, plural
    from reasonscope.probes.fitting.token_probes import load_probe
    from reasonscope.probes.properties.label_probe import judge_on
    from reasonscope.probes.properties.scores import score_unit, write_scores

    path = run_folder(run).scores / f"{probe.stem}.safetensors"
    fitted, store = load_probe(probe), _store(run)
    judged = judge_on(fitted, store, label, positive=positive, seed=seed) if label else None
    count, unit = write_scores(fitted, store, path, name=probe.stem), score_unit(fitted)
    summary = Summary(
        finding=f"The {probe.stem} probe has scored every token of {plural(count, 'trace')} at {fitted.site} ({unit}).",
        notes=[
            *(judged.notes() if judged else []),
            f"In the app, open a trace and colour it by “probe: {probe.stem}”.",
        ],
        files=[f"Scores: {path}"],
        next_command=_app(run),
    )
    numbers: dict[str, Any] = {"traces": count, "site": str(fitted.site), "unit": unit, "file": str(path)}
    show_summary(summary, {**numbers, **({"judged": judged.to_dict()} if judged else {})}, json_)


def _store(run: Path) -> "TraceStore":
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore

    return TraceStore.open(run_folder(run).store)


def _show(found: "Measured", run: Path, as_json: bool) -> None:
    """Save what was measured beside the store, and say it."""
    from reasonscope.data.storage.run_folder import run_folder

    saved = found.save(run_folder(run), next_command=_app(run))
    show_summary(saved.summaries, saved.numbers, as_json)


def _app(run: Path) -> str:
    return f"reasonscope app {quote(str(run))}"
