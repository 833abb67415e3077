"""Ablations while a model runs, and their control: the same states moved as far, in other directions."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.base import Edit, Positions
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.models.determinism import at_least_float32
from reasonscope.probes.models.model import Model
from reasonscope.steering.ablation.targets import Ablation
from reasonscope.steering.vectors.intervention import MaskedEdit

# States of other tokens at each site (row, …), to average or to draw from.
ReferenceStates: TypeAlias = Mapping[Site, Tensor]
# From states (row, …) to those that replace them.
Replace: TypeAlias = Callable[[Tensor], Tensor]

_BANK_TRACES = 16
_ROWS = 1024  # states that are encoded by a dictionary at once
_UNITS = {"z": "heads", "mlp_post": "neurons", "router": "experts"}


class AblationIntervention(MaskedEdit):
    """Removes what an ablation names while the model runs; `bank` (see `reference_states`) is needed unless `how` is zero.

    `moved` holds, by site, how far each edited token (row,) was moved in the last pass, in units of what the site adds to the stream.

    Raises SiteError for a layer that the model does not have, InputError for a head, neuron or expert that it does not have, a direction
    or dictionary of another width, or a missing bank.
    """

    def __init__(self, model: Model, ablation: Ablation, bank: ReferenceStates | None = None, *, seed: int = 0) -> None:
        super().__init__(ablation.tokens or ablation.scope)
        self.ablation, self.moved = ablation, dict[Site, Tensor]()
        self._bank, self._rng = bank or {}, torch.Generator().manual_seed(seed)
        self._modules = {site: model.layout.module(model.hf, site) for site in ablation.parts}
        for site, indices in ablation.parts.items():
            check_part(model, ablation, site, indices)
            if ablation.how != "zero" and site not in self._bank:
                raise InputError(
                    f"{ablation.how} ablation at {site} needs states of other tokens; pass bank=reference_states(…)"
                )

    @property
    def edits(self) -> Mapping[Site, Edit]:
        return {site: self._edit(site, self.replacing(site)) for site in self.ablation.parts}

    def replacing(self, site: Site) -> Replace:
        """What replaces the states at a site, the whole way."""
        ablation = self.ablation
        if ablation.directions is not None:
            return partial(self._without_directions, site, torch.from_numpy(ablation.directions.basis[site]))
        if ablation.latents is not None:
            return partial(self._without_latents, site)
        return partial(self._overwritten, site, ablation.parts[site])

    def _edit(self, site: Site, replaced: Replace) -> Edit:
        def edit(activation: Tensor, where: Positions) -> Tensor:
            return self.change(activation, where, changed)

        def changed(rows: Tensor) -> Tensor:
            new = self._part_way(rows, replaced(rows))
            if self.ablation.moves_states:
                self.moved[site] = self._lengths(site, new.float() - rows.float())
            return new

        return edit

    def _part_way(self, rows: Tensor, new: Tensor) -> Tensor:
        share = self.ablation.strength
        return new if share == 1 else (rows.float() + share * (new.float() - rows.float())).to(rows.dtype)

    def _overwritten(self, site: Site, indices: tuple[int, ...] | None, rows: Tensor) -> Tensor:
        value = self._value(site, rows)
        if indices is None:
            return value
        kept = rows.clone()
        kept[:, list(indices)] = value[:, list(indices)]
        return kept

    def _without_directions(self, site: Site, basis: Tensor, rows: Tensor) -> Tensor:
        states, axes = at_least_float32(rows), basis.to(at_least_float32(rows))
        gap = at_least_float32(self._value(site, rows)) - states
        return (states + (gap @ axes) @ axes.T).to(rows.dtype)

    def _without_latents(self, site: Site, rows: Tensor) -> Tensor:
        assert self.ablation.latents is not None
        dictionary, chosen = self.ablation.latents.dictionary, list(self.ablation.latents.chosen)
        states = at_least_float32(rows)
        now = dictionary.latents(states)[:, chosen]
        if self.ablation.how == "zero":
            then = torch.zeros_like(now)
        elif self.ablation.how == "mean":
            then = self._mean_latents.to(now).expand_as(now)
        else:
            then = dictionary.latents(at_least_float32(self._value(site, rows)))[:, chosen]
        return (states + dictionary.written(then - now, chosen)).to(rows.dtype)

    @cached_property
    def _mean_latents(self) -> Tensor:
        """The mean of the chosen latents over the bank (latent,)."""
        assert self.ablation.latents is not None
        dictionary, chosen = self.ablation.latents.dictionary, list(self.ablation.latents.chosen)
        states = at_least_float32(self._bank[self.ablation.latents.site])
        return torch.cat([dictionary.latents(part)[:, chosen] for part in states.split(_ROWS)]).mean(dim=0)

    def _value(self, site: Site, rows: Tensor) -> Tensor:
        """What replaces `rows` (row, …) whole."""
        if site.point == "router":
            return torch.full_like(rows, torch.finfo(rows.dtype).min)
        if self.ablation.how == "zero":
            return torch.zeros_like(rows)
        bank = self._bank[site].to(rows)
        if self.ablation.how == "mean":
            return bank.mean(dim=0).expand_as(rows)
        return bank[torch.randint(len(bank), (len(rows),), generator=self._rng).to(rows.device)]

    def _lengths(self, site: Site, moves: Tensor) -> Tensor:
        """How long the moves (row, …) are (row,); for heads and neurons, after their output projection."""
        lengths: Tensor = _projected(self._modules[site], site, moves).norm(dim=-1)
        return lengths


class MatchedMove(AblationIntervention):
    """The control of an ablation that moves states: each state is moved exactly as far, in a random direction.

    The move that the ablation would make is turned by one random orthogonal map for all tokens and sites of one width, so that tokens
    that were moved alike still are. It is as long as the move of `like`, the ablation itself, at the same token of its last pass, which has
    to be over the same batch; without `like` (while the model writes) as long as the ablation would move the state as it stands.
    """

    def __init__(
        self,
        model: Model,
        ablation: Ablation,
        bank: ReferenceStates | None = None,
        *,
        seed: int = 0,
        draw: int = 0,
        like: AblationIntervention | None = None,
    ) -> None:
        super().__init__(model, ablation, bank, seed=seed)
        self._draw, self._like = draw, like

    def replacing(self, site: Site) -> Replace:
        true = super().replacing(site)

        def replaced(rows: Tensor) -> Tensor:
            states = at_least_float32(rows)
            move = at_least_float32(self._as_far(true, rows)) - states
            turned = _turn(move, self._draw)
            wanted = self._lengths(site, move) if self._like is None else self._like.moved[site].to(move)
            scale = wanted / self._lengths(site, turned).clamp(min=torch.finfo(move.dtype).tiny)
            return (states + turned * scale.reshape(-1, *[1] * (turned.dim() - 1))).to(rows.dtype)

        return replaced

    def _as_far(self, true: Replace, rows: Tensor) -> Tensor:
        """The states after the ablation, at its strength."""
        return super()._part_way(rows, true(rows))

    def _part_way(self, rows: Tensor, new: Tensor) -> Tensor:
        return new  # the strength is in the length of the move


def _turn(moves: Tensor, draw: int) -> Tensor:
    """`moves` (row, …) under a random orthogonal map, the same for every row: H(s·x) with signs s, permuted, H the Hartley transform."""
    flat = moves.flatten(1)
    n = flat.shape[1]
    rng = torch.Generator().manual_seed(draw)
    signs = (torch.randint(2, (2, n), generator=rng) * 2 - 1).to(flat)
    order = torch.randperm(n, generator=rng).to(flat.device)
    waves = torch.fft.fft(flat * signs[0], dim=-1, norm="ortho")
    turned: Tensor = ((waves.real - waves.imag) * signs[1])[:, order]
    return turned.reshape(moves.shape)


def _projected(module: nn.Module, site: Site, moves: Tensor) -> Tensor:
    """Moves (row, …) as the residual stream sees them (row, d_model): through the output projection at `z` and `mlp_post`."""
    flat = moves.flatten(1)
    if site.point not in ("z", "mlp_post"):
        return flat
    project = partial(type(module).forward, module)  # not the module itself, whose hook runs just now
    with torch.no_grad():
        given = flat.to(next(module.parameters()).dtype)
        found: Tensor = project(given) - project(torch.zeros_like(given[:1]))
    return found.float()


def check_part(model: Model, ablation: Ablation, site: Site, indices: Sequence[int] | None) -> None:
    """Raise SiteError or InputError if the model lacks what an ablation removes at a site, or its states have another width."""
    width = width_of(model, site)
    if ablation.directions is not None:
        ablation.directions.check(site, width)
    if ablation.latents is not None and (own := ablation.latents.dictionary.width) != width:
        raise InputError(
            f"a dictionary of width {own} at {site}, where the states of this model are {width} wide; give one made for this model"
        )
    if foreign := [index for index in indices or () if not 0 <= index < width]:
        unit = _UNITS[site.point]
        raise InputError(f"{unit[:-1]} {foreign[0]} at {site}: this block has {unit} 0 to {width - 1}")


def width_of(model: Model, site: Site) -> int:
    """How many heads, neurons or experts a site has; the width of its states if it is as wide as the stream.

    Raises SiteError if the model has no such site.
    """
    module = model.layout.module(model.hf, site)
    if site.point == "z":
        return model.layout.of_block[site.layer].n_heads
    if site.point not in ("mlp_post", "router"):
        return model.d_model
    weight = module.weight
    assert isinstance(weight, Tensor)
    if site.point == "router":
        return int(weight.shape[0])
    other = [size for size in weight.shape if size != model.d_model]
    return int(other[0] if other else model.d_model)


def reference_states(model: Model, traces: Sequence[Trace], sites: Sequence[Site]) -> ReferenceStates:
    """The states at `sites` at every token of the first 16 of `traces`: (row, …) by site."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for trace in traces[:_BANK_TRACES]:
        for site, rows in replay(model, [trace.token_ids.tolist()], sites)[0].items():
            parts[site].append(rows)
    return {site: torch.cat(rows) for site, rows in parts.items()}
