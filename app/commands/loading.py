"""The options of every command that loads a model: where it computes, and whether the same numbers come again."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, TypeAlias

import typer

# What they were given, by the names that `load_model` has for them.
Load: TypeAlias = Mapping[str, Any]


def _options(
    *,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, or auto.")] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads; without it one while matrices are small, and all while they are large."),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Kernels that give the same bits again; an error where there is none."),
    ] = False,
    float32_compute: Annotated[
        bool, typer.Option("--float32-compute", help="Compute in float32 over 16-bit weights: batches change no token.")
    ] = False,
) -> Load:
    return {
        "device": device,
        "threads": threads,
        "deterministic": deterministic,
        "float32_compute": float32_compute,
    }


# The parameters of these options by name.
LOADING = inspect.signature(_options).parameters


def loads_model(command: Callable[..., None]) -> Callable[..., None]:
    """A command with these options behind its own; it takes them together, as its parameter `load`."""
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "load"]

    @wraps(command)
    def with_options(**given: Any) -> None:
        load = _options(**{name: given.pop(name) for name in LOADING})
        command(**given, load=load)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *LOADING.values())]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options
