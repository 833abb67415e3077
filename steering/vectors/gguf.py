"""GGUF control vectors, the format of llama.cpp, repeng and EasySteer: `direction.k` is added to the output of block k.

All three count blocks from 0, so `direction.k` is `resid_post.k`, which is `resid_pre.k+1`. llama.cpp cannot change the output of the first
block and refuses `direction.0`. It reads only one-dimensional float32 tensors; repeng needs `controlvector.model_hint`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.data.errors import InputError, MissingExtraError
from reasonscope.data.storage.safetensors_file import SafetensorsFormat
from reasonscope.data.storage.untrusted import parse_json, wrap_errors
from reasonscope.probes.architecture.sites import Site

MAGIC = b"GGUF"
_ARCHITECTURE = "controlvector"
_OURS = "reasonscope.vector"
# What both formats keep of a vector besides its directions.
GGUF_FORMAT = SafetensorsFormat(
    key=_OURS,
    noun="steering vector",
    version=1,
    fields={"method": str, "norm": str, "sign": str, "points": dict, "provenance": dict},
)


def write_gguf(
    path: Path, directions: Mapping[Site, NDArray[np.float32]], header: Mapping[str, Any], hint: str
) -> None:
    """Write `directions` of the residual stream, with `header` as JSON; `hint` is the model type (`qwen2`).

    Raises InputError for a site that the format cannot name, MissingExtraError without the package gguf.
    """
    named = {_block(site): direction for site, direction in directions.items()}
    writer = _gguf().GGUFWriter(path, _ARCHITECTURE)
    writer.add_string(f"{_ARCHITECTURE}.model_hint", hint)
    writer.add_string(f"{_ARCHITECTURE}.method", str(header["method"]))
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(named))
    writer.add_string(_OURS, json.dumps(header))
    for block, direction in sorted(named.items()):
        writer.add_tensor(f"direction.{block}", np.ascontiguousarray(direction, dtype=np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()  # also on a full disk


def read_gguf(path: Path) -> tuple[dict[Site, NDArray[np.float32]], dict[str, Any]]:
    """The directions by site, and our header; for a file of another program, the `method` and `provenance` that it tells.

    Raises InputError for a file that is not a control vector, MissingExtraError without the package gguf.
    """
    gguf = _gguf()
    with wrap_errors(path), np.errstate(over="ignore"):
        return _parts(path, _reader(gguf)(path))


def _reader(gguf: Any) -> Any:
    """The library's reader, with a check that values lie within the file: a damaged count would make it loop for hours."""

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # of a library without types
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"it claims {int(count)} values at byte {int(offset)}, past its end")
            return super()._get(offset, dtype, count, override_order)

    return Reader


def _parts(path: Path, reader: Any) -> tuple[dict[Site, NDArray[np.float32]], dict[str, Any]]:
    if (kind := _field(reader, "general.architecture")) != _ARCHITECTURE:
        raise InputError(
            f"{path} is a GGUF file of {kind!r}, not a control vector; give one that holds directions to steer with"
        )
    directions = {Site("resid_post", _number(path, tensor.name)): _values(path, tensor) for tensor in reader.tensors}
    ours = _field(reader, _OURS)
    if ours is not None:
        header = parse_json(ours, f"the header of {path}")
        if not isinstance(header, dict):
            raise InputError(f"{path}: its header is not a JSON object; save the vector again")
        GGUF_FORMAT.check(path, header)
        sites = (Site(point, int(layer)) for layer, point in header["points"].items())
        return {site: directions[Site("resid_post", _block(site))] for site in sites}, header
    hint, method = _field(reader, f"{_ARCHITECTURE}.model_hint"), _field(reader, f"{_ARCHITECTURE}.method")
    provenance = {"file": path.name, **({"model": {"architecture": hint}} if hint else {})}
    return directions, {"method": method or "control vector", "provenance": provenance}


def _block(site: Site) -> int:
    """The block that writes to the site."""
    block = {"resid_post": site.layer, "resid_pre": site.layer - 1}.get(site.point)
    if block is None or block < 1:
        raise InputError(
            f"{site}: a GGUF control vector acts on the output of block 1 or later (resid_post.1, resid_pre.2 …); "
            "save it as .safetensors, or leave that site out"
        )
    return block


def _number(path: Path, name: str) -> int:
    word, _, number = name.partition(".")
    if word != "direction" or not number.isdecimal():
        raise InputError(f"{path} holds a tensor {name!r}; a control vector has direction.1, direction.2 …")
    return int(number)


def _values(path: Path, tensor: Any) -> NDArray[np.float32]:
    if tensor.tensor_type.name not in ("F32", "F16"):
        raise InputError(f"{path}: {tensor.name} is {tensor.tensor_type.name}; float32 or float16 is needed")
    return np.array(tensor.data, dtype=np.float32)  # a copy, since the reader maps the file


def _field(reader: Any, name: str) -> str | None:
    field = reader.get_field(name)
    return None if field is None else bytes(field.parts[-1]).decode("utf-8", errors="replace")


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            f'GGUF files need the package gguf ({error}): pip install "reasonscope[gguf]"'
        ) from error
    return gguf
