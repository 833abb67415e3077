"""A steering vector: directions in the residual stream, with their sites, norms, sign and origin."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from reasonscope.data.arrays import Values
from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.storage.durable import write_durably
from reasonscope.data.storage.untrusted import wrap_errors
from reasonscope.probes.architecture.identity import differences
from reasonscope.probes.architecture.sites import Point, Site
from reasonscope.probes.models.model import Model
from reasonscope.steering.vectors.gguf import GGUF_FORMAT, MAGIC, read_gguf, write_gguf
from reasonscope.steering.vectors.intervention import Steering
from reasonscope.steering.vectors.operators import Operator, add
from reasonscope.steering.vectors.patching import PatchHandle, patch, patched
from reasonscope.steering.vectors.scope import Scope

# Points whose states are as wide as the residual stream.
_POINTS: tuple[Point, ...] = ("resid_pre", "resid_post", "attn_out", "mlp_out")

# Entries of `provenance`: by site, the mean projections of the two classes on the direction.
LEARNED = ("groups", "groups_incomplete")  # what a provenance says about what was learned from
_LEVELS = ("towards", "away")


@dataclass(frozen=True, kw_only=True)
class SteeringVector:
    """Directions by site, at most one per layer.

    Vectors can be added, subtracted and multiplied by a number.

    Attributes:
        directions: By site, float32 (d_model,).
        method: How it was extracted.
        norm: `raw` directions are in units of the residual stream, `unit` ones have length 1.
        sign: In words, what adding it (a positive multiplier) does.
        provenance: JSON: `model` (a fingerprint), `groups` (the problems that it was made from), counts, mean projections.

    Raises:
        InputError: Without directions, for directions of several widths, with NaN, two at one layer, or `unit` ones of another length.
        SiteError: For a site whose states are not as wide as the residual stream.

    Example:
        vector = extract("seal", store, model)[0].vector
        with vector.apply(model, multiplier=0.5):
            model.hf.generate(ids, max_new_tokens=50)
    """

    directions: Mapping[Site, NDArray[np.float32]]
    method: str
    norm: Literal["raw", "unit"] = "raw"
    sign: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.directions:
            raise InputError("a steering vector needs at least one direction")
        widths = {direction.shape for direction in self.directions.values()}
        if len(widths) != 1 or len(next(iter(widths))) != 1:
            raise InputError(f"directions of shapes {sorted(widths)}; give vectors (d_model,) of one model")
        if not all(np.isfinite(direction).all() for direction in self.directions.values()):
            raise InputError("a direction holds NaN or infinity; look at the activations that it was made from")
        if len({site.layer for site in self.directions}) != len(self.directions):
            raise InputError("two directions at one layer; put them into separate vectors")
        if foreign := [str(site) for site in self.directions if site.point not in _POINTS]:
            raise SiteError(
                f"{foreign[0]} is not as wide as the residual stream; a vector acts at {', '.join(_POINTS)}"
            )
        if self.norm == "unit" and (off := [n for n in self.norms.values() if abs(n - 1) > 1e-3]):
            raise InputError(f"a direction of norm {off[0]:.4g} in a vector with norm='unit'; use norm='raw'")

    @property
    def norms(self) -> dict[Site, float]:
        """The length of each direction."""
        return {site: float(np.linalg.norm(direction)) for site, direction in self.directions.items()}

    @property
    def width(self) -> int:
        """The width of the residual stream that it was made for."""
        return len(next(iter(self.directions.values())))

    def normalised(self) -> "SteeringVector":
        """The same directions at length 1. Raises InputError for one of length 0."""
        if 0.0 in self.norms.values():
            raise InputError(
                f"a direction of {self.method} has length 0 and cannot be normalised; extract it from classes that differ"
            )
        unit = {site: (self.directions[site] / norm).astype(np.float32) for site, norm in self.norms.items()}
        return replace(self, directions=unit, norm="unit")

    def __mul__(self, factor: float) -> "SteeringVector":
        """Scale the directions. A negative factor drops the words of `sign` and negates the mean projections of the two classes."""
        scaled = self._with(lambda site: self.directions[site] * factor)
        if factor >= 0:
            return scaled
        turned = {
            side: {site: -level for site, level in self.provenance[side].items()}
            for side in _LEVELS
            if side in self.provenance
        }
        return replace(scaled, sign="", provenance={**self.provenance, **turned})

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """Add directions site by site. Raises InputError for another width, SiteError for other sites."""
        self._check_like(other)
        summed = self._with(lambda site: self.directions[site] + other.directions[site])
        parts = [dict(vector.provenance) for vector in (self, other)]
        same = {key: value for key, value in parts[0].items() if key not in _LEVELS and parts[1].get(key) == value}
        about = {**same, "sum_of": [self.method, other.method], **learned_groups(parts)}
        return replace(summed, method=f"{self.method} + {other.method}", sign="", provenance=about)

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self + (-other)

    def random_like(self, seed: int, *, states: Mapping[Site, NDArray[Any]] | None = None) -> "SteeringVector":
        """The control: random directions with this vector's norms, and at several sites with its mutual cosines.

        Args:
            seed: Seed of the draw.
            states: (row, d_model) by site. If given, directions are drawn from the normal distribution with the covariance of the states,
                with the same weights of rows at each site: the stream is far from isotropic, and states
                hardly vary along most isotropic directions. Otherwise one random rotation turns the directions of all sites together.

        Returns:
            A vector of method `random` at the same sites.

        Raises:
            SiteError: If a site has no states.
            InputError: If the states do not vary.
        """
        if states is None:
            true = np.stack(list(self.directions.values())).astype(np.float64)
            turned = rotated_together(true, np.random.default_rng(seed))
            drawn = {site: turned[i].astype(np.float32) for i, site in enumerate(self.directions)}
        elif missing := [site for site in self.directions if site not in states]:
            raise SiteError(
                f"no states of {missing[0]} to draw from; give those of {', '.join(map(str, self.directions))}"
            )
        else:
            drawn = {site: covariance_matched(states[site], norm=norm, seed=seed) for site, norm in self.norms.items()}
        return self.as_random(drawn, seed=seed, matched="norm and cosines" if states is None else "norm and covariance")

    def as_random(self, drawn: Mapping[Site, NDArray[np.float32]], *, seed: int, matched: str) -> "SteeringVector":
        """A control of this vector with the directions `drawn`; its provenance says what it imitates and what was matched."""
        about = {"like": self.method, "seed": seed, "matched": matched}
        kept = {key: self.provenance[key] for key in ("model", *LEARNED) if key in self.provenance}
        return SteeringVector(directions=drawn, method="random", norm=self.norm, provenance={**about, **kept})

    def check(self, model: Model) -> None:
        """Raise InputError if the model has another width or is not the one that the vector was made from, SiteError if it lacks a layer.

        A vector that does not say which model it was made from fits any model of its width.
        """
        if self.width != model.d_model:
            raise InputError(
                f"a vector of width {self.width} for {model.name}, whose width is {model.d_model}; use one that was made from this model"
            )
        for site in self.directions:
            model.layout.module(model.hf, site)
        if not (there := self.provenance.get("model") or {}):
            return
        if differs := differences(there, model.fingerprint, ("architecture", "weights")):
            raise InputError(
                f"the vector was made from {there.get('name', there.get('architecture'))!r}, which differs in {' and '.join(differs)} "
                f"from {model.name!r}; extract it again, or use vector.for_any_model()"
            )

    def for_any_model(self) -> "SteeringVector":
        """The same vector, to be tried on a model that it was not made from."""
        about = {key: value for key, value in self.provenance.items() if key != "model"}
        return replace(self, provenance={**about, "made_from": self.provenance.get("model")})

    def apply(
        self, model: Model, *, multiplier: float = 1.0, scope: Scope | None = None, operator: Operator = add
    ) -> AbstractContextManager[PatchHandle]:
        """Steer your own calls of `model.hf` inside the block, `hf.generate` included; see `patch`.

        By default every token is edited. Raises InputError for a vector that does not fit, and at the end of the block if no token was
        edited.
        """
        self.check(model)
        steering = Steering(self, multiplier, scope or Scope(), operator=operator)
        return patched(model, steering, name=self.method)

    def patch_activations(
        self, model: Model, *, multiplier: float = 1.0, scope: Scope | None = None, operator: Operator = add
    ) -> PatchHandle:
        """As `apply`, until `remove` of the handle is called; its `n_edited` counts the edited tokens."""
        self.check(model)
        return patch(model, Steering(self, multiplier, scope or Scope(), operator=operator))

    def save(self, path: str | Path) -> None:
        """Write one file: a GGUF control vector for a path ending in `.gguf`, else safetensors.

        Directions are float32 tensors `direction.{layer}`, everything else is JSON in the header. Raises StoreError if it cannot be
        written, InputError for a site that GGUF cannot name.
        """
        header = {
            "method": self.method,
            "norm": self.norm,
            "sign": self.sign,
            "points": {str(site.layer): site.point for site in self.directions},
            "provenance": dict(self.provenance),
        }
        if Path(path).suffix == ".gguf":
            model = self.provenance.get("model") or {}
            about, hint = {"version": GGUF_FORMAT.version, **header}, model.get("architecture", "unknown")
            write_durably(Path(path), lambda file: write_gguf(file, self.directions, about, hint))
            return
        GGUF_FORMAT.write(Path(path), header, {f"direction.{site.layer}": d for site, d in self.directions.items()})

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read what `save` wrote, or a GGUF control vector of llama.cpp, repeng or EasySteer.

        Raises InputError for any other file; it never opens a pickle.
        """
        path = Path(path)
        directions, header = _read(path)
        known = {key: header[key] for key in ("method", "norm", "sign", "provenance") if key in header}
        return cls(directions=directions, **known)

    def _with(self, value: Callable[[Site], NDArray[Any]]) -> "SteeringVector":
        changed = {site: value(site).astype(np.float32) for site in self.directions}
        kept = all(abs(float(np.linalg.norm(direction)) - 1) <= 1e-3 for direction in changed.values())
        return replace(self, directions=changed, norm=self.norm if kept else "raw")

    def _check_like(self, other: "SteeringVector") -> None:
        if self.width != other.width:
            raise InputError(
                f"vectors of width {self.width} and {other.width} cannot be added; use vectors of one model"
            )
        if self.directions.keys() != other.directions.keys():
            ours, theirs = (", ".join(map(str, sorted(v.directions))) for v in (self, other))
            raise SiteError(f"vectors at {ours} and at {theirs} cannot be added; apply them together with Composed")


