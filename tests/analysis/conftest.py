"""Fixtures of tests/analysis: tiny random models of every family, and golden cases read as arrays."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_tokenizer import plain_tokenizer

from reasonscope.analysis.attention.rows.block import AttentionBlock
from reasonscope.data.trace import Span
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.models.model import Model, load_model


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Model]:
    """The tiny model of a family, loaded once a session. Tests leave it as they found it."""
    return cache(lambda family: load_model(tiny_model(family), tokenizer=plain_tokenizer()))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], list[dict[str, Any]]]:
    """The cases of a golden file by its name."""
    folder = Path(__file__).parents[1] / "golden"
    return lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["cases"]


def dense_blocks(attention: Any, size: int = 7) -> Iterator[AttentionBlock]:
    """A recorded attention (layer, head, query, key) as the blocks that a model would show."""
    for layer, heads in enumerate(torch.from_numpy(np.array(attention, dtype=np.float64))):
        for start in range(0, heads.shape[1], size):
            rows = Span(start, min(start + size, heads.shape[1]))
            shown = heads[:, rows.slice, : rows.stop]
            yield AttentionBlock(layer=layer, rows=rows, keys=Span(0, rows.stop), probabilities=shown)


@pytest.fixture(scope="session")
def blocks() -> Callable[..., Iterator[AttentionBlock]]:
    return dense_blocks
