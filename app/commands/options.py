"""Options that several commands share, as classes of which a command takes one value each.

`grouped` turns each parameter of such a class into the options of its fields, after the command's own.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from reasonscope.data.errors import InputError
from reasonscope.data.variants import Quantise

if TYPE_CHECKING:
    from reasonscope.data.text.thinking import Thinking
    from reasonscope.probes.generation.cluster import Cluster

RunOption = Annotated[Path, typer.Option(help="The folder of a run, or of the demo.")]
ModelName = Annotated[str | None, typer.Option("--model", help="The model; by default the one that wrote the run.")]
HowMany = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many problems; all of a file if not given. Needed for ledger and requests, which are generated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write every number as JSON.")]

ServedAs = Annotated[
    str | None, typer.Option(help="The name of the model on the server; the same as here if not given.")
]
TrustServer = Annotated[
    bool,
    typer.Option(
        "--trust-server",
        help="With --backend vllm: send steering, which travels as code, to a server on another machine.",
    ),
]


def check_engine(backend: str | None, server: str | None) -> None:
    """Raise InputError if vLLM is to be the engine and has no address."""
    if backend == "vllm" and server is None:
        raise InputError("--backend vllm needs --server, the address at which vLLM runs with vllm-lens")


@dataclass(frozen=True, kw_only=True)
class Load:
    """How a model is loaded: the device, the precision, and whether results repeat exactly; `**load` are arguments of `load_model`."""

    device: Annotated[
        str, typer.Option(help="Device that the model runs on: cpu, cuda:0, or auto (all accelerators).")
    ] = "cpu"
    dtype: Annotated[
        str | None,
        typer.Option(
            help="The type of the weights, such as float32 or bfloat16. By default that of the run that is read, otherwise that of the "
            "checkpoint."
        ),
    ] = None
    quantise: Annotated[
        Quantise | None,
        typer.Option(
            help="Pack the weights with bitsandbytes while loading; by default as in the run that is read.",
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. By default one for small matrices and all cores for large ones."),
    ] = None
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Use kernels that give the same bits every time; an error if an operation has no such kernel.",
        ),
    ] = False
    float32_compute: Annotated[
        bool,
        typer.Option(
            "--float32-compute", help="Compute in float32 with 16-bit weights, so that batching changes no token."
        ),
    ] = False

    def keys(self) -> list[str]:
        return [each.name for each in fields(self)]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class _ThinkingArgument(StrEnum):
    """How thinking is found."""

    tags = "tags"
    completion = "completion"
    none = "none"


@dataclass(frozen=True, kw_only=True)
class PromptingOptions:
    """How thinking is found and prompts are rendered."""

    thinking: Annotated[
        _ThinkingArgument | None,
        typer.Option(
            help="How thinking is found: between tags, in the open (everything before the sentence with the final answer), or not at all. "
            "By default by tags if the model has any, otherwise in the open."
        ),
    ] = None
    think_tags: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="OPEN CLOSE", help="The tags around the thinking, if the model does not name them itself."
        ),
    ] = None
    answer_pattern: Annotated[
        str | None,
        typer.Option(
            help="For thinking in the open: a regular expression in the sentence with the final answer, which is its first group."
        ),
    ] = None
    template_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="A variable for the chat template, as name=value with a value in JSON or a text; may be repeated."
        ),
    ] = None
    effort: Annotated[
        str | None, typer.Option(help="Reasoning effort, such as low: the template's variable reasoning_effort.")
    ] = None

    def finds(self) -> "Thinking | None":
        """How thinking is found; None if no option says. Tags and a pattern choose the mode that they belong to."""
        from reasonscope.data.text.think_tags import ThinkTags
        from reasonscope.data.text.thinking import Thinking

        named = "tags" if self.think_tags else "completion" if self.answer_pattern is not None else None
        chosen: Any = self.thinking.value if self.thinking else named
        if chosen is None:
            return None
        tags = ThinkTags(open=self.think_tags[0], close=self.think_tags[1]) if self.think_tags else None
        return Thinking(mode=chosen, tags=tags, answer_pattern=self.answer_pattern)

    def template_args(self) -> dict[str, Any]:
        """The variables of the template, with values in JSON if they are, otherwise as text."""
        args: dict[str, Any] = {} if self.effort is None else {"reasoning_effort": self.effort}
        for pair in self.template_arg or ():
            name, equals, value = pair.partition("=")
            if not equals or not name.isidentifier():
                raise InputError(f"invalid --template-arg {pair!r}: write name=value, such as enable_thinking=false")
            try:
                args[name] = json.loads(value)
            except ValueError:
                args[name] = value
        return args


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Workers of Ray that share the work, if `ray` names a cluster."""

    ray: Annotated[
        str | None,
        typer.Option(help="Share the work out by Ray Data: local, auto (the cluster of this machine) or an address."),
    ] = None
    workers: Annotated[int | None, typer.Option(min=1, help="Workers of Ray; as many as fit if not given.")] = None
    gpus: Annotated[float, typer.Option(min=0, help="Accelerators of each worker; give --device too.")] = 0

    def cluster(self) -> "Cluster | None":
        """The cluster; None for this process alone."""
        if self.ray is None:
            return None
        from reasonscope.probes.generation.cluster import Cluster

        return Cluster(address=self.ray, workers=self.workers, gpus=self.gpus)


