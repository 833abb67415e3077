"""The attention chain: golden reductions and chains in both modes, and what has no chain."""

import numpy as np
import pytest

from reasonscope.analysis.attention.uqac import _ReducedAttention, attention_chain, reduced_attention
from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span


def reduced_of(blocks, inputs):
    attention = np.array(inputs["attention"])
    instruction = attention.shape[3] - attention.shape[2]
    whole = np.zeros((*attention.shape[:2], attention.shape[3], attention.shape[3]))
    whole[:, :, instruction:] = attention
    reader = _ReducedAttention(
        Span(instruction, attention.shape[3]),
        heads_kept=inputs["heads_kept"],
        reduction=inputs["reduction"],
        calibration=inputs["calibration_nearest_first"],
    )
    for block in blocks(whole):
        reader(block)
    return reader.result()


def test_golden_chains(golden, blocks):
    for case in golden("uqac_reduction"):
        inputs, expected = case["inputs"], case["expected"]
        reduced = reduced_of(blocks, inputs)
        np.testing.assert_allclose(reduced, np.array(expected["reduced"]), atol=1e-9)
        options = {name: inputs[name] for name in ("buffer", "threshold", "min_chain")}
        for variant, key in (("corrected", "corrected"), ("published", "reference")):
            chain = attention_chain(reduced, inputs["answer_positions"], inputs["stop"], variant=variant, **options)
            assert [link.index for link in chain] == expected[key]["chain"], (case["name"], variant)
            np.testing.assert_allclose([link.score for link in chain], expected[key]["chain_scores"], atol=1e-9)


def test_a_model_gives_rows_that_sum_to_one_or_less(tiny):
    found = reduced_attention(tiny("mistral"), list(range(5, 35)), Span(12, 30), heads_kept=1)
    assert found.shape == (18, 30) and (found.sum(axis=1) <= 1 + 1e-9).all()
    assert not found[:, 0].any() and not found[np.arange(18), np.arange(12, 30)].any()


def test_what_has_no_chain_is_an_error():
    with pytest.raises(InputError, match="an instruction of at least 10 tokens"):
        _ReducedAttention(Span(9, 20))
    with pytest.raises(InputError, match="reduction"):
        _ReducedAttention(Span(10, 20), reduction="sum")
    with pytest.raises(InputError, match="inside it"):
        attention_chain(np.zeros((4, 14)), [4], [False] * 4)
