"""The result of an analysis: numbers with named axes and units, together with what chance gives and how sure they
are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reasonscope.data.arrays import Values, plain
from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.safetensors_file import SafetensorsFormat
from reasonscope.data.storage.untrusted import wrap_errors

_LONGEST_NAME = 200  # bytes of a file name; file systems allow 255
_TEXTS = ("method", "quantity", "unit", "null_missing", "reason")
_KIND = SafetensorsFormat(
    key="reasonscope.result",
    noun="result",
    version=1,
    fields={**dict.fromkeys(_TEXTS, str), "axes": list, "bands": dict, "numbers": dict, "provenance": dict},
)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a result.

    Attributes:
        name: What it runs over: trace, step, token, sentence, layer, head, metric …
        labels: A label for each position on it.

    Example:
        axis = rs.analysis.Axis.of("layer", 4)
        axis.labels  # ("0", "1", "2", "3")
        len(axis)
    """

    name: str
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, name: str, labels: Any) -> "Axis":
        """An axis with the strings of `labels`, or with 0 … n − 1 for a number n."""
        return cls(name=name, labels=tuple(map(str, range(labels) if isinstance(labels, int) else labels)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Band:
    """A range for each value of a result.

    Attributes:
        low: Lower ends, of the shape of the values.
        high: Upper ends, of the shape of the values.
        what: What was drawn, and the level.

    Example:
        result = rs.analyse("entropy", "runs/mine")[0]
        result.null.what
        outside = (result.values < result.null.low) | (result.values > result.null.high)
    """

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
    """One measured quantity, with its null and its interval.

    A value that could not be measured is NaN, never zero, and `reason` says why.

    Attributes:
        method: The analysis, such as "mi".
        quantity: What the numbers are.
        unit: Their unit, such as "nats" or "tokens"; "1" for a ratio.
        axes: The axes of `values`, in order.
        values: float64, of the shape of `axes`.
        null: What the same statistic gives by chance, or None.
        null_missing: Why the null is missing.
        interval: How precisely the values are known, or None.
        reason: Why values are NaN, or why the interval is missing.
        arrays: Further arrays by name.
        numbers: Further numbers in JSON: peaks, p-values, rates.
        provenance: In JSON: run, trace, model, parameters, seed.

    Raises:
        InputError: For shapes that do not fit, infinite values, NaN without a reason, or a null that is neither given
            nor excused.

    Example:
        result = rs.analyse("entropy", "runs/mine")[0]
        result.axis("token").labels
        result.save("entropy.safetensors")
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
            raise InputError(f"{self.method}: a value is NaN without a reason; set reason")
        if self.null is None and not (self.null_missing or self.reason):
            raise InputError(f"{self.method}: the null is missing; give one, or say in null_missing why not")

    @property
    def measured(self) -> bool:
        """Whether any value is a number; otherwise `reason` says why not."""
        return bool(np.isfinite(self.values).any())

    def axis(self, name: str) -> Axis:
        """The axis called `name`. Raises InputError if the result has no such axis."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise InputError(f"{self.method} has no axis {name!r}; it has {', '.join(a.name for a in self.axes)}")

    def at(self, **labels: str) -> Values:
        """The values at the given labels of some axes, with the other axes kept:
        `result.at(metric="resampling_kl")`."""
        chosen = tuple(
            _position(self.axis(a.name), labels[a.name]) if a.name in labels else slice(None) for a in self.axes
        )
        for name in labels:
            self.axis(name)
        return np.asarray(self.values[chosen], dtype=np.float64)

    def unit_of(self, label: str) -> str:
        """The unit of the line `label` of a result whose lines have different units.

        `numbers["units"]` gives it by label, or else `unit` does ("1 (accuracy), nats (kl), tokens"); "" for a plain
        number.
        """
        units = self.numbers.get("units")
        if isinstance(units, Mapping):
            return _spoken(str(units.get(label, "")))
        if ", " not in self.unit:
            return _spoken(self.unit)
        parts = (part.rstrip(")").partition(" (") for part in self.unit.split(", "))
        return next((_spoken(name) for name, _, key in parts if (key or name) in label), "")

    def with_provenance(self, **more: Any) -> "Result":
        """The same result with further entries in its provenance."""
        return replace(self, provenance={**self.provenance, **more})

    def with_numbers(self, **more: Any) -> "Result":
        """The same result with further numbers."""
        return replace(self, numbers={**self.numbers, **more})

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the arrays, and everything else as JSON in its header. Raises StoreError."""
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
        """Read a file that `save` wrote. Raises InputError for any other file, and for one of a newer version."""
        header, tensors = _KIND.read(Path(path))
        with wrap_errors(path):
            return _read(tensors, header)


def undefined(*, method: str, quantity: str, unit: str, reason: str, axis: str = "value", **more: Any) -> Result:
    """A result that could not be measured: a single NaN, with the reason."""
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
    """The file of the result of `method` on a trace (or on all): `folder/method/trace.safetensors`."""
    return Path(folder) / method / f"{file_name(trace)}.safetensors"


def file_name(trace: str) -> str:
    """The id of a trace as a file name: slashes and non-ASCII characters are quoted, and a long name is cut and made
    unique by its SHA-256."""
    name = quote(trace, safe=" ")
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{sha256(trace.encode()).hexdigest()[:16]}"


def load_results(folder: str | Path, method: str = "*") -> Iterator[Result]:
    """Every result saved below `folder`, in the order of methods and traces."""
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