class _SeedsArgument(StrEnum):
    """Whether a server gets the seeds of the traces."""

    auto = "auto"
    send = "send"
    none = "none"


@dataclass(frozen=True, kw_only=True)
class ServedOptions:
    """How a server is asked."""

    served_as: ServedAs = None
    requests: Annotated[int, typer.Option(min=1, help="How many requests the server gets at a time.")] = 16
    server_timeout: Annotated[
        float, typer.Option(min=0.1, help="Longest time of one request to the server, in seconds.")
    ] = 600.0
    trust_server: TrustServer = False
    server_seeds: Annotated[
        _SeedsArgument,
        typer.Option(
            help="Whether requests carry seeds. auto leaves them out for vLLM on CPUs, which crashes on them unless it was started with "
            "--no-enable-chunked-prefill (then send them); such traces are marked unseeded."
        ),
    ] = _SeedsArgument.auto

    def how(self) -> dict[str, Any]:
        """Arguments of `server_writer` and `vllm_writer`."""
        return {"served_as": self.served_as, "timeout": self.server_timeout, "seeds": self.server_seeds.value}


def given_options(context: typer.Context) -> dict[str, Any]:
    """The options that were typed, by name, without --json, which only changes how results are shown."""
    typed: dict[str, Any] = {}
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.param_type_name == "option" and source is not None and source.name != "DEFAULT":
            value = context.params[option.name or ""]
            typed[option.opts[0].removeprefix("--")] = list(value) if getattr(option, "multiple", False) else value
    return {name: value for name, value in typed.items() if name != "json"}


def options_of(group: type) -> Iterator[inspect.Parameter]:
    """The options of a group of them, one parameter per field."""
    hints = get_type_hints(group, include_extras=True)
    for each in fields(group):
        default = inspect.Parameter.empty if each.default is MISSING else each.default
        yield inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[each.name])


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of each of its groups as options, after its own."""
    asked = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {one.name: one.annotation for one in asked if is_dataclass(one.annotation)}
    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in asked if one.name not in groups]

    @wraps(command)
    def with_options(**given: Any) -> None:
        taken = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)}) for name, group in groups.items()
        }
        command(**given, **taken)

    return signed(with_options, [*own, *(one for group in groups.values() for one in options_of(group))])


def signed(command: Callable[..., None], parameters: Iterable[inspect.Parameter]) -> Callable[..., None]:
    """The command with these parameters, which typer reads."""
    parameters = list(parameters)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
