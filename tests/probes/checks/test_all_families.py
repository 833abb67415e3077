"""Families of transformers tried one by one, and the document that says what was found."""

import warnings
from pathlib import Path

import pytest

from reasonscope.probes.checks.all_families import (
    FAMILIES_HEADING,
    _all_families,
    _families_markdown,
    _FamilyTrial,
    _try_family,
)

SUPPORT = Path(__file__).parents[3] / "docs" / "support.md"
# Current architectures that a table of layouts once refused.
WANTED = """
    qwen3_5_text qwen3_next gemma4_text olmo3 glm4 glm4_moe mixtral qwen2_moe granite granitemoehybrid ministral seed_oss exaone4
    minimax_m2 ernie4_5 ernie4_5_moe cohere2 hunyuan_v1_dense hunyuan_v1_moe apertus phi phimoe smollm3 nemotron_h deepseek_v32 lfm2
    falcon_h1 qwen3_vl gemma3 mistral3
""".split()


def read(document: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The rows of proved families, and the reasons of refused ones."""
    proved, refused = {}, {}
    for line in document.partition(FAMILIES_HEADING)[2].partition("\n## ")[0].splitlines():
        if line.startswith("| ") and not line.startswith(("| family", "| ---")):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            proved[name] = cells
        elif line.startswith("- "):
            name, _, reason = line.removeprefix("- ").partition(": ")
            refused[name] = reason
    return proved, refused


def test_the_document_names_every_family_and_proves_the_wanted_ones():
    proved, refused = read(SUPPORT.read_text(encoding="utf-8"))
    assert {*proved, *refused} == set(_all_families()) and not {*proved} & {*refused}
    assert len(proved) >= 60 and set(WANTED) <= set(proved)
    assert all(refused.values())


def test_a_family_is_tried_with_each_engine():
    found = _try_family("qwen2")
    assert found.refused == "" and found.blocks == ("4 × attention `self_attn`, MLP `mlp`",)
    assert found.cached and found.padded and found.engines == {"transformer_lens": "", "nnsight": ""}
    assert "router" not in found.points and "mlp_post" in found.points


def test_a_family_without_blocks_that_add_is_refused_in_one_line():
    found = _try_family("bert", backends=())
    assert "is not a sum" in found.refused and "\n" not in found.refused


def test_what_was_found_is_written_and_can_be_read_again():
    trials = [
        _FamilyTrial(family="a", points=("resid_pre",), blocks=("1 × nothing",), engines={"nnsight": ""}, cached=True),
        _FamilyTrial(family="b", refused="no: list of blocks"),
    ]
    proved, refused = read(_families_markdown(trials))
    assert refused == {"b": "no: list of blocks"}
    assert proved["a"][0] == "1 × nothing" and proved["a"][2:] == ["✓", "–", "✓", "✗"]


@pytest.mark.slow
def test_the_document_says_what_is_so():
    written, refused = read(SUPPORT.read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, of default settings made small
        trials = [_try_family(family) for family in _all_families()]
    proved, now_refused = read(_families_markdown(trials))
    assert (proved, set(now_refused)) == (written, set(refused)), "run make support"
