"""Dictionaries of a residual stream (sparse autoencoders) by file: what some of their latents write into a state."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from reasonscope.data.errors import InputError
from reasonscope.data.storage.durable import sha256_of
from reasonscope.data.storage.untrusted import wrap_errors
from reasonscope.probes.architecture.sites import Site

_NEEDED = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True, kw_only=True, eq=False)
class Dictionary:
    """A sparse autoencoder in the layout of SAELens: latents = act(state · W_enc + b_enc), state ≈ latents · W_dec + b_dec.

    Attributes:
        w_enc: (d_model, latent).
        b_enc: (latent,).
        w_dec: (latent, d_model).
        b_dec: (d_model,).
        threshold: (latent,) for a JumpReLU: a latent at or below it is 0. None is ReLU.
        top: Only this many latents of a token stay, for a TopK autoencoder; None keeps all.
        centred: Whether `b_dec` is taken off a state before it is encoded.
        sha256: The hash of its file.
    """

    w_enc: NDArray[np.float32]
    b_enc: NDArray[np.float32]
    w_dec: NDArray[np.float32]
    b_dec: NDArray[np.float32]
    threshold: NDArray[np.float32] | None = None
    top: int | None = None
    centred: bool = False
    sha256: str = ""

    def __post_init__(self) -> None:
        d_model, n = self.w_enc.shape if self.w_enc.ndim == 2 else (0, 0)
        wanted = {"b_enc": (n,), "w_dec": (n, d_model), "b_dec": (d_model,)}
        wanted |= {} if self.threshold is None else {"threshold": (n,)}
        for name, shape in wanted.items():
            if (found := getattr(self, name).shape) != shape or not n:
                raise InputError(
                    f"a dictionary with W_enc of shape {self.w_enc.shape} and {name} of shape {found}; "
                    "W_enc has to be (d_model, latent), W_dec (latent, d_model), b_enc (latent,) and b_dec (d_model,)"
                )

    def __len__(self) -> int:
        return len(self.b_enc)

    @property
    def width(self) -> int:
        """The width of the states that it was made for."""
        return len(self.b_dec)

    @classmethod
    def load(cls, path: str | Path, *, top: int | None = None) -> Self:
        """Read the weights that SAELens writes (`sae_weights.safetensors`), with `cfg.json` beside them if it is there.

        Raises InputError for any other file, for weights whose shapes do not fit together, and for NaN.
        """
        file = Path(path)
        if not file.is_file():
            raise InputError(f"{file} does not exist; give the safetensors file of a dictionary")
        with wrap_errors(f"{file} is not a dictionary: it"), safe_open(file, framework="numpy") as opened:
            tensors = {name: np.asarray(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 - not a dict
        if missing := [name for name in _NEEDED if name not in tensors]:
            raise InputError(
                f"{file} has no {', '.join(missing)}; a dictionary is a safetensors file with {', '.join(_NEEDED)}, as SAELens writes it"
            )
        if not all(np.isfinite(tensors[name]).all() for name in _NEEDED):
            raise InputError(f"{file} holds NaN or infinity; download or train the dictionary again")
        known = _settings(file.with_name("cfg.json"))
        given = {name: tensors[name].astype(np.float32) for name in (*_NEEDED, "threshold") if name in tensors}
        return cls(
            **{name.lower(): array for name, array in given.items()},
            top=top or known.get("k"),
            centred=bool(known.get("apply_b_dec_to_input", False)),
            sha256=sha256_of(file),
        )

    def latents(self, states: Tensor) -> Tensor:
        """The latents (row, latent) of states (row, d_model), in their dtype."""
        centre = self._of("b_dec", states) if self.centred else 0
        found = (states - centre) @ self._of("w_enc", states) + self._of("b_enc", states)
        if self.threshold is not None:
            return torch.where(found > self._of("threshold", states), found, 0)
        found = found.relu()
        if self.top is None or self.top >= len(self):
            return found
        kept = found.topk(self.top, dim=-1)
        return torch.zeros_like(found).scatter(-1, kept.indices, kept.values)

    def written(self, latents: Tensor, chosen: Sequence[int]) -> Tensor:
        """What the latents `chosen` (row, chosen) write: (row, d_model)."""
        return latents @ self._of("w_dec", latents)[list(chosen)]

    def _of(self, name: str, like: Tensor) -> Tensor:
        return torch.from_numpy(getattr(self, name)).to(like)


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """Some latents of a dictionary, at the site whose states it reads."""

    dictionary: Dictionary
    site: Site
    chosen: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.chosen:
            raise InputError("no latent is named; give at least one, such as chosen: [17]")
        if foreign := [one for one in self.chosen if not 0 <= one < len(self.dictionary)]:
            raise InputError(f"latent {foreign[0]}: this dictionary has latents 0 to {len(self.dictionary) - 1}")

    def instead(self, others: Sequence[int]) -> "Latents":
        """Other latents of the same dictionary."""
        return replace(self, chosen=tuple(sorted(others)))

    def describe(self) -> dict[str, Any]:
        """The file's hash, the site and the latents, as JSON."""
        about = {"sha256": self.dictionary.sha256, "top": self.dictionary.top}
        return {**about, "site": str(self.site), "chosen": list(self.chosen)}


def _settings(path: Path) -> dict[str, Any]:
    """What `cfg.json` says; empty if it does not exist or cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
