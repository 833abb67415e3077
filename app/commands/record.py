"""`reasonscope record`: let a model answer problems, and store its traces with their activations."""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonscope.app.commands.options import (
    HowMany,
    Load,
    PromptingOptions,
    RayOptions,
    ServedOptions,
    check_engine,
    grouped,
)
from reasonscope.app.interruption import keeping
from reasonscope.data.errors import InputError

if TYPE_CHECKING:
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.data.trace import Sampling
    from reasonscope.probes.models.prompting import Prompting
    from reasonscope.probes.server.completions import ServerWriter
    from reasonscope.steering.decoding.monitor import ProbeMonitor
    from reasonscope.steering.engine.monitor import EngineMonitor
    from reasonscope.steering.recipes.recipe import Recipe


class _SamplingArgument(StrEnum):
    """Whose settings sampling begins with."""

    model = "model"


class _StopAtArgument(StrEnum):
    """Where a monitor may close the thinking."""

    token = "token"
    paragraph = "paragraph"


@dataclass(frozen=True, kw_only=True)
class _SamplingOptions:
    """How completions are sampled, and when they end."""

    sampling: Annotated[
        _SamplingArgument | None,
        typer.Option(help="model: how the model's own generation configuration samples; other options overrule it."),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sampling temperature; 0 is greedy. 0.7 if not given.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from the likeliest tokens that together have this probability."),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from this many of the likeliest tokens; 0 for all.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from tokens with this share of the probability of the likeliest."),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Makes tokens that were read or written less likely; 1 for none.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtracted from the logits of tokens already written.")
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the completion; may be repeated.")] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 1024

    def of(self, model: str, seed: int) -> "Sampling":
        """The sampling of `model`: its own settings if asked for, overruled by every option that is given."""
        from reasonscope.data.trace import Sampling
        from reasonscope.probes.models.loading import generation_defaults

        own: dict[str, Any] = generation_defaults(model) if self.sampling else {"temperature": 0.7}
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "stop")
        given = {name: value for name in names if (value := getattr(self, name)) not in (None, [])}
        return Sampling(**{**own, **given}, max_new_tokens=self.max_new_tokens, seed=seed)


@dataclass(frozen=True, kw_only=True)
class _AskingOptions(PromptingOptions):
    """How the model is asked, beside how its thinking is found."""

    system: Annotated[
        Path | None, typer.Option(help="A text file with a system message, put before every problem.")
    ] = None
    open_tag: Annotated[
        bool,
        typer.Option("--open-tag", help="End every prompt with the opening tag, for models that forget it."),
    ] = False
    no_think: Annotated[
        bool,
        typer.Option(
            "--no-think",
            help="Switch thinking off as the chat template does, and close the thinking block at once if it does not.",
        ),
    ] = False

    def system_message(self) -> str | None:
        """The text of the file."""
        if self.system is None:
            return None
        try:
            return self.system.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.system} cannot be read: {error}; give a text file with the system message"
            ) from error


@dataclass(frozen=True, kw_only=True)
class _ServerOptions(ServedOptions):
    """A server that writes the completions."""

    server: Annotated[
        str | None,
        typer.Option(
            help="A server, http://host:port, that writes the completions; the model here then only reads --sites."
        ),
    ] = None

    def check(self, ray: RayOptions, shard: str, backend: str) -> None:
        """Raise InputError if workers of Ray are to record, which share the work out by themselves, or an engine has no address."""
        if ray.ray is not None and (self.server is not None or shard != "1/1"):
            raise InputError("--ray shares the work out by itself; leave out --server and --shard")
        check_engine(backend, self.server)

    def writer(
        self,
        model: "Prompting",
        recipe: "Recipe | None",
        watches: "ProbeMonitor | EngineMonitor | None",
        *,
        engine: bool,
    ) -> "ServerWriter | None":
        """What writes on the server: any server, or vLLM as an engine, which a recipe may steer; None if the model here writes."""
        from reasonscope.probes.server.completions import server_writer
        from reasonscope.probes.vllm.writer import vllm_writer
        from reasonscope.steering.engine.in_engine import in_engine

        if not self.server:
            return None
        how: dict[str, Any] = {**self.how(), "workers": self.requests}
        if not engine:
            return server_writer(self.server, model, **how)
        steering = in_engine(recipe, model) if recipe else None
        look = getattr(watches, "look", None)
        return vllm_writer(self.server, model, steering=steering, look=look, trusted=self.trust_server, **how)


