"""Fixtures of tests/probes: the tiny model of a family, built once a session. Tests must leave it as they found it."""

from collections.abc import Callable
from functools import cache

import pytest
from transformers import PreTrainedModel

from reasonscope.probes.families import FAMILIES, tiny_model


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family of the layout table in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def hf_of() -> Callable[[str], PreTrainedModel]:
    """The tiny model of a family by its name."""
    return cache(tiny_model)
