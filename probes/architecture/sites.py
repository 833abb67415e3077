"""Sites: names for places in a model, such as `resid_post.12`, `z.3` and `attn_probs.0`, as interp-engine and Neuronpedia write them."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from reasonscope.data.errors import SiteError

Point = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mixer_out", "mlp_out", "z", "attn_probs", "router", "q", "k", "v", "mlp_post",
    "embed",
]  # fmt: skip
POINTS: tuple[Point, ...] = get_args(Point)

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
    "hook_resid_mid": "resid_mid",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_pattern": "attn_probs",
    "mlp.hook_post": "mlp_post",
}


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model where activations can be read and written: a point of one block.

    | point | what it holds | shape |
    |---|---|---|
    | `resid_pre` | the residual stream entering the block; Hugging Face `hidden_states[layer]` | batch token d_model |
    | `resid_post` | the stream leaving it; `hidden_states[layer + 1]`, but without the final norm | batch token d_model |
    | `resid_mid` | the stream between attention and MLP; not if a block adds both at once | batch token d_model |
    | `attn_out`, `mlp_out` | what is added to the stream, after post-norms if any (Gemma, OLMo 2) | batch token d_model |
    | `mixer_out` | the same for a mixer without attention weights (linear attention, state space, convolution) | batch token d_model |
    | `embed` | the token embedding, only `embed.0` | batch token d_model |
    | `q` | what the query projection gives, before norms and rotary positions | batch token head d_head |
    | `k`, `v` | the same for keys and values | batch token kv_head d_head |
    | `z` | what each head hands to the output projection | batch token head d_head |
    | `mlp_post` | the neurons of a dense MLP: what its last projection takes | batch token neuron |
    | `attn_probs` | attention of each query on each key (eager attention), without the column of a sink | batch head query key |
    | `router` | the router's logits | batch token expert |

    `attn_probs` can be read but not written. Blocks lack points: one without attention has no heads, a mixture of experts no `mlp_post`.

    Attributes:
        point: One of `POINTS`.
        layer: The block, counted from 0.

    Raises:
        SiteError: If the point is unknown or the layer is negative.

    Example:
        >>> site = Site("resid_post", 3)
        >>> site == Site.parse("resid_post.3")
        True
    """

    point: Point
    layer: int

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise SiteError(f"unknown site {self.point!r}; choose from {', '.join(POINTS)}")
        if self.layer < 0:
            raise SiteError(f"layer {self.layer} of {self.point} is negative; layers count from 0")

    def __str__(self) -> str:
        return f"{self.point}.{self.layer}"

    @classmethod
    def parse(cls, name: "str | Site") -> "Site":
        """Read a site from its name, `resid_post.12`, or from that of TransformerLens, `blocks.12.hook_resid_post`.

        Raises SiteError for anything else.
        """
        if isinstance(name, Site):
            return name
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            point = _TRANSFORMER_LENS.get(match[2], match[2])
            return cls(point, int(match[1]))  # type: ignore[arg-type]  # __post_init__ refuses anything that is not a Point
        match = re.fullmatch(r"([a-z_]+)\.(\d+)", name)
        if match is None:
            raise SiteError(
                f"{name!r} is not a site; write point.layer, for instance resid_post.12 (points: {', '.join(POINTS)})"
            )
        return cls(match[1], int(match[2]))  # type: ignore[arg-type]  # likewise


def expand_sites(pattern: str, n_layers: int) -> tuple[Site, ...]:
    """Read a list of sites separated by commas, in which a layer may be `*` or a range.

    Args:
        pattern: Sites as text, for instance `resid_post.*` or `z.2-4,attn_out.0`.
        n_layers: Number of blocks in the model.

    Returns:
        The sites in the order in which they are named, each once.

    Raises:
        SiteError: If no site is named, a point is unknown, or a layer is outside the model.

    Example:
        >>> sites = expand_sites("resid_post.*,z.0", n_layers=2)
        >>> [str(site) for site in sites]
        ['resid_post.0', 'resid_post.1', 'z.0']
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
        raise SiteError("no site is named; write for instance resid_post.*")
    return tuple(dict.fromkeys(sites))
