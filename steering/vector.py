"""A steering vector: a direction in the residual stream, with its site, its sign and where it came from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reasonscope.data.errors import InputError
from reasonscope.probes.sites import Site

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SteeringVector:
    """Directions by site, float32 (d_model,), in units of the residual stream (not normalised).

    Adding it (a positive multiplier) does what `method` names. `provenance` is JSON: model, data, counts, sign convention.
    """

    directions: Mapping[Site, NDArray[np.float32]]
    method: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.directions:
            raise InputError("a steering vector needs at least one direction")
        widths = {direction.shape for direction in self.directions.values()}
        if len(widths) != 1 or len(next(iter(widths))) != 1:
            raise InputError(f"directions of shapes {sorted(widths)}: each is one vector, all of the model's width")
        if not all(np.isfinite(direction).all() for direction in self.directions.values()):
            raise InputError("a direction holds NaN or infinity; look at the activations that it was made from")
        if len({site.layer for site in self.directions}) != len(self.directions):
            raise InputError("two directions at one layer; keep them in vectors of their own")

    @property
    def norms(self) -> dict[Site, float]:
        return {site: float(np.linalg.norm(direction)) for site, direction in self.directions.items()}

    def __mul__(self, factor: float) -> "SteeringVector":
        scaled = {site: (direction * factor).astype(np.float32) for site, direction in self.directions.items()}
        return replace(self, directions=scaled)

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def random_like(self, seed: int) -> "SteeringVector":
        """The control: a direction drawn evenly from the sphere, at each site, with this vector's norm there."""
        rng = np.random.default_rng(seed)
        drawn = {}
        for site, norm in self.norms.items():
            direction = rng.standard_normal(len(self.directions[site]))
            drawn[site] = (direction * (norm / np.linalg.norm(direction))).astype(np.float32)
        return SteeringVector(directions=drawn, method="random", provenance={"like": self.method, "seed": seed})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: `direction.{layer}` float32, the rest as JSON in its header."""
        points = {str(site.layer): site.point for site in self.directions}
        header = {
            "version": FORMAT_VERSION,
            "method": self.method,
            "points": points,
            "provenance": dict(self.provenance),
        }
        tensors = {f"direction.{site.layer}": direction for site, direction in self.directions.items()}
        save_file(tensors, path, metadata={"reasonscope.vector": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read what `save` wrote. Raises InputError for any other file."""
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("reasonscope.vector", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise InputError(f"{path} is no steering vector: {error}") from error
        if header is None:
            raise InputError(f"{path} is a safetensors file, but no steering vector of reasonscope")
        if header["version"] > FORMAT_VERSION:
            raise InputError(
                f"{path} has version {header['version']}, newer than {FORMAT_VERSION}; upgrade reasonscope"
            )
        directions = {
            Site(point, int(layer)): tensors[f"direction.{layer}"] for layer, point in header["points"].items()
        }
        return cls(directions=directions, method=header["method"], provenance=header["provenance"])
