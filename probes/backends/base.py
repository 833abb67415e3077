"""What an engine has to do for us: one forward pass that reads and writes at sites. Everything else is built on it once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from reasonscope.probes.sites import Site


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Where the columns of this pass stand: `index` (batch, token) absolute positions without padding, -1 on padding; `ids` alike."""

    index: Tensor
    ids: Tensor


# Takes the activation at a site and the positions of its columns; returns what stands there from now on (the very same tensor:
# nothing was changed). The returned tensor has the same shape and dtype.
Edit = Callable[[Tensor, Positions], Tensor]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What one pass gives: `logits` (batch, token, vocab) or of the last token alone (batch, 1, vocab); what was read, by site,
    AFTER any edit at the same site; and the cache to hand to the next pass."""

    logits: Tensor
    activations: Mapping[Site, Tensor] = field(default_factory=dict)
    cache: Any = None


class Backend(Protocol):
    """An engine holding one loaded model. It leaves no hook behind, whatever happens."""

    name: str

    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor,
        cache: Any = None,
        use_cache: bool = False,
        last_logits_only: bool = False,
        read: Sequence[Site] = (),
        write: Mapping[Site, Edit] | None = None,
    ) -> Forward:
        """Run `ids` (batch, token), left-padded, behind what is in `cache`.

        `mask` (batch, cached + token) is 1 on real tokens, 0 on padding, over the cached columns too. A cache is the
        transformers `Cache` object of the same batch rows. Under `torch.inference_mode()` unless the caller enabled gradients.
        """
        ...
