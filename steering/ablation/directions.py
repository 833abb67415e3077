"""Directions to project out, from a recipe, a steering vector or a fitted probe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError
from reasonscope.data.storage.untrusted import parse_json, wrap_errors
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.steering.recipes.recipe import Recipe
from reasonscope.steering.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """What is projected out of the states at each site: the span of one or more directions.

    Attributes:
        basis: By site, orthonormal columns (d_model, direction).
        source: What they were read from, for tables and files.
    """

    basis: Mapping[Site, Values]
    source: str = ""

    @classmethod
    def of(cls, directions: Mapping[Site, list[Values]], *, source: str = "") -> "Directions":
        """Orthonormal directions with the same span. Raises InputError for a direction of length 0."""
        basis = {}
        for site, given in directions.items():
            if not all(np.linalg.norm(one) > 0 for one in given):
                raise InputError(f"{source or 'a vector'}: the direction at {site} has length 0")
            left, size, _ = np.linalg.svd(np.stack(given, axis=1).astype(np.float64), full_matrices=False)
            basis[site] = left[:, size > 1e-6 * size[0]]
        return cls(basis=basis, source=source)

    @classmethod
    def load(cls, path: str | Path) -> "Directions":
        """Those of a recipe, a steering vector or a probe that reasonscope saved. Raises InputError for any other file."""
        file = Path(path)
        kinds = _kinds(file)
        if "reasonscope.probe" in kinds:
            probe = LinearProbe.load(file)
            return cls.of({probe.site: [probe.direction]}, source=file.name)
        if "reasonscope.recipe" in kinds:
            found: dict[Site, list[Values]] = {}
            for part in Recipe.load(file).parts:
                for site, direction in part.vector.directions.items():
                    found.setdefault(site, []).append(np.asarray(direction, dtype=np.float64))
            if not found:
                raise InputError(f"{file} holds no vector, so there is nothing to project out")
            return cls.of(found, source=file.name)
        vector = SteeringVector.load(file)
        return cls.of(
            {site: [np.asarray(v, dtype=np.float64)] for site, v in vector.directions.items()}, source=file.name
        )

    def at(self, site: Site) -> "Directions":
        """All of them at one site. Raises InputError if they are of several sites, since these then differ."""
        if len(self.basis) != 1:
            raise InputError(
                f"{self.source} has directions at {len(self.basis)} sites; a site can be given for one only"
            )
        return replace(self, basis={site: next(iter(self.basis.values()))})

    def check(self, site: Site, width: int) -> None:
        """Raise InputError for states of another width than the direction's."""
        if (own := len(self.basis[site])) != width:
            raise InputError(
                f"{self.source or 'a direction'}: width {own} at {site}, but the states of this model are {width} wide; "
                "it was made from another model"
            )

    def describe(self) -> dict[str, Any]:
        """By site, the hash of the directions, as JSON."""
        return {
            str(site): sha256(np.ascontiguousarray(basis).tobytes()).hexdigest() for site, basis in self.basis.items()
        }


def _kinds(path: Path) -> set[str]:
    """The kinds of objects that the header of a safetensors file names; empty for another file."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the file of a recipe, a vector or a probe")
    with path.open("rb") as opened:
        start = opened.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > 100_000_000:
            return set()
        text = opened.read(size)
    with wrap_errors(path):
        header = parse_json(text, f"the header of {path}")
    about = header.get("__metadata__") if isinstance(header, dict) else None
    return set(about) if isinstance(about, dict) else set()
