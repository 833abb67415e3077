"""`reasonscope probe`: fit probes on a run, judge them on held-out problems, save them, and score every token with one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonscope.app.commands.options import Load, grouped
from reasonscope.app.commands.show import show_summary

if TYPE_CHECKING:
    from reasonscope.analysis.figures import Figure
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.data.summary import Summary
    from reasonscope.data.trace import Trace
    from reasonscope.probes.properties.label_reports import AnyProbe

probe = typer.Typer(
    help="Fit probes on a run, judge them on held-out problems, and score tokens with them.", no_args_is_help=True
)

RunOption = Annotated[Path, typer.Option(help="The folder of a run, as `record` or the demo wrote it.")]
Folds = Annotated[int, typer.Option(min=2, help="Number of folds; a problem is never in two of them.")]
SeedOption = Annotated[int, typer.Option(help="Random seed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print every number as JSON instead of a summary.")]


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
    from reasonscope import probes
    from reasonscope.analysis.runs.probe_reports import aft_scores, choose_traces, length_figures
    from reasonscope.data.summary import in_hundredths

    store = _store(run)
    traces = choose_traces(store, "problems")
    found = probes.length(store, traces, folds=folds, seed=seed)
    numbers, summary = found.to_dict(), found.summary()
    if aft:
        scores = aft_scores(store, traces, found, folds=folds, seed=seed)
        numbers["aft"] = {name: score.to_dict() for name, score in scores.items()}
        rows = [
            (f"accelerated failure time, {name}", in_hundredths(score), str(found.comparison.n_problems))
            for name, score in scores.items()
        ]
        summary = replace(summary, rows=[*summary.rows, *rows])
    saved = _save(
        "length", run, numbers, length_figures(found), {"length": found.probe}, aft=aft, folds=folds, seed=seed
    )
    show_summary(_with_files(summary, saved, run), numbers, json_)


@probe.command("remaining")
def _remaining(
    run: RunOption,
    per_trace: Annotated[int, typer.Option(min=1, help="Positions per trace, spread evenly over its thinking.")] = 8,
    folds: Folds = 5,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """How much thinking is left? Reads positions all along the thinking; the position itself is a baseline."""
    from reasonscope import probes
    from reasonscope.analysis.runs.probe_reports import choose_traces, remaining_figures

    store = _store(run)
    found = probes.remaining(store, choose_traces(store, "problems"), per_trace=per_trace, folds=folds, seed=seed)
    numbers, fitted = found.to_dict(), {"remaining": found.probe}
    options = {"per_trace": per_trace, "folds": folds, "seed": seed}
    saved = _save("remaining", run, numbers, remaining_figures(found), fitted, **options)
    show_summary(_with_files(found.summary(), saved, run), numbers, json_)


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

    fitted = LinearProbe.load(probe)
    numbers = forecast_numbers(load_model(model or str(fitted.model.get("name")), **load), fitted, prompts)
    show_summary(forecast_summary(numbers), numbers, json_)


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
    from reasonscope import probes
    from reasonscope.analysis.runs.probe_reports import choose_traces, refusal_figures, refusal_verdicts
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.probes.properties.refusal_probe import refusal_maps

    store = _store(run)
    traces = choose_traces(store, "requests")
    verdicts = refusal_verdicts(traces, labels, judge, run_folder(run).results / "judge")
    found = probes.refusal(
        store, traces, verdicts=verdicts, plateau=plateau, n_controls=directions, folds=folds, seed=seed
    )
    maps = refusal_maps(store, traces, verdicts=verdicts, contrasts=found.contrasts, folds=folds, seed=seed)
    numbers, drawn = found.to_dict(), refusal_figures(found, traces, maps)
    options = {
        "plateau": plateau,
        "directions": directions,
        "labels": quote(str(labels)) if labels else False,
        "judge": " ".join(map(quote, judge)) if judge else False,
        "folds": folds,
        "seed": seed,
    }
    saved = _save("refusal", run, numbers, drawn, found.probes, **options)
    show_summary(_with_files(found.summary(), saved, run), numbers, json_)


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
    from reasonscope.analysis.runs.probe_reports import correctness_along, correctness_figures
    from reasonscope.probes.fitting.positions import position_name
    from reasonscope.probes.properties.correctness_probe import positions_summary

    store = _store(run)
    traces = _not_held_out(store, held_out, seed)
    found, undefined = correctness_along(store, traces, labels=labels, folds=folds, seed=seed)
    numbers: dict[str, Any] = {position_name(one.position): one.to_dict() for one in found}
    numbers["undefined"] = undefined
    fitted = {"correctness": found[-1].probe}
    saved = _save(
        "correctness",
        run,
        numbers,
        correctness_figures(found),
        fitted,
        held_out=held_out,
        labels=quote(str(labels)) if labels else False,
        folds=folds,
        seed=seed,
    )
    show_summary(_with_files(positions_summary(found, undefined), saved, run), numbers, json_)


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
            help="last_prompt, first_thinking, closing, last, mean, every:N, or a share of the thinking such as 0.5."
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
    from reasonscope import probes
    from reasonscope.analysis.runs.probe_reports import label_figures
    from reasonscope.probes.architecture.sites import Site, expand_sites
    from reasonscope.probes.properties.label_probe import probe_kind
    from reasonscope.probes.properties.labels import file_name, label_task

    store = _store(run)
    n_layers = 1 + max((Site.parse(site).layer for site in store.sites), default=0)
    found = probes.fit(
        store,
        label,
        _not_held_out(store, held_out, seed),
        position=position,
        task=label_task(task),
        positive=positive,
        kind=probe_kind(kind),
        sites=expand_sites(sites, n_layers) if sites else None,
        folds=folds,
        seed=seed,
    )
    numbers, called = found.to_dict(), name or file_name(label)
    options = {
        "label": quote(label),
        "position": found.place.name,
        "kind": kind,
        "task": task,
        "sites": quote(sites) if sites else False,
        "positive": quote(positive) if positive else False,
        "name": quote(name) if name else False,
        "held_out": held_out or False,
    }
    drawn, probed = label_figures(found, called), {called: found.probe}
    saved = _save(called, run, numbers, drawn, probed, "fit", **options, folds=folds, seed=seed)
    show_summary(_with_files(found.summary(), saved, run), numbers, json_)


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
    from reasonscope.data.summary import Summary
    from reasonscope.probes.fitting.token_probes import load_probe
    from reasonscope.probes.properties.label_probe import judge_on
    from reasonscope.probes.properties.scores import score_unit, write_scores

    path = run_folder(run).scores / f"{probe.stem}.safetensors"
    fitted, store = load_probe(probe), _store(run)
    judged = judge_on(fitted, store, label, positive=positive, seed=seed) if label else None
    count, unit = write_scores(fitted, store, path, name=probe.stem), score_unit(fitted)
    summary = Summary(
        finding=f"The {probe.stem} probe has scored every token of {count} traces at {fitted.site} ({unit}).",
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


def _not_held_out(store: "TraceStore", share: float, seed: int) -> "list[Trace] | None":
    """The traces of all problems but a `share`; None, for all, if nothing is held out."""
    from reasonscope.steering.experiments.held_out import split_run

    if not share:
        return None
    return [store.trace(id) for id in split_run(store, share=share, n=None, seed=seed).ids]


def _save(
    name: str,
    run: Path,
    numbers: Mapping[str, Any],
    drawn: "Mapping[str, Figure]",
    probes: "Mapping[str, AnyProbe]",
    command: str | None = None,
    /,
    **options: float | str,
) -> list[str]:
    """Save probes, numbers and figures beside the store, with the command that measures the same again; return a line for each."""
    from reasonscope.analysis.runs.saved_numbers import save_numbers
    from reasonscope.data.storage.run_folder import run_folder

    where = run_folder(run)
    named = {f"--{key.replace('_', '-')}": value for key, value in options.items()}
    given = [key if value is True else f"{key} {value}" for key, value in named.items() if value is not False]
    line = " ".join([f"reasonscope probe {command or name} --run {run}", *given])
    save_numbers(where, name, numbers, command=line, seed=int(options["seed"]), figures=drawn, probes=probes)
    return [
        f"Probes: {_listed(where.probes, [f'{saved}.safetensors' for saved in probes])}",
        f"Figures: {_listed(where.figures, [f'{figure}.html' for figure in drawn])}",
        f"Numbers: {where.numbers / f'{name}.json'}",
    ]


def _listed(folder: Path, names: list[str]) -> str:
    """The path of one file, or a folder with the names of its files, of which the first four are shown."""
    if len(names) == 1:
        return str(folder / names[0])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{folder} ({', '.join(names[:4])}{more})"


def _with_files(summary: "Summary", files: list[str], run: Path) -> "Summary":
    return replace(summary, files=files, next_command=_app(run))


def _app(run: Path) -> str:
    return f"reasonscope app {quote(str(run))}"
