"""What an analysis hands out: numbers with named axes and units, and beside them what chance gives and how sure they are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.plain_json import plain
from reasonscope.data.storage.safetensors_file import SafetensorsFormat
from reasonscope.data.storage.untrusted import wrap_errors

_LONGEST_NAME = 200  # bytes of a file name, of the 255 that file systems take
_TEXTS = ("method", "quantity", "unit", "null_missing", "reason")
_KIND = SafetensorsFormat(
    key="reasonscope.result",
    noun="result",
    version=1,
    fields={**dict.fromkeys(_TEXTS, str), "axes": list, "bands": dict, "numbers": dict, "provenance": dict},
)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a result: its name (`trace step token sentence layer head metric …`) and a label for each place on it."""

    name: str
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, name: str, labels: Any) -> "Axis":
        """An axis labelled by the strings of `labels`, or 0 … n − 1 for a number n."""
        return cls(name=name, labels=tuple(map(str, range(labels) if isinstance(labels, int) else labels)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Band:
    """A range for each value: `low` and `high` of the shape of the values. `what` says what drew it and at which level."""

    low: Values
    high: Values
    what: str

    @classmethod
    def of(cls, low: ArrayLike, high: ArrayLike, shape: tuple[int, ...], what: str) -> "Band":
        """A band over values of `shape`, from ends that broadcast to it."""
        ends = [np.broadcast_to(np.asarray(end, dtype=np.float64), shape).copy() for end in (low, high)]
        return cls(low=ends[0], high=ends[1], what=what)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One measured quantity.

    `method` is the analysis (`mi_peaks`), `quantity` what the numbers are, `unit` theirs (`nats`, `tokens`; "1" for a ratio).
    `values` float64 have the shape of `axes`. `null` is what the same statistic gives by chance, `interval` how far the value is
    known; either is None where there is none, and `null_missing` or `reason` says why. A value that could not be measured is NaN,
    and `reason` says why: never a zero. `arrays` are further arrays by name, `numbers` JSON beside them (peaks, p-values, rates).
    `provenance` is JSON: run, trace, model, parameters, seed.

    Raises InputError for shapes that do not fit, infinite values, NaN without a reason, and for a null that is neither given nor
    excused.
    """

    method: str
    quantity: str
    unit: str
    axes: tuple[Axis, ...]
    values: Values
    null: Band | None = None
    null_missing: str = ""
    interval: Band | None = None
    reason: str = ""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(map(len, self.axes))
        object.__setattr__(self, "values", np.asarray(self.values, dtype=np.float64))
        named = {"values": self.values}
        for name, band in (("null", self.null), ("interval", self.interval)):
            named |= {} if band is None else {f"{name}.low": band.low, f"{name}.high": band.high}
        for name, array in named.items():
            if array.shape != shape:
                raise InputError(f"{self.method}: {name} of shape {array.shape}, but its axes are {shape}")
        if np.isinf(self.values).any():
            raise InputError(f"{self.method}: a value is infinite; look at the activations or logits it was made from")
        if not self.reason and (np.isnan(self.values).any() or not self.values.size):
            raise InputError(f"{self.method}: a value is missing, and no reason is given; set reason")
        if self.null is None and not (self.null_missing or self.reason):
            raise InputError(f"{self.method}: no null; give one, or say in null_missing why there is none")

    @property
    def measured(self) -> bool:
        """Whether any value is a number; where not, `reason` says why."""
        return bool(np.isfinite(self.values).any())

    def axis(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise InputError(f"{self.method} has no axis {name!r}; it has {', '.join(a.name for a in self.axes)}")

    def at(self, **labels: str) -> Values:
        """The values at the named labels of some axes, the other axes kept: `result.at(metric="resampling_kl")`."""
        chosen = tuple(
            _position(self.axis(a.name), labels[a.name]) if a.name in labels else slice(None) for a in self.axes
        )
        for name in labels:
            self.axis(name)
        return np.asarray(self.values[chosen], dtype=np.float64)

    def unit_of(self, label: str) -> str:
        """The unit of the line `label` of a result whose lines may differ in it: `numbers["units"]` says it by label, or `unit` does
        ("1 (accuracy), nats (kl), tokens"); "" for a bare number."""
        units = self.numbers.get("units")
        if isinstance(units, Mapping):
            return _spoken(str(units.get(label, "")))
        if ", " not in self.unit:
            return _spoken(self.unit)
        parts = (part.rstrip(")").partition(" (") for part in self.unit.split(", "))
        return next((_spoken(name) for name, _, key in parts if (key or name) in label), "")

    def with_provenance(self, **more: Any) -> "Result":
        return replace(self, provenance={**self.provenance, **more})

    def with_numbers(self, **more: Any) -> "Result":
        return replace(self, numbers={**self.numbers, **more})

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the arrays, and all else as JSON in its header. Raises StoreError."""
        target = Path(path)
        make_folder(target.parent)
        tensors: dict[str, NDArray[Any]] = {"values": self.values}
        for name, band in (("null", self.null), ("interval", self.interval)):
            tensors |= {} if band is None else {f"{name}.low": band.low, f"{name}.high": band.high}
        tensors |= {f"arrays.{name}": np.asarray(array) for name, array in self.arrays.items()}
        header = {
            "axes": [{"name": axis.name, "labels": axis.labels} for axis in self.axes],
            "bands": {n: b.what for n, b in (("null", self.null), ("interval", self.interval)) if b is not None},
            **{name: getattr(self, name) for name in ("method", "quantity", "unit", "null_missing", "reason")},
            "numbers": plain(self.numbers),
            "provenance": plain(self.provenance),
        }
        _KIND.write(target, header, tensors)
        return target

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read what `save` wrote. Raises InputError for any other file, and for one of a newer version."""
        header, tensors = _KIND.read(Path(path))
        with wrap_errors(path):
            return _read(tensors, header)


def undefined(*, method: str, quantity: str, unit: str, reason: str, axis: str = "value", **more: Any) -> Result:
    """A result that says why there is none: one NaN, and the reason."""
    return Result(
        method=method,
        quantity=quantity,
        unit=unit,
        axes=(Axis.of(axis, 1),),
        values=np.full(1, np.nan),
        reason=reason,
        **more,
    )


def result_path(folder: str | Path, method: str, trace: str = "all") -> Path:
    """Where the result of `method` on a trace (or on all) lies: `folder/method/trace.safetensors`."""
    return Path(folder) / method / f"{file_name(trace)}.safetensors"


def file_name(trace: str) -> str:
    """The id of a trace as the name of a file: slashes and what is not ASCII quoted, what is too long cut and told apart by its SHA-256."""
    name = quote(trace, safe=" ")
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{sha256(trace.encode()).hexdigest()[:16]}"


def load_results(folder: str | Path, method: str = "*") -> Iterator[Result]:
    """Every result that was saved below `folder`, in the order of methods and traces."""
    for path in sorted(Path(folder).glob(f"{method}/*.safetensors")):
        yield Result.load(path)


def _read(tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> Result:
    bands = {
        name: Band(low=tensors[f"{name}.low"], high=tensors[f"{name}.high"], what=what)
        for name, what in header["bands"].items()
    }
    return Result(
        axes=tuple(Axis.of(str(axis["name"]), list(axis["labels"])) for axis in header["axes"]),
        values=tensors["values"],
        null=bands.get("null"),
        interval=bands.get("interval"),
        arrays={name.removeprefix("arrays."): array for name, array in tensors.items() if name.startswith("arrays.")},
        numbers=header["numbers"],
        provenance=header["provenance"],
        **{name: header[name] for name in ("method", "quantity", "unit", "null_missing", "reason")},
    )


def _spoken(unit: str) -> str:
    return "" if unit == "1" else unit


def _position(axis: Axis, label: str) -> int:
    if label not in axis.labels:
        raise InputError(f"axis {axis.name} has no {label!r}; it has {', '.join(axis.labels[:20])}")
    return axis.labels.index(label)
