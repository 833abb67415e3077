"""Commands on runs: record, merge, check, import and export."""

import json
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from reasonscope.app.commands.loading import Load, loads_model
from reasonscope.app.interruption import keeping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reasonscope.data.storage.store import TraceStore
    from reasonscope.data.text.thinking import Thinking
    from reasonscope.data.trace import Trace
    from reasonscope.probes.models.chat_rendering import TemplateRenderer
    from reasonscope.probes.models.prompting import Prompting
    from reasonscope.steering.decoding.monitor import ProbeMonitor


class SamplingArgument(StrEnum):
    """Whose settings sampling begins with."""

    model = "model"


class SeedsArgument(StrEnum):
    """Whether a server gets the seeds of the traces."""

    auto = "auto"
    send = "send"
    none = "none"


class StopAtArgument(StrEnum):
    """Where a monitor may close the thinking."""

    token = "token"
    paragraph = "paragraph"


class ThinkingArgument(StrEnum):
    """How thinking is found."""

    tags = "tags"
    completion = "completion"
    none = "none"


# How thinking is found and prompts are rendered, by `record` and by `import`.
ThinkingOption: TypeAlias = Annotated[
    ThinkingArgument | None,
    typer.Option(
        help="How thinking is found: between tags, in the open (everything before the sentence with the final answer), or not at all. "
        "By default by tags if the model has any, otherwise in the open."
    ),
]
TagsOption: TypeAlias = Annotated[
    tuple[str, str] | None,
    typer.Option(metavar="OPEN CLOSE", help="The tags around the thinking, if the model does not name them itself."),
]
PatternOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="For thinking in the open: a regular expression in the sentence with the final answer, which is its first group."
    ),
]
TemplateOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        help="A variable for the chat template, as name=value with a value in JSON or a text; may be repeated."
    ),
]
EffortOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Reasoning effort, such as low: the template's variable reasoning_effort.")
]


class Format(StrEnum):
    """The formats that traces can be exported to."""

    jsonl = "jsonl"
    parquet = "parquet"
    thought_anchors = "thought-anchors"


