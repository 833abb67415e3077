"""What every engine does with the activation at a site: apply the edit, check the result, and keep what is read."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from reasonscope.data.errors import InputError, SiteError
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions, Reduce

# Takes the activation at a site, in the shape that `Site` documents; returns the activation to go on with.
# Returning the same tensor means that nothing changed.
SiteHook = Callable[[Tensor], Tensor]


def site_hooks_for(read: Sequence[Site], write: Mapping[Site, Edit] | None, where: Positions) -> dict[Site, SiteHook]:
    """What to do at each site that is read or written. Raises SiteError if a site cannot be written."""
    edits = write or {}
    return {site: _site_hook(site, edits.get(site), where) for site in dict.fromkeys((*edits, *read))}


def _site_hook(site: Site, edit: Edit | None, where: Positions) -> SiteHook:
    if edit is None:
        return _leave
    checked = checked_edit(site, edit)

    def touch(activation: Tensor) -> Tensor:
        return checked(activation, where)

    return touch


def checked_edit(site: Site, edit: Edit) -> Edit:
    """`edit`, which raises InputError unless shape and dtype stay. Raises SiteError for a site that cannot be written."""
    if site.point == "attn_probs":
        raise SiteError(f"{site} can be read but not written; write z.{site.layer}, which the heads compute from it")
    name = str(site)  # the edit may be sent to another machine, so it carries as little as possible

    def checked(activation: Tensor, where: Positions) -> Tensor:
        after = edit(activation, where)
        if after.shape != activation.shape or after.dtype != activation.dtype:
            raise InputError(
                f"the edit at {name} returned {tuple(after.shape)} {after.dtype}; "
                f"it must return {tuple(activation.shape)} {activation.dtype}"
            )
        return after

    return checked


def _leave(activation: Tensor) -> Tensor:
    return activation


def activations(
    read: Sequence[Site], seen: Mapping[Site, Tensor], n_keys: int, reduce: Reduce | None = None
) -> dict[Site, Tensor]:
    """The activations at the sites in `read`, from those in `seen`.

    Unless they are reduced, `attn_probs` are padded to all `n_keys` keys: a layer with a window caches only the last keys, and the
    earlier ones get no attention.
    """
    return {
        site: nn.functional.pad(seen[site], (n_keys - seen[site].shape[-1], 0))
        if site.point == "attn_probs" and reduce is None
        else seen[site]
        for site in read
    }
