"""Tensors arrive as they were sent, in every dtype; what does not fit its own description is refused."""

import base64

import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.probes.vllm.wire import check_shape, decode, encode, inline

URL = "http://127.0.0.1:8000"
STATES = torch.tensor([[1.5, -2.25, 3.0], [0.0, 0.5, -8.0]])


def told(dtype="float32", original="torch.float32", **more):
    return {"dtype": dtype, "original_dtype": original, "shape": [2, 3], "compression": "none", **more}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_floats_arrive_as_they_were_sent(dtype):
    sent = STATES.to(getattr(torch, dtype))
    found = decode(told(dtype, f"torch.{dtype}"), sent.numpy().tobytes(), (2, 3), URL)
    assert found.dtype == sent.dtype and torch.equal(found, sent)
    assert check_shape(told(dtype, f"torch.{dtype}"), (2, 3), URL) == 6 * sent.element_size()


def test_bfloat16_travels_as_the_bits_of_integers_and_no_integer_else_does():
    sent = STATES.to(torch.bfloat16)
    bits = sent.view(torch.int16).numpy().tobytes()
    assert torch.equal(decode(told("int16", "torch.bfloat16"), bits, (2, 3), URL), sent)
    for dtype, original in (("int16", "torch.float32"), ("int32", "torch.bfloat16"), ("int64", "torch.int64")):
        with pytest.raises(InputError, match="dtype"):
            check_shape(told(dtype, original), (2, 3), URL)


def test_what_is_sent_in_the_json_is_read_from_it():
    sent = encode(STATES.to(torch.bfloat16))
    assert torch.equal(decode(sent, inline(sent, URL), (2, 3), URL), STATES)
    for wrong in ({}, {"data": 3}, {"data": "?"}, {"XXdata": base64.b64encode(b"1").decode()}):
        with pytest.raises(InputError, match="without data"):
            inline(wrong, URL)


@pytest.mark.parametrize("wrong", ["text", {}, told(shape=[3, 2]), told(shape=[2, 3, 1]), told(compression="gzip")])
def test_another_shape_or_packing_is_refused(wrong):
    with pytest.raises(InputError, match="is it vllm-lens"):
        check_shape(wrong, (2, 3), URL)


@pytest.mark.parametrize("size", [0, 20, 28])
def test_fewer_or_more_bytes_are_refused(size):
    with pytest.raises(InputError, match="for activations of 24"):
        decode(told(), bytes(size), (2, 3), URL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(InputError, match="NaN or infinite"):
        decode(told(), torch.full((2, 3), value).numpy().tobytes(), (2, 3), URL)


def test_packed_bytes_are_unpacked_no_further_than_their_shape():
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(STATES.numpy().tobytes())
    assert torch.equal(decode(told(compression="zstd"), packed, (2, 3), URL), STATES)
    bomb = zstandard.ZstdCompressor().compress(bytes(10**7))
    with pytest.raises(InputError, match="25 bytes or more for activations of 24"):
        decode(told(compression="zstd"), bomb, (2, 3), URL)
    with pytest.raises(InputError, match="cannot be unpacked"):
        decode(told(compression="zstd"), b"not packed at all", (2, 3), URL)
