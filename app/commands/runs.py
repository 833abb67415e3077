"""Commands on runs: merge, check, import and export."""

from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reasonscope.app.commands.options import Load, PromptingOptions, grouped
from reasonscope.app.commands.record import what_is_recorded
from reasonscope.app.interruption import keeping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reasonscope.data.trace import Trace
    from reasonscope.probes.models.chat_rendering import TemplateRenderer


class _Format(StrEnum):
    """The formats that traces can be exported to."""

    jsonl = "jsonl"
    parquet = "parquet"
    thought_anchors = "thought-anchors"


def merge(
    parts: Annotated[list[Path], typer.Argument(help="The folders that record --shard wrote.")],
    out: Annotated[Path, typer.Option(help="The folder of the whole run; traces that it already has are left out.")],
) -> None:
    """Join the parts of a run that an array of jobs recorded. The parts stay; their files are linked rather than copied."""
    from reasonscope.data.storage.store import merge_stores
    from reasonscope.data.summary import plural

    with keeping(
        lambda: (
            f"the parts are unchanged, and those that were joined are in {out}; run the same command again to go on."
        )
    ):
        typer.echo(f"{plural(len(merge_stores(parts, out)), 'trace')} in {out}")


def check(run: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Verify every byte of a run against its checksums, and list what is wrong. Exit status 2 if anything is."""
    from reasonscope.app.terminal import print_summary, printable
    from reasonscope.data.exchange.summaries import check_summary
    from reasonscope.data.storage.soundness import check_store
    from reasonscope.data.storage.store import TraceStore

    problems = check_store(run)
    for problem in problems:
        typer.echo(f"reasonscope: {printable(problem)}", err=True)
    if problems:
        raise typer.Exit(2)
    print_summary(check_summary(str(run), TraceStore.open(run)))


@grouped
def import_(
    asking: PromptingOptions,
    load: Load,
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND] PATH",
            help="The file or folder to read; its kind is recognised, unless you say thought-anchors, jsonl or inspect first.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the new run.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that wrote the text: prompts are rendered by its chat template and stored as its tokens."
        ),
    ] = None,
    turn: Annotated[
        str,
        typer.Option(
            help="Which turn of the assistant becomes the trace if there are several: last, its number from 1, or all."
        ),
    ] = "last",
    sites: Annotated[
        str,
        typer.Option(
            help="Activations to record as --model reads the traces, such as resid_post.*; without them no weights are loaded."
        ),
    ] = "",
) -> None:
    """Turn traces that you already have into a run. It reads dumps of vLLM, SGLang, OpenAI, OpenRouter, Anthropic, Ollama and
    LM Studio, rollouts of TRL and verl, logs of Inspect and lm-eval, Thought Anchors, and lines of messages or completions."""
    from reasonscope.app.terminal import print_summary
    from reasonscope.data.errors import InputError
    from reasonscope.data.exchange.importers import import_traces
    from reasonscope.data.exchange.summaries import import_summary
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.models.prompting import PromptOptions

    kind, path = _kind_and_path(source)
    if sites and model is None:
        raise InputError("--sites needs --model, the model that wrote the text")
    finds, prompt = asking.finds(), PromptOptions(template_args=asking.template_args())
    how = {"thinking": finds, "prompt": prompt}
    loaded = None if model is None else _reader_of(model, how, load if sites else None)
    found = import_traces(path, kind=kind, turn=_turn(turn), renderer=loaded, thinking=finds)
    meta = {
        "imported": {"from": path.name, "as": list(found.kinds), "report": found.report()},
        "thinking": found.thinking.to_dict(),
        "prompt": prompt.to_dict(),
    }
    _store(found.traces, out, meta, loaded, sites)
    print_summary(import_summary(str(out), found, TraceStore.open(out).sites))


def _reader_of(model: str, how: dict[str, Any], loading: "Load | None") -> "TemplateRenderer":
    """What renders and encodes for `model`, which has weights if it is said how to load them."""
    from reasonscope.probes.models.chat_rendering import TemplateRenderer
    from reasonscope.probes.models.model import load_model
    from reasonscope.probes.models.prompting import load_prompting

    return TemplateRenderer(
        model=load_prompting(model, **how) if loading is None else load_model(model, **how, **loading)
    )


def _store(
    traces: "Sequence[Trace]", out: Path, meta: dict[str, Any], loaded: "TemplateRenderer | None", sites: str
) -> None:
    """Store imported traces, with activations if sites are given."""
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.generation.recording import record_written
    from reasonscope.probes.models.model import Model

    if loaded is not None and isinstance(loaded.model, Model):
        with keeping(partial(what_is_recorded, out, len(traces))):
            record_written(loaded.model, traces, out, sites=sites, meta=meta)
        return
    known = {"model": dict(loaded.fingerprint)} if loaded is not None else {}
    with TraceStore.create(out, meta={**meta, **known}, sites=[]) as store:
        store.append(list(traces), {})


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    out: Annotated[Path, typer.Option(help="The file to write; for thought-anchors, the folder.")],
    to: Annotated[_Format, typer.Option(help="The format to write.")] = _Format.jsonl,
) -> None:
    """Write the traces of a run for other tools, without activations; to thought-anchors with the importances of `analyse anchors`."""
    from reasonscope.analysis.runs.registry import exportable
    from reasonscope.app.terminal import print_summary
    from reasonscope.data.exchange.export import export_jsonl, export_parquet, export_thought_anchors
    from reasonscope.data.exchange.summaries import export_summary
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore

    writers: dict[_Format, Callable[[Iterable[Trace], Path], int]] = {
        _Format.jsonl: export_jsonl,
        _Format.parquet: export_parquet,
        _Format.thought_anchors: export_thought_anchors,
    }
    where = run_folder(run)
    store: Iterable[Trace] = TraceStore.open(where.store)
    if to is _Format.thought_anchors:
        store = exportable(store, where.analyses)
    print_summary(export_summary(str(out), to.value, writers[to](store, out)))


def _kind_and_path(words: list[str]) -> tuple[str, Path]:
    """The two words of `import`, of which the first may be left out."""
    from reasonscope.data.errors import InputError
    from reasonscope.data.exchange.importers import KINDS

    *kind, path = words
    if len(kind) > 1 or (kind and kind[0] not in KINDS):
        raise InputError(
            f"{' '.join(words)!r} is not one path; give a file or a folder, after {', '.join(KINDS)} or nothing (the kind is recognised)"
        )
    return (kind or ["auto"])[0], Path(path)


def _turn(text: str) -> "int | Literal['last', 'all']":
    from reasonscope.data.errors import InputError

    if text == "last" or text == "all":
        return "last" if text == "last" else "all"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"invalid turn {text!r}: write last, all, or a number from 1")
    return int(text)
