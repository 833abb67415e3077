"""One short pass of a live model, watched: which list of blocks it runs through, and what every module in them takes and gives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reasonscope.data.errors import ArchitectureError
from reasonscope.probes.architecture.layout import input_device
from reasonscope.probes.backends.hooks import call_model, eager_attention, hidden_input

_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a module took and gave in the pass: its first tensor, and its output as a tuple."""

    path: str
    given: Tensor | None
    made: tuple[Any, ...]

    @property
    def out(self) -> Tensor | None:
        return self.made[0] if self.made and isinstance(self.made[0], Tensor) else None


@dataclass(frozen=True, kw_only=True)
class BlockTrace:
    """One run through a block: the stream before and after (1, token, d_model), and the calls inside in the order of their end."""

    entered: Tensor
    left: Tensor
    calls: Sequence[Call]

    def of(self, path: str) -> Call | None:
        return next((call for call in self.calls if call.path == path), None)


@dataclass(frozen=True, kw_only=True)
class Outside:
    """The calls outside of the blocks, and the stream that enters the first block and leaves the last one."""

    calls: Sequence[Call]
    first: Tensor
    last: Tensor


Visit = Callable[[int, BlockTrace], None]


@dataclass
class _Watching:
    calls: list[Call] = field(default_factory=list)

    def hook(self, path: str) -> Callable[..., None]:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
            made = tuple(output) if isinstance(output, tuple | list) else (output,)
            self.calls.append(Call(path=path, given=_kept(given), made=tuple(map(_kept, made))))

        return watch


def _kept(value: Any) -> Any:
    """A copy, because a module may change its input or output in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _run_short(hf: PreTrainedModel) -> None:
    """A pass over a few tokens, which differ from one another."""
    rows = int(hf.get_input_embeddings().weight.shape[0])  # type: ignore[index]  # an embedding has a table
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, rows - 1), min(rows, 1000), (1, _TOKENS), generator=generator).to(input_device(hf))
    with torch.no_grad():
        call_model(hf, ids, torch.ones_like(ids))


def find_blocks(hf: PreTrainedModel) -> str:
    """The path of the list of decoder blocks: the longest list of modules whose members run one after the other on the stream.

    Raises ArchitectureError for a model without one.
    """
    lists = [(path, module) for path, module in hf.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    ran: dict[str, list[int]] = {path: [] for path, _ in lists}
    with ExitStack() as stack:
        for path, module in lists:
            for i, child in enumerate(module):
                stack.callback(child.register_forward_pre_hook(_noting(ran[path], i)).remove)
        _run_short(hf)
    inner = {path for path, _ in lists if any(path.startswith(f"{other}.") for other, _ in lists if other != path)}
    found = [path for path, module in lists if path not in inner and ran[path] == list(range(len(module)))]
    if not found:
        raise ArchitectureError(
            f"{type(hf).__name__} has no list of blocks that run one after the other, so it is not a decoder that can be read"
        )
    longest: str = max(found, key=lambda path: len(ran[path]))
    return longest


def _noting(ran: list[int], i: int) -> Callable[..., None]:
    def note(*_: Any) -> None:
        ran.append(i)

    return note


def watch_blocks(hf: PreTrainedModel, blocks: str, visit: Visit) -> Outside:
    """Run the short pass with eager attention if the model has it, and hand the trace of each block to `visit` when it ends."""
    layers = list(hf.get_submodule(blocks).children())
    outside, streams = _Watching(), dict[int, tuple[Tensor, Tensor]]()
    inside = {id(module) for layer in layers for module in layer.modules()}

    def visited(layer: int, trace: BlockTrace) -> None:
        streams[layer] = trace.entered, trace.left
        visit(layer, trace)

    with ExitStack() as stack:
        stack.enter_context(eager_attention(hf) if _can_be_eager(hf) else nullcontext())
        for path, module in hf.named_modules():
            if id(module) not in inside and not isinstance(module, nn.ModuleList):
                stack.callback(module.register_forward_hook(outside.hook(path), with_kwargs=True).remove)
        for i, layer in enumerate(layers):
            stack.enter_context(_watched(i, layer, visited))
        _run_short(hf)
    return Outside(calls=outside.calls, first=streams[0][0], last=streams[len(layers) - 1][1])


def _can_be_eager(hf: PreTrainedModel) -> bool:
    """Whether the attention kernel of a model can be chosen; those without attention have none."""
    try:
        with eager_attention(hf):
            return True
    except (AttributeError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _watched(layer: int, block: nn.Module, visit: Visit) -> Iterator[None]:
    watching, entered = _Watching(), list[Tensor]()

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        watching.calls.clear()
        entered[:] = [_kept(hidden_input(args, kwargs))]

    def end(_: nn.Module, __: Any, output: Any) -> None:
        left = output[0] if isinstance(output, tuple | list) else output
        visit(layer, BlockTrace(entered=entered[0], left=_kept(left), calls=tuple(watching.calls)))
        watching.calls.clear()

    handles = [
        module.register_forward_hook(watching.hook(path), with_kwargs=True)
        for path, module in block.named_modules()
        if path and not isinstance(module, nn.ModuleList)
    ]
    handles += [block.register_forward_pre_hook(begin, with_kwargs=True), block.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
