"""The options of every command that loads a model: the device, the precision, and whether results repeat exactly."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, TypeAlias

import typer

from reasonscope.data.variants import Quantise

# The values of these options, by the parameter names of `load_model`.
Load: TypeAlias = Mapping[str, Any]


def _options(
    *,
    device: Annotated[
        str, typer.Option(help="Device that the model runs on: cpu, cuda:0, or auto (all accelerators).")
    ] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="The type of the weights, such as float32 or bfloat16. By default that of the run that is read, otherwise that of the "
            "checkpoint."
        ),
    ] = None,
    quantise: Annotated[
        Quantise | None,
        typer.Option(
            help="Pack the weights with bitsandbytes while loading; by default as in the run that is read.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. By default one for small matrices and all cores for large ones."),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Use kernels that give the same bits every time; an error if an operation has no such kernel.",
        ),
    ] = False,
    float32_compute: Annotated[
        bool,
        typer.Option(
            "--float32-compute", help="Compute in float32 with 16-bit weights, so that batching changes no token."
        ),
    ] = False,
) -> Load:
    return {
        "device": device,
        "dtype": dtype,
        "quantise": quantise,
        "threads": threads,
        "deterministic": deterministic,
        "float32_compute": float32_compute,
    }


# The parameters of these options by name.
LOADING = inspect.signature(_options).parameters


def loads_model(command: Callable[..., None]) -> Callable[..., None]:
    """Add these options after those of a command, which receives them together as its parameter `load`."""
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "load"]

    @wraps(command)
    def with_options(**given: Any) -> None:
        load = _options(**{name: given.pop(name) for name in LOADING})
        command(**given, load=load)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *LOADING.values())]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options
