"""Names of places in a model: `resid_post.12`, `z.3`, `attn_probs.0` (the strings of interp-engine and Neuronpedia)."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from reasonscope.data.errors import SiteError

Point = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "attn_probs", "router"]
POINTS: tuple[Point, ...] = get_args(Point)

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "z",
    "attn.hook_pattern": "attn_probs",
}


@dataclass(frozen=True, order=True)
class Site:
    """A point of one block; `layer` counts blocks from 0.

    | point | what | shape |
    |---|---|---|
    | `resid_pre` | the residual stream entering the block; Hugging Face `hidden_states[layer]` | batch token d_model |
    | `resid_post` | leaving it; `hidden_states[layer + 1]` (there, the last is post-norm) | batch token d_model |
    | `attn_out`, `mlp_out` | what is ADDED to the stream (behind post-norms: Gemma, OLMo 2) | batch token d_model |
    | `z` | what each head hands to the output projection | batch token head d_head |
    | `attn_probs` | attention of query on key (eager attention; without the column of a sink) | batch head query key |
    | `router` | the router's logits | batch token expert |
    """

    point: Point
    layer: int

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise SiteError(f"no site is called {self.point!r}; there are {', '.join(POINTS)}")
        if self.layer < 0:
            raise SiteError(f"layer {self.layer} of {self.point} is negative; layers count from 0")

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"

    @classmethod
    def parse(cls, name: "str | Site") -> "Site":
        """Read `resid_post.12`, or a TransformerLens name (`blocks.12.hook_resid_post`). Raises SiteError."""
        if isinstance(name, Site):
            return name
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            point = _TRANSFORMER_LENS.get(match[2], match[2])
            return cls(point, int(match[1]))  # type: ignore[arg-type]  # __post_init__ refuses what is no Point
        match = re.fullmatch(r"([a-z_]+)\.(\d+)", name)
        if match is None:
            raise SiteError(f"{name!r} is no site; write point.layer, as resid_post.12 (points: {', '.join(POINTS)})")
        return cls(match[1], int(match[2]))  # type: ignore[arg-type]  # likewise


def expand_sites(pattern: str, n_layers: int) -> tuple[Site, ...]:
    """Read a comma-separated list of sites where a layer may be `*` or a range: `resid_post.*`, `z.2-4,attn_out.0`.

    Raises SiteError for an unknown point or a layer outside the model's `n_layers`.
    """
    sites: list[Site] = []
    for item in filter(None, (part.strip() for part in pattern.split(","))):
        match = re.fullmatch(r"(.+)\.(\*|(\d+)-(\d+))", item)
        if match is None:
            sites.append(Site.parse(item))
        else:
            layers = range(n_layers) if match[2] == "*" else range(int(match[3]), int(match[4]) + 1)
            sites += [Site.parse(f"{match[1]}.{layer}") for layer in layers]
    for site in sites:
        if site.layer >= n_layers:
            raise SiteError(f"{site}: the model has {n_layers} layers, so the last is {site.point}.{n_layers - 1}")
    if not sites:
        raise SiteError("no site was named; write for instance resid_post.*")
    return tuple(dict.fromkeys(sites))
