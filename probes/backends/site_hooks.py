"""What every engine does with the activation it meets at a site: edit it and check the edit."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from reasonscope.data.errors import InputError, SiteError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions, Reduce

# Takes the activation at a site in the shape that `Site` documents; returns what shall stand there.
# The very same tensor means: leave it.
SiteHook = Callable[[Tensor], Tensor]


def site_hooks_for(read: Sequence[Site], write: Mapping[Site, Edit] | None, where: Positions) -> dict[Site, SiteHook]:
    """What to do at each site that is read or written. Raises SiteError for a site that cannot be written."""
    edits = write or {}
    return {site: _site_hook(site, edits.get(site), where) for site in dict.fromkeys((*edits, *read))}


def _site_hook(site: Site, edit: Edit | None, where: Positions) -> SiteHook:
    if edit is None:
        return _leave
    if site.point == "attn_probs":
        raise SiteError(f"{site} can be read but not written; write z.{site.layer}, what the heads made of it")
    name = str(site)  # a touch may travel to another machine: it takes along as little as it can

    def touch(activation: Tensor) -> Tensor:
        after = edit(activation, where)
        if after.shape != activation.shape or after.dtype != activation.dtype:
            raise InputError(
                f"the edit at {name} returned {tuple(after.shape)} {after.dtype}; "
                f"it has to keep {tuple(activation.shape)} {activation.dtype}"
            )
        return after

    return touch


def _leave(activation: Tensor) -> Tensor:
    return activation


def keep_activation(touch: SiteHook, site: Site, seen: dict[Site, Tensor], reduce: Reduce | None = None) -> SiteHook:
    """`touch`, and what stands at `site` after it goes into `seen`, reduced."""

    def record(activation: Tensor) -> Tensor:
        after = touch(activation)
        seen[site] = after if reduce is None else reduce(after)
        return after

    return record


def activations(
    read: Sequence[Site], seen: Mapping[Site, Tensor], n_keys: int, reduce: Reduce | None = None
) -> dict[Site, Tensor]:
    """What was asked for of what was `seen`. `attn_probs`, where they are whole, over all keys: a layer with a window caches only
    the last ones, and those before them get no attention."""
    return {
        site: nn.functional.pad(seen[site], (n_keys - seen[site].shape[-1], 0))
        if site.point == "attn_probs" and reduce is None
        else seen[site]
        for site in read
    }