@loads_model
def record_command(
    load: Load,
    model: Annotated[
        str, typer.Option(help="The model: a Hugging Face id, a folder, organism or organism-base.")
    ] = "organism",
    problems: Annotated[
        str, typer.Option(help="The problems: ledger, requests, a JSONL file, or hf:NAME for a data set of the hub.")
    ] = "ledger",
    out: Annotated[
        Path, typer.Option(help="The folder of the run. If it holds part of this run, recording resumes there.")
    ] = Path("runs/run"),
    n: Annotated[int | None, typer.Option(min=1, help="How many problems; all of them if not given.")] = None,
    split: Annotated[str, typer.Option(help="The split of the data set: train, validation or test.")] = "test",
    sites: Annotated[
        str,
        typer.Option(
            help="Activations to record, such as resid_post.* or z.2-4,attn_out.0; an empty text records none."
        ),
    ] = ("resid_post.*"),
    samples: Annotated[int, typer.Option(min=1, help="How many completions of each problem.")] = 1,
    sampling: Annotated[
        SamplingArgument | None,
        typer.Option(help="model: how the model's own generation configuration samples; other options overrule it."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sampling temperature; 0 is greedy. 0.7 if not given.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from the likeliest tokens that together have this probability."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from this many of the likeliest tokens; 0 for all.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from tokens with this share of the probability of the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Makes tokens that were read or written less likely; 1 for none.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Is taken off the logits of tokens that were written.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the completion; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Problems per batch. An interrupted recording keeps every finished batch.")
    ] = 16,
    shard: Annotated[
        str, typer.Option(help="Record part i of n of the problems, written i/n: for array jobs.")
    ] = "1/1",
    backend: Annotated[
        str, typer.Option(help="What reads and edits activations: hooks, transformer_lens or nnsight.")
    ] = "hooks",
    remote: Annotated[
        str | None,
        typer.Option(
            help="With --backend nnsight, where the model runs: ndif, the address of an NDIF server, or local to try it here."
        ),
    ] = None,
    thinking: ThinkingOption = None,
    think_tags: TagsOption = None,
    answer_pattern: PatternOption = None,
    system: Annotated[
        Path | None, typer.Option(help="A text file with a system message, put before every problem.")
    ] = None,
    template_arg: TemplateOption = None,
    effort: EffortOption = None,
    open_tag: Annotated[
        bool,
        typer.Option("--open-tag", help="End every prompt with the opening tag, for models that forget it."),
    ] = False,
    no_think: Annotated[
        bool,
        typer.Option(
            "--no-think",
            help="Switch thinking off as the chat template does, and close the thinking block at once if it does not.",
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            help="A server, http://host:port, that writes the completions; the model here then only reads --sites."
        ),
    ] = None,
    served_as: Annotated[
        str | None, typer.Option(help="The name of the model on the server; the same as here if not given.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many requests the server gets at a time.")] = 16,
    server_timeout: Annotated[
        float, typer.Option(min=0.1, help="Longest time of one request to the server, in seconds.")
    ] = 600.0,
    server_seeds: Annotated[
        SeedsArgument,
        typer.Option(
            help="Whether requests carry seeds. auto leaves them out for vLLM on CPUs, which dies of them unless it was started with "
            "--no-enable-chunked-prefill (then send them); such traces are marked unseeded."
        ),
    ] = SeedsArgument.auto,
    ray: Annotated[
        str | None, typer.Option(help="Record with Ray Data: local, auto (the cluster of this machine) or an address.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many Ray workers; as many as fit if not given.")
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="Accelerators per worker; give --device too.")] = 0,
    steer: Annotated[
        Path | None, typer.Option(help="A recipe that steers the model; the traces go into a run of their own.")
    ] = None,
    monitor: Annotated[
        Path | None,
        typer.Option(help="A saved probe to read on every token while the model writes; its scores go to RUN/scores."),
    ] = None,
    stop_above: Annotated[
        float | None, typer.Option(help="Close the thinking once the score of --monitor is above this.")
    ] = None,
    window: Annotated[
        int, typer.Option(min=1, help="Tokens of thinking over which the score is averaged before it may stop.")
    ] = 1,
    stop_at: Annotated[
        StopAtArgument,
        typer.Option(help="Where the thinking may be closed: after any token, or only at the end of a paragraph."),
    ] = StopAtArgument.token,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Choose --stop-above on this run, of problems that the probe did not learn from (see --false-alarms)."
        ),
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(min=0, max=1, help="With --calibrate: the share of such problems that may be stopped.")
    ] = 0.05,
) -> None:
    """Let a model answer problems, and store its traces with their activations. The same command again resumes."""
    from reasonscope.data.errors import InputError
    from reasonscope.data.exchange.problem_sets import load_problems
    from reasonscope.data.trace import Sampling
    from reasonscope.probes.architecture.sites import expand_sites
    from reasonscope.probes.generation.cluster import Cluster, Job, record_on
    from reasonscope.probes.generation.recording import record as record_traces
    from reasonscope.probes.generation.server import server_writer
    from reasonscope.probes.models.loading import generation_defaults
    from reasonscope.probes.models.model import load_model
    from reasonscope.probes.models.prompting import Prompting, PromptOptions, load_prompting

    if monitor is None and (stop_above is not None or calibrate is not None):
        raise InputError("--stop-above and --calibrate need --monitor, the probe whose score may stop")
    watches: ProbeMonitor | None = None
    asked = load_problems(problems, split=split, n=n, seed=seed)
    own: dict[str, Any] = generation_defaults(model) if sampling else {"temperature": 0.7}
    named: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "stop": stop or None,
    }
    given = {name: value for name, value in named.items() if value is not None}
    how: dict[str, Any] = {
        "sampling": Sampling(**{**own, **given}, max_new_tokens=max_new_tokens, seed=seed),
        "samples": samples,
        "batch_size": batch_size,
        "think": not no_think,
        "open_tag": open_tag,
    }
    found: dict[str, Any] = {
        "thinking": _thinking(thinking, think_tags, answer_pattern),
        "prompt": PromptOptions(system=_system(system), template_args=_template_args(template_arg or [], effort)),
    }
    if steer is not None:
        from reasonscope.steering.recipes.recipe import Recipe

        how["steer"] = Recipe.load(steer)
    loading: dict[str, Any] = {
        "source": model,
        "backend": backend,
        "remote": remote == "ndif" or remote or False,
        **found,
        **load,
    }
    with keeping(partial(_recorded, out, len(asked) * samples if shard == "1/1" else None)):
        if ray is not None:
            if monitor is not None:
                raise InputError("--monitor watches a model of this process; leave out --ray")
            if server is not None or shard != "1/1":
                raise InputError("--ray shares the work out by itself; leave out --server and --shard")
            job = Job(load=loading, sites=sites, **how)
            store = record_on(Cluster(address=ray, workers=workers, gpus=gpus), job, asked, out)
        else:
            loaded: Prompting = load_model(**loading) if sites or server is None else load_prompting(model, **found)
            if monitor is not None:
                watches = _monitor(loaded, monitor, calibrate, stop_above, window, stop_at, false_alarms)
                how["monitor"] = watches
            store = record_traces(
                loaded,
                asked,
                out,
                sites=expand_sites(sites, loaded.n_layers) if sites else (),
                shard=_shard(shard),
                server=server_writer(
                    server,
                    loaded,
                    served_as=served_as,
                    workers=requests,
                    timeout=server_timeout,
                    seeds=server_seeds.value,
                )
                if server
                else None,
                **how,
            )
    by = f", steered by {steered['name']} ({steered['hash']})" if (steered := store.meta.get("steered")) else ""
    typer.echo(f"{len(store)} traces in {out}{by}; to verify every byte: reasonscope check {out}")
    if watches is not None and monitor is not None:
        typer.echo(_watched(watches, store, out, monitor.stem))