@dataclass(frozen=True, kw_only=True)
class _MonitorOptions:
    """A probe that reads along, and may close the thinking."""

    monitor: Annotated[
        Path | None,
        typer.Option(help="A saved probe to read on every token while the model writes; its scores go to RUN/scores."),
    ] = None
    stop_above: Annotated[
        float | None, typer.Option(help="Close the thinking once the score of --monitor is above this.")
    ] = None
    window: Annotated[
        int, typer.Option(min=1, help="Tokens of thinking over which the score is averaged before it may stop.")
    ] = 1
    stop_at: Annotated[
        _StopAtArgument,
        typer.Option(help="Where the thinking may be closed: after any token, or only at the end of a paragraph."),
    ] = _StopAtArgument.token
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Choose --stop-above on this run, of problems that the probe did not learn from (see --false-alarms)."
        ),
    ] = None
    false_alarms: Annotated[
        float, typer.Option(min=0, max=1, help="With --calibrate: the share of such problems that may be stopped.")
    ] = 0.05

    def check(self, ray: RayOptions) -> None:
        """Raise InputError for options that need a probe without one, and for workers of Ray, which it cannot watch."""
        if self.monitor is None and (self.stop_above is not None or self.calibrate is not None):
            raise InputError("--stop-above and --calibrate need --monitor, the probe whose score may stop")
        if self.monitor is not None and ray.ray is not None:
            raise InputError("--monitor watches a model of this process; leave out --ray")

    def open(self, loaded: "Prompting", *, engine: bool) -> "ProbeMonitor | EngineMonitor | None":
        """The monitor of this model, here or in vLLM; None if no probe reads along."""
        from reasonscope.data.storage.run_folder import run_folder
        from reasonscope.data.storage.store import TraceStore
        from reasonscope.probes.models.model import Model
        from reasonscope.steering.decoding.monitor import ProbeMonitor, monitor_options
        from reasonscope.steering.engine.monitor import EngineMonitor

        if self.monitor is None:
            return None
        if not engine and not isinstance(loaded, Model):
            raise InputError(
                "--monitor watches the model that writes, which this server does not show; add --backend vllm, or leave out --server"
            )
        probe, how = monitor_options(
            loaded,
            self.monitor,
            stop_above=self.stop_above,
            window=self.window,
            at="paragraph" if self.stop_at is _StopAtArgument.paragraph else "token",
            calibrate=TraceStore.open(run_folder(self.calibrate).store) if self.calibrate else None,
            false_alarms=self.false_alarms,
        )
        if isinstance(loaded, Model) and not engine:
            return ProbeMonitor(loaded, probe, **how)
        return EngineMonitor(loaded, probe, **how)