def learned_groups(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The `groups` of problems that any of these provenances names; `groups_incomplete` if one of them names none."""
    every = list(sources)
    known = [one for one in every if "groups" in one]
    if not known:
        return {}
    incomplete = len(known) < len(every) or any(one.get("groups_incomplete") for one in known)
    groups = sorted({group for one in known for group in one["groups"]})
    return {"groups": groups, **({"groups_incomplete": True} if incomplete else {})}


def rotated_together(directions: Values, rng: np.random.Generator) -> Values:
    """`directions` (row, d_model) after one uniformly random rotation, which keeps every norm and every cosine between them."""
    basis, coordinates = np.linalg.qr(directions.T)
    drawn, upper = np.linalg.qr(rng.standard_normal(basis.shape))
    return np.asarray((drawn * np.sign(np.diag(upper))) @ coordinates).T


def covariance_matched(
    states: NDArray[np.floating], *, norm: float, seed: int | np.random.Generator
) -> NDArray[np.float32]:
    """A random direction drawn from the covariance of `states` (row, d_model) and scaled to `norm`: (d_model,) float32.

    A sum of the centred rows with normal weights has their covariance, without a d_model × d_model matrix. It is the stricter control:
    activations hardly vary along an isotropic direction. Raises InputError for fewer than 2 different rows or NaN.
    """
    centred = states.astype(np.float64) - states.mean(axis=0, dtype=np.float64)
    drawn = np.random.default_rng(seed).standard_normal(len(states)) @ centred
    if not 0 < (length := float(np.linalg.norm(drawn))) < np.inf:
        raise InputError(
            f"{len(states)} activations that do not vary or hold NaN; give at least 2 different rows of finite numbers"
        )
    return np.asarray(drawn * (norm / length), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class CosineTable:
    """Cosines between vectors.

    Attributes:
        names: The vectors.
        sites: The sites.
        cosines: (site, vector, vector); NaN if one of the two has no direction at the site.
        chance: The absolute cosine that 5 % of pairs of random directions of this width exceed.
    """

    names: tuple[str, ...]
    sites: tuple[Site, ...]
    cosines: NDArray[np.float64]
    chance: float


def cosine_table(vectors: Mapping[str, SteeringVector]) -> CosineTable:
    """Cosines between vectors, at each site that any of them has.

    Args:
        vectors: Vectors of one model, by name.

    Returns:
        The cosines by site, and what random directions of this width reach.

    Raises:
        InputError: Without vectors, for several widths, or for a direction of length 0.

    Example:
        table = cosine_table({"seal": seal, "asc": asc})
        print(table.sites, table.cosines[:, 0, 1])
        print("random directions stay below", table.chance)
    """
    widths = {vector.width for vector in vectors.values()}
    if len(widths) != 1:
        raise InputError(f"vectors of widths {sorted(widths)}; compare vectors of one model")
    named = {site for vector in vectors.values() for site in vector.directions}
    sites = tuple(sorted(named, key=lambda site: (site.layer, site.point)))
    table = np.full((len(sites), len(vectors), widths.pop()), np.nan)
    for column, vector in enumerate(vectors.values()):
        for site, direction in vector.normalised().directions.items():
            table[sites.index(site), column] = direction
    # The square of a cosine between random directions follows this distribution.
    chance = float(np.sqrt(beta.ppf(0.95, 0.5, (table.shape[-1] - 1) / 2)))
    cosines = np.einsum("svd,swd->svw", table, table)
    return CosineTable(names=tuple(vectors), sites=sites, cosines=cosines, chance=chance)


def _read(path: Path) -> tuple[Mapping[Site, NDArray[np.float32]], Mapping[str, Any]]:
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise InputError(f"cannot read the steering vector {path}: {error}") from error
    if start == MAGIC:
        return read_gguf(path)
    header, tensors = GGUF_FORMAT.read(path)
    with wrap_errors(path):
        return {Site(p, int(layer)): tensors[f"direction.{layer}"] for layer, p in header["points"].items()}, header
