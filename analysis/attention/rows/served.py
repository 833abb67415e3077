"""A model in vLLM as far as attention needs it: each head's rows are reduced there, and sums of one number per head and token come back."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from reasonscope.analysis.attention.rows.block import AttentionVisitor
from reasonscope.analysis.attention.rows.functionals import RowFunctional
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.layout import Layout
from reasonscope.probes.models.layout_derivation import layout_of_structure
from reasonscope.probes.models.loading import load_structure
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.vllm.steering import Look
from reasonscope.probes.vllm.wire import decode, inline
from reasonscope.probes.vllm.writer import Seen, VllmWriter
from reasonscope.steering.engine.shipping import shipped

_WORKER = "reasonscope.analysis.attention.rows.worker"
_ONE = Sampling(temperature=0, max_new_tokens=1)


@dataclass(frozen=True, kw_only=True)
class ServedModel(Prompting):
    """A model that vLLM holds, for analyses of attention heads; no weights are here.

    Attributes:
        layout: Which blocks have attention, and how many heads.
        writer: What asks the server.
    """

    layout: Layout
    writer: VllmWriter

    @property
    def n_heads(self) -> int:
        """Query heads in a block; the largest number if blocks differ."""
        return self.layout.n_heads

    def read(self, ids: Sequence[int], functional: AttentionVisitor) -> None:
        """Let the server read `ids` once, and add what it makes of its attention to `functional`.

        Raises InputError if the functional needs heads together or is not known there, or if the server fails.
        """
        if not isinstance(functional, RowFunctional):
            raise InputError(
                "vLLM reduces attention head by head, to means between sentences, mean rows and rhythms; read this with --backend hooks"
            )
        writer = replace(self.writer, look=self._look(functional))
        ((_, done, _),) = writer.stream([list(ids)], _ONE, [0])
        assert isinstance(done, Seen)
        _take(done.report, functional, len(ids), self._layers, writer.url)

    @property
    def _layers(self) -> Mapping[int, int]:
        """The heads of each block that has attention."""
        return {i: self.layout.of_block[i].n_heads for i in self.layout.layers_with("attn_out")}

    def _look(self, functional: RowFunctional) -> Look:
        told = json.dumps(functional.told)
        numbers = sum(values.numel() for values in functional.sums.values())
        return Look(
            what="read attention",
            hook=partial(shipped, _WORKER, "hook_of", type(functional).__name__, told),
            pre=tuple(self._layers),
            reply_bytes=8 * numbers + 2**20,
        )


def served_model(model: Prompting, writer: VllmWriter) -> ServedModel:
    """The model that `writer` asks; its structure is made here without weights. Raises what loading a structure raises."""
    hf, _ = load_structure(model.name, dtype=None, revision=model.revision)
    known = {told.name: getattr(model, told.name) for told in fields(Prompting)}
    return ServedModel(**known, layout=layout_of_structure(hf), writer=writer)


def _take(
    report: Mapping[str, Any], functional: RowFunctional, n_tokens: int, layers: Mapping[int, int], url: str
) -> None:
    """Put what the ranks report into the functional. Raises InputError if a head of a layer is missing or lacks rows."""
    for layer, n_heads in layers.items():
        parts = sorted(
            int(key.split(".")[1]) for key in report if key.startswith(f"{layer}.") and key.endswith(".rows")
        )
        if any(report[f"{layer}.{first}.rows"] != n_tokens for first in parts) or not parts:
            raise InputError(f"{url} read the attention of layer {layer} at fewer than {n_tokens} tokens; ask it again")
        for name, values in functional.sums.items():
            found = torch.cat(list(_parts(report, layer, parts, name, values[layer].shape, url)))
            if len(found) != n_heads:
                raise InputError(
                    f"{url} gave {len(found)} of {n_heads} heads of layer {layer}; serve the model of this run"
                )
            values[layer, :n_heads] = found
            values[layer, n_heads:] = torch.nan


def _parts(
    report: Mapping[str, Any], layer: int, firsts: Sequence[int], name: str, shape: torch.Size, url: str
) -> Iterator[torch.Tensor]:
    for first in firsts:
        told = report.get(f"{layer}.{first}.{name}")
        n = told["shape"][0] if isinstance(told, dict) and isinstance(told.get("shape"), list) and told["shape"] else 0
        if not isinstance(n, int) or not isinstance(told, dict):
            raise InputError(f"{url} gave no {name} of layer {layer}; is vllm-lens 1.3 active there?")
        yield decode(told, inline(told, url), (n, *shape[1:]), url).double()
