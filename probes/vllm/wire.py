"""Tensors as vllm-lens sends them: raw bytes packed by zstd, with their dtype and shape in JSON. Nothing is believed before it fits."""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reasonscope.data.errors import InputError, MissingExtraError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64}


def encode(tensor: Tensor) -> dict[str, Any]:
    """A float32 tensor as vllm-lens reads it from JSON."""
    array = tensor.detach().float().cpu().contiguous().numpy()
    return {
        "data": base64.b64encode(array.tobytes()).decode(),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": list(array.shape),
        "compression": "none",
    }


def check_shape(told: Any, shape: Sequence[int], url: str) -> int:
    """The bytes of a tensor that the server describes as `told`. Raises InputError if it is not of `shape` and a dtype of floats."""
    if (
        not isinstance(told, Mapping)
        or told.get("shape") != list(shape)
        or told.get("compression") not in ("zstd", "none")
    ):
        raise InputError(
            f"{url} sent activations of {_described(told)}, and not of {list(shape)}, zstd; is it vllm-lens 1.3?"
        )
    return math.prod(shape) * _itemsize(told, url)


def decode(told: Mapping[str, Any], packed: bytes, shape: Sequence[int], url: str) -> Tensor:
    """The tensor of `shape` that `told` describes and `packed` holds.

    Raises InputError if the bytes are fewer or more than the shape needs, or a value is NaN or infinite.
    """
    size = check_shape(told, shape, url)
    raw = _unpacked(packed, size, url) if told["compression"] == "zstd" else packed
    if len(raw) != size:
        raise InputError(f"{url} sent {len(raw)} bytes or more for activations of {size}; ask it again")
    as_bits = told.get("original_dtype") == "torch.bfloat16"
    array = np.frombuffer(bytearray(raw), dtype=np.dtype("int16" if as_bits else told["dtype"])).reshape(shape)
    tensor = torch.from_numpy(array)
    tensor = tensor.view(torch.bfloat16) if as_bits else tensor.to(_DTYPES[str(told["dtype"])])
    if not tensor.isfinite().all():
        raise InputError(f"{url} sent activations that are NaN or infinite; serve the model in bfloat16 or float32")
    return tensor


def inline(told: Mapping[str, Any], url: str) -> bytes:
    """The bytes in the JSON itself."""
    try:
        return base64.b64decode(told["data"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{url} sent activations without a handle and without data") from error


def _itemsize(told: Mapping[str, Any], url: str) -> int:
    if told.get("original_dtype") == "torch.bfloat16" and told.get("dtype") == "int16":
        return 2
    if told.get("dtype") not in _DTYPES:
        raise InputError(
            f"{url} sent activations of dtype {told.get('dtype')!r:.40}; known are bfloat16, {', '.join(_DTYPES)}"
        )
    return np.dtype(str(told["dtype"])).itemsize


def _unpacked(packed: bytes, size: int, url: str) -> bytes:
    """At most one byte more than `size`, whatever the packed bytes would become."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError(f'vLLM needs zstandard ({error}): pip install "reasonscope[vllm]"') from error
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(packed) as reader:
            return bytes(reader.read(size + 1))
    except zstandard.ZstdError as error:
        raise InputError(f"{url} sent activations that cannot be unpacked: {error}") from error


def _described(told: Any) -> str:
    return (
        f"{told.get('shape')!r:.60}, {told.get('compression')!r:.20}" if isinstance(told, Mapping) else f"{told!r:.60}"
    )