@grouped
def record_command(
    *,
    model: Annotated[
        str, typer.Option(help="The model: a Hugging Face id, a folder, organism or organism-base.")
    ] = "organism",
    problems: Annotated[
        str, typer.Option(help="The problems: ledger, requests, a JSONL file, or hf:NAME for a data set of the hub.")
    ] = "ledger",
    out: Annotated[
        Path, typer.Option(help="The folder of the run. If it holds part of this run, recording resumes there.")
    ] = Path("runs/run"),
    n: HowMany = None,
    split: Annotated[str, typer.Option(help="The split of the data set: train, validation or test.")] = "test",
    sites: Annotated[
        str,
        typer.Option(
            help="Activations to record, such as resid_post.* or z.2-4,attn_out.0; an empty text records none."
        ),
    ] = "resid_post.*",
    samples: Annotated[int, typer.Option(min=1, help="How many completions of each problem.")] = 1,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Problems per batch. An interrupted recording keeps every finished batch.")
    ] = 16,
    shard: Annotated[
        str, typer.Option(help="Record part i of n of the problems, written i/n: for array jobs.")
    ] = "1/1",
    backend: Annotated[
        str,
        typer.Option(
            help="What reads and edits activations: hooks, transformer_lens or nnsight; vllm for a --server of vLLM with vllm-lens, which "
            "gives activations while it writes, and takes recipes."
        ),
    ] = "hooks",
    remote: Annotated[
        str | None,
        typer.Option(
            help="With --backend nnsight, where the model runs: ndif, the address of an NDIF server, or local to try it here."
        ),
    ] = None,
    steer: Annotated[
        Path | None, typer.Option(help="A recipe that steers the model; the traces go into a run of their own.")
    ] = None,
    sampling: _SamplingOptions,
    asking: _AskingOptions,
    server: _ServerOptions,
    watching: _MonitorOptions,
    ray: RayOptions,
    load: Load,
) -> None:
    """Let a model answer problems, and store its traces with their activations. The same command again resumes."""
    from reasonscope.data.exchange.problem_sets import load_problems
    from reasonscope.data.summary import plural
    from reasonscope.probes.generation.cluster import Job, record_on
    from reasonscope.probes.generation.recording import record as record_traces
    from reasonscope.probes.models.model import load_model
    from reasonscope.probes.models.prompting import PromptOptions, load_prompting
    from reasonscope.steering.recipes.recipe import Recipe

    watching.check(ray)
    server.check(ray, shard, backend)
    engine = backend == "vllm"
    asked, watches = load_problems(problems, split=split, n=n, seed=seed), None
    how: dict[str, Any] = {
        "sampling": sampling.of(model, seed),
        "samples": samples,
        "batch_size": batch_size,
        "steer": None if steer is None else Recipe.load(steer),
    }
    if ray.ray is not None and how["steer"] is not None:
        _check_spread(how["steer"])
    prompt = PromptOptions(
        system=asking.system_message(),
        template_args=asking.template_args(),
        think=not asking.no_think,
        open_tag=asking.open_tag,
    )
    found: dict[str, Any] = {"thinking": asking.finds(), "prompt": prompt}
    loading = {"source": model, "backend": backend, "remote": remote == "ndif" or remote or False, **found, **load}
    with keeping(partial(what_is_recorded, out, len(asked) * samples if shard == "1/1" else None)):
        if cluster := ray.cluster():
            store = record_on(cluster, Job(load=loading, sites=sites, **how), asked, out)
        else:
            bare = engine or (server.server is not None and not sites)
            loaded = load_prompting(model, **found) if bare else load_model(**loading)
            watches = watching.open(loaded, engine=engine)
            if note := loaded.unrendered(asked):
                typer.echo(note, err=True)
            store = record_traces(
                loaded, asked, out, sites=sites or (), shard=_shard(shard), monitor=watches,
                server=server.writer(loaded, how["steer"], watches, engine=engine), **how,
            )  # fmt: skip
    by = f", steered by {steered['name']} ({steered['hash']})" if (steered := store.meta.get("steered")) else ""
    typer.echo(f"{plural(len(store), 'trace')} in {out}{by}; to verify every byte: reasonscope check {out}")
    if watches is not None and watching.monitor is not None:
        typer.echo(_watched(watches, store, out, watching.monitor.stem))


def _check_spread(recipe: "Recipe") -> None:
    """Raise InputError for a controller, whose decisions would stay on the machines of the workers."""
    if recipe.controls:
        raise InputError(
            f"{recipe.name} holds the controller {recipe.controls[0].name}, whose decisions workers of Ray cannot hand back; "
            "leave out --ray, and share the work out by --shard if it is too much for one machine"
        )


def _watched(monitor: "ProbeMonitor | EngineMonitor", store: "TraceStore", out: Path, name: str) -> str:
    """Save what the monitor read, and say it in a line."""
    from reasonscope.data.storage.run_folder import run_folder
    from reasonscope.steering.decoding.monitor import save_live_scores

    path = run_folder(out).scores / f"{name}.safetensors"
    missing = save_live_scores(monitor, store, path, name=name)
    return f"{monitor.told()}; its scores: {path}" + (f" ({missing} traces have none)" if missing else "")


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit()):
        raise InputError(f"invalid shard {text!r}: write i/n, such as 2/8 for the second of eight parts")
    return int(part), int(parts)


def what_is_recorded(out: Path, total: int | None) -> str:
    """What an interrupted recording has kept, and how to go on; `total` traces were wanted, if that is known here."""
    from reasonscope.data.storage.store import TraceStore

    n = len(TraceStore.open(out)) if out.exists() else 0
    # Workers store into folders of their own, which the next call takes over.
    if not n and not out.with_name(f"{out.name}.parts").exists():
        return "no trace was finished, so nothing is kept; run the same command again to start over."
    of = f" of {total}" if total is not None else ""
    return f"{n}{of} traces are kept in {out}; run the same command again to go on."
