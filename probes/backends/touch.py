"""What every engine does with the activation it meets at a site: edit it, check the edit, remember it."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from reasonscope.data.errors import InputError, SiteError
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.sites import Site

# Takes the activation at a site in the shape that `Site` documents; returns what shall stand there.
# The very same tensor means: leave it.
Touch = Callable[[Tensor], Tensor]


def touches(
    read: Sequence[Site], write: Mapping[Site, Edit], where: Positions, seen: dict[Site, Tensor]
) -> dict[Site, Touch]:
    """What to do at each site of `read` and `write`; what is read ends up in `seen`. Raises SiteError where it cannot be."""
    return {
        site: _touch(site, write.get(site), where, seen if site in read else None)
        for site in dict.fromkeys((*write, *read))
    }


def _touch(site: Site, edit: Edit | None, where: Positions, seen: dict[Site, Tensor] | None) -> Touch:
    if edit is not None and site.point == "attn_probs":
        raise SiteError(f"{site} can be read but not written; write z.{site.layer}, what the heads made of it")

    def touch(activation: Tensor) -> Tensor:
        after = activation if edit is None else edit(activation, where)
        if after.shape != activation.shape or after.dtype != activation.dtype:
            raise InputError(
                f"the edit at {site} returned {tuple(after.shape)} {after.dtype}; "
                f"it has to keep {tuple(activation.shape)} {activation.dtype}"
            )
        if seen is not None:
            seen[site] = after
        return after

    return touch


def all_keys(probabilities: Tensor, n_keys: int) -> Tensor:
    """`attn_probs` over all keys: a layer with a window caches only the last ones, and those before them get no attention."""
    return nn.functional.pad(probabilities, (n_keys - probabilities.shape[-1], 0))