def _monitor(
    loaded: "Prompting",
    path: Path,
    calibrate: Path | None,
    stop_above: float | None,
    window: int,
    at: StopAtArgument,
    false_alarms: float,
) -> "ProbeMonitor":
    from reasonscope.data.errors import InputError
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.probes.models.model import Model
    from reasonscope.steering.decoding.monitor import open_monitor

    if not isinstance(loaded, Model):
        raise InputError("--monitor watches the model that writes, which a server does not show; leave out --server")
    return open_monitor(
        loaded,
        path,
        stop_above=stop_above,
        window=window,
        at="paragraph" if at is StopAtArgument.paragraph else "token",
        calibrate=TraceStore.open(run_folder(calibrate).store) if calibrate else None,
        false_alarms=false_alarms,
    )


def _watched(monitor: "ProbeMonitor", store: "TraceStore", out: Path, name: str) -> str:
    """Save what the monitor read, and say it in a line."""
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.steering.decoding.monitor import save_live_scores

    path = run_folder(out).scores / f"{name}.safetensors"
    missing = save_live_scores(monitor, store, path, name=name)
    return f"{monitor.told()}; its scores: {path}" + (f" ({missing} traces have none)" if missing else "")


def merge(
    parts: Annotated[list[Path], typer.Argument(help="The folders that record --shard wrote.")],
    out: Annotated[Path, typer.Option(help="The folder of the whole run; traces that it already has are left out.")],
) -> None:
    """Join the parts of a run that an array of jobs recorded. The parts stay; their files are linked rather than copied."""
    from reasonscope.data.storage.merge import merge_stores

    with keeping(
        lambda: (
            f"the parts are unchanged, and those that were joined are in {out}; run the same command again to go on."
        )
    ):
        typer.echo(f"{len(merge_stores(parts, out))} traces in {out}")


def check(run: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Verify every byte of a run against its checksums, and list what is wrong. Exit status 2 if anything is."""
    from reasonscope.app.terminal import print_summary, printable
    from reasonscope.data.exchange.summaries import check_summary
    from reasonscope.data.storage.store import TraceStore, check_store

    problems = check_store(run)
    for problem in problems:
        typer.echo(f"reasonscope: {printable(problem)}", err=True)
    if problems:
        raise typer.Exit(2)
    print_summary(check_summary(str(run), TraceStore.open(run)))


@loads_model
def import_(
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
    thinking: ThinkingOption = None,
    think_tags: TagsOption = None,
    answer_pattern: PatternOption = None,
    template_arg: TemplateOption = None,
    effort: EffortOption = None,
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
    finds = _thinking(thinking, think_tags, answer_pattern)
    prompt = PromptOptions(template_args=_template_args(template_arg or [], effort))
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
        with keeping(partial(_recorded, out, len(traces))):
            record_written(loaded.model, traces, out, sites=sites, meta=meta)
        return
    known = {"model": dict(loaded.fingerprint)} if loaded is not None else {}
    with TraceStore.create(out, meta={**meta, **known}, sites=[]) as store:
        store.append(list(traces), {})


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    out: Annotated[Path, typer.Option(help="The file to write; for thought-anchors, the folder.")],
    to: Annotated[Format, typer.Option(help="The format to write.")] = Format.jsonl,
) -> None:
    """Write the traces of a run for other tools, without activations; to thought-anchors with the importances of `analyse anchors`."""
    from reasonscope.analysis.runs.registry import exportable
    from reasonscope.app.terminal import print_summary
    from reasonscope.data.exchange.export import export_jsonl, export_parquet, export_thought_anchors
    from reasonscope.data.exchange.summaries import export_summary
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.data.storage.store import TraceStore

    writers: dict[Format, Callable[[Iterable[Trace], Path], int]] = {
        Format.jsonl: export_jsonl,
        Format.parquet: export_parquet,
        Format.thought_anchors: export_thought_anchors,
    }
    where = run_folder(run)
    store: Iterable[Trace] = TraceStore.open(where.store)
    if to is Format.thought_anchors:
        store = exportable(store, where.analyses)
    print_summary(export_summary(str(out), to.value, writers[to](store, out)))


def _recorded(out: Path, total: int | None) -> str:
    """What an interrupted recording has kept, and how to go on; `total` traces were wanted, if that is known here."""
    from reasonscope.data.storage.store import TraceStore

    n = len(TraceStore.open(out)) if out.exists() else 0
    # Workers store into folders of their own, which the next call takes over.
    if not n and not out.with_name(f"{out.name}.parts").exists():
        return "no trace was finished, so nothing is kept; run the same command again to start over."
    of = f" of {total}" if total is not None else ""
    return f"{n}{of} traces are kept in {out}; run the same command again to go on."


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


def _thinking(mode: ThinkingArgument | None, tags: tuple[str, str] | None, pattern: str | None) -> "Thinking | None":
    """How thinking is found, by the options; None if none is given. Tags and a pattern choose the mode that they belong to."""
    from reasonscope.data.text.think_tags import ThinkTags
    from reasonscope.data.text.thinking import Thinking

    named = "tags" if tags else "completion" if pattern is not None else None
    chosen: Any = mode.value if mode else named
    if chosen is None:
        return None
    return Thinking(
        mode=chosen,
        tags=ThinkTags(open=tags[0], close=tags[1]) if tags else None,
        answer_pattern=pattern,
    )


def _system(path: Path | None) -> str | None:
    from reasonscope.data.errors import InputError

    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; give a text file with the system message") from error


def _template_args(given: Iterable[str], effort: str | None) -> dict[str, Any]:
    """The variables of the template, with values in JSON if they are, otherwise as text."""
    from reasonscope.data.errors import InputError

    args: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"invalid --template-arg {pair!r}: write name=value, such as enable_thinking=false")
        try:
            args[name] = json.loads(value)
        except ValueError:
            args[name] = value
    return args


def _shard(text: str) -> tuple[int, int]:
    from reasonscope.data.errors import InputError

    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit()):
        raise InputError(f"invalid shard {text!r}: write i/n, such as 2/8 for the second of eight parts")
    return int(part), int(parts)
