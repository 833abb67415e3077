"""Every backend against the native hooks on every family, and what a backend promises beside its numbers."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

from reasonscope.data.errors import ArchitectureError, InputError, MissingExtraError, SiteError
from reasonscope.probes.architecture.families import FAMILIES, tiny_config, tiny_model
from reasonscope.probes.architecture.sites import POINTS, Site
from reasonscope.probes.backends.base import Backend, Positions, gradients
from reasonscope.probes.backends.hooks import HooksBackend
from reasonscope.probes.backends.nnsight import NNsightBackend
from reasonscope.probes.backends.transformer_lens import TransformerLensBackend
from reasonscope.probes.backends.twin import twin
from reasonscope.probes.checks.all_families import FAMILIES_HEADING
from reasonscope.probes.checks.support_table import TRIALS, SupportRow, _try_out, load_tiny, markdown, support_table
from reasonscope.probes.models.layout_check import proved
from reasonscope.probes.models.layout_derivation import derive_layout
from reasonscope.probes.models.model import BACKENDS, Model

ENGINES = {"hooks": HooksBackend, "transformer_lens": TransformerLensBackend, "nnsight": NNsightBackend}
MIXTURES = {"deepseek_v3": [0], "gpt_oss": [], "qwen3_moe": [1]}  # and which of their blocks are dense
# TransformerLens shows the logits of DeepSeek's router, but neither what it chose nor what that weighs.
REFUSED = {("transformer_lens", "deepseek_v3"): {"read router", "write router"}}
# Points that an engine reads in no family: sums for nnsight, and for TransformerLens what we do not map to its hooks.
NOT_READ = {
    "hooks": set(),
    "nnsight": {"resid_mid"},
    "transformer_lens": {"resid_mid", "q", "k", "v", "mlp_post", "embed"},
}
IDS = torch.arange(3, 21).view(2, 9)
MASK = torch.ones_like(IDS)
MIDDLE, LAST = Site("resid_post", 1), Site("resid_post", 2)


@pytest.fixture(scope="session")
def table() -> dict[tuple[str, str], SupportRow]:
    return {(row.backend, row.family): row for row in support_table()}


@pytest.fixture(params=BACKENDS)
def engine(request: pytest.FixtureRequest, hf_of: Callable[[str], PreTrainedModel]) -> Backend:
    """Each backend in turn on the tiny Qwen3."""
    hf = hf_of("qwen3")
    backend: Backend = ENGINES[request.param](hf, proved(hf, derive_layout(hf)))
    return backend


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_gives_the_numbers_of_the_native_hooks(
    backend: str,
    family: str,
    table: dict[tuple[str, str], SupportRow],
    hf_of: Callable[[str], PreTrainedModel],
) -> None:
    trials = table[backend, family].trials
    layout = load_tiny(hf_of(family), "hooks").layout
    lacking = {point for point in POINTS if point != "embed" and not layout.layers_with(point)}
    assert ("router" not in lacking) == (family in MIXTURES)
    assert {name: trial.mark for name, trial in trials.items()} == {
        name: "–" if name.split()[-1] in lacking else "✗" if _is_refused(backend, family, name) else "✓"
        for name in ("load", *TRIALS)
    }, {name: trial for name, trial in trials.items() if trial.mark == "✗"}


def _is_refused(backend: str, family: str, trial: str) -> bool:
    return trial.split()[-1] in NOT_READ[backend] or trial in REFUSED.get((backend, family), ())


def test_committed_table_says_what_is_so(table: dict[tuple[str, str], SupportRow]) -> None:
    committed = (Path(__file__).parents[3] / "docs" / "support.md").read_text(encoding="utf-8")
    committed = committed.partition(FAMILIES_HEADING)[0]
    assert list(_marks(committed)) == list(_marks(markdown(list(table.values())))), "run make support"


def _marks(document: str) -> Iterator[list[str]]:
    """The cells of the table but the last, which is a number, and what failed, without the engine's words."""
    for line in document.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")][:-1]
        elif line.startswith("- "):
            yield [line.partition(":")[0]]


class _OneLayerOff(HooksBackend):
    def forward(self, ids: Tensor, *, read: Any = (), **arguments: Any) -> Any:
        moved = {Site(site.point, (site.layer + 1) % 3): site for site in read}
        out = super().forward(ids, read=list(moved), **arguments)
        return dataclasses.replace(out, activations={moved[site]: a for site, a in out.activations.items()})


class _ForgetsEdits(HooksBackend):
    def passes(self, *, write: Any = None, **arguments: Any) -> Any:
        return super().passes(**arguments)


class _ForgetsPadding(HooksBackend):
    def forward(self, ids: Tensor, *, mask: Tensor, **arguments: Any) -> Any:
        return super().forward(ids, mask=torch.ones_like(mask), **arguments)


class _Breaks(HooksBackend):
    def forward(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such\nthing")


def _with(backend: Callable[..., Any], reference: Model) -> Model:
    return dataclasses.replace(reference, backend=backend(reference.hf, reference.layout))


@pytest.mark.parametrize(
    ("wrong", "caught_by"),
    [
        (_OneLayerOff, "read resid_post"),
        (_ForgetsEdits, "write z"),
        (_ForgetsEdits, "cached generation"),
        (_ForgetsPadding, "ragged batch"),
    ],
)
def test_trials_catch_a_backend_that_is_wrong(
    wrong: type[HooksBackend], caught_by: str, hf_of: Callable[[str], PreTrainedModel]
) -> None:
    reference = load_tiny(hf_of("qwen2"), "hooks")
    assert _try_out(TRIALS[caught_by], reference, reference).mark == "✓"
    trial = _try_out(TRIALS[caught_by], _with(wrong, reference), reference)
    assert trial.mark == "✗"
    assert trial.error is None


def test_an_engine_that_breaks_is_quoted_in_one_line(hf_of: Callable[[str], PreTrainedModel]) -> None:
    reference = load_tiny(hf_of("qwen2"), "hooks")
    trial = _try_out(TRIALS["read z"], _with(_Breaks, reference), reference)
    assert trial.error == "NotImplementedError: no such thing"
    row = SupportRow(backend="hooks", family="qwen2", trials=dict.fromkeys(("load", *TRIALS), trial))
    assert "- hooks, qwen2, read z: NotImplementedError: no such thing" in markdown([row])


@pytest.mark.parametrize("trial", TRIALS)
def test_nnsight_sent_away_and_back_gives_the_same_numbers(trial: str, hf_of: Callable[[str], PreTrainedModel]) -> None:
    """remote="local" serialises each pass and runs it with our modules hidden, as a server would that has not got them."""
    reference = load_tiny(hf_of("qwen3_moe"), "hooks")
    away = NNsightBackend(reference.hf, reference.layout, remote="local")
    outcome = _try_out(TRIALS[trial], dataclasses.replace(reference, backend=away), reference)
    expected = {"mixer_out": "–", "resid_mid": "✗"}.get(trial.split()[-1], "✓")
    assert outcome.mark == expected, outcome


def test_the_given_model_stays_as_it_was() -> None:
    hf = tiny_model("gemma2")
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    modules = {name: (id(module), sorted(vars(module))) for name, module in hf.named_modules()}
    attention, logits = hf.config._attn_implementation, hf(IDS).logits
    for engine in ENGINES.values():
        backend = engine(hf, proved(hf, derive_layout(hf)))
        backend.forward(IDS, mask=MASK, use_cache=True, read=[Site("attn_probs", 0)], write={MIDDLE: _halve})
    assert {name: (id(module), sorted(vars(module))) for name, module in hf.named_modules()} == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())
    assert hf.config._attn_implementation == attention
    assert torch.equal(hf(IDS).logits, logits)
    assert _n_hooks(hf) == 0


def _halve(activation: Tensor, _: Positions) -> Tensor:
    return activation / 2


def _n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def _inner(backend: Any) -> nn.Module:
    """The modules that the backend runs, with the hooks that belong to its engine."""
    inner = backend._bridge if isinstance(backend, TransformerLensBackend) else backend._hf
    assert isinstance(inner, nn.Module)
    return inner


@pytest.mark.parametrize("point", ["resid_pre", "z", "attn_out", "mlp_out", "resid_post"])
def test_no_hook_is_left_after_an_edit_that_raises(engine: Backend, point: Any) -> None:
    def fail(*_: object) -> Tensor:
        raise ZeroDivisionError("from the edit")

    clean = engine.forward(IDS, mask=MASK).logits
    before = _n_hooks(_inner(engine))  # behind the first pass, on which TransformerLens sets up hooks of its own
    with pytest.raises(ZeroDivisionError, match="from the edit"):
        engine.forward(IDS, mask=MASK, read=[LAST], write={Site(point, 1): fail})
    assert _n_hooks(_inner(engine)) == before
    assert torch.equal(engine.forward(IDS, mask=MASK).logits, clean)


def test_an_edit_that_changes_nothing_changes_no_bit(engine: Backend) -> None:
    sites = [Site(point, 1) for point in ("resid_pre", "z", "attn_out", "mlp_out", "resid_post")]  # type: ignore[arg-type]
    clean = engine.forward(IDS, mask=MASK, read=[LAST])
    same = engine.forward(IDS, mask=MASK, read=[LAST], write=dict.fromkeys(sites, lambda activation, _: activation))
    assert torch.equal(clean.logits, same.logits)
    assert torch.equal(clean.activations[LAST], same.activations[LAST])


def test_only_what_was_asked_for_comes_back(engine: Backend) -> None:
    out = engine.forward(IDS, mask=MASK, last_logits_only=True, read=[LAST, MIDDLE], write={Site("z", 0): _halve})
    assert list(out.activations) == [LAST, MIDDLE]
    assert out.logits.shape == (2, 1, 96)
    assert out.cache is None
    assert not out.logits.requires_grad


def test_gradients_reach_an_edit(engine: Backend, hf_of: Callable[[str], PreTrainedModel]) -> None:
    hf = hf_of("qwen3")

    def gradient(backend: Backend) -> Tensor:
        direction = torch.zeros(hf.config.hidden_size, requires_grad=True)
        with gradients():
            logits = backend.forward(IDS, mask=MASK, write={MIDDLE: lambda a, _: a + direction}).logits
            (grad,) = torch.autograd.grad(logits[:, -1].logsumexp(dim=-1).sum(), direction)
        return grad

    expected = gradient(HooksBackend(hf, proved(hf, derive_layout(hf))))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(gradient(engine), expected, atol=1e-5, rtol=0)


def test_what_cannot_be_read_or_written_is_refused(engine: Backend) -> None:
    with pytest.raises(SiteError, match=r"attn_probs\.1 can be read but not written"):
        engine.forward(IDS, mask=MASK, write={Site("attn_probs", 1): _halve})
    with pytest.raises(SiteError, match="the model has 3 layers"):
        engine.forward(IDS, mask=MASK, read=[Site("z", 3)])
    with pytest.raises(SiteError, match="no router"):
        engine.forward(IDS, mask=MASK, read=[Site("router", 0)])
    with pytest.raises(InputError, match=r"the edit at z\.1 returned \(2, 9, 4, 3\)"):
        engine.forward(IDS, mask=MASK, write={Site("z", 1): lambda activation, _: activation[..., :3]})


@pytest.mark.parametrize("family", sorted(MIXTURES))
@pytest.mark.parametrize("name", BACKENDS)
def test_a_dense_block_of_a_mixture_has_no_router(
    name: str, family: str, hf_of: Callable[[str], PreTrainedModel]
) -> None:
    hf = hf_of(family)
    layout, dense = proved(hf, derive_layout(hf)), []
    for layer in range(3):
        try:
            ENGINES[name](hf, layout).forward(IDS, mask=MASK, read=[Site("router", layer)])
        except SiteError:
            dense.append(layer)
    assert dense == (list(range(3)) if (name, family) in REFUSED else MIXTURES[family])


@pytest.mark.parametrize(
    ("module", "engine_class", "extra"),
    [
        ("transformer_lens.model_bridge.sources", TransformerLensBackend, "transformer-lens"),
        ("nnsight", NNsightBackend, "nnsight"),
    ],
)
def test_a_missing_extra_names_its_remedy(
    module: str, engine_class: Any, extra: str, monkeypatch: pytest.MonkeyPatch, hf_of: Callable[[str], PreTrainedModel]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    hf = hf_of("qwen3")
    with pytest.raises(MissingExtraError) as caught:
        engine_class(hf, proved(hf, derive_layout(hf)))
    assert f'pip install "reasonscope[{extra}]"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_architecture_unknown_to_transformer_lens_is_refused_in_its_words() -> None:
    class UnheardOfForCausalLM(Qwen3ForCausalLM):
        pass

    hf = UnheardOfForCausalLM(tiny_config("qwen3")).eval()
    with pytest.raises(ArchitectureError, match=r"TransformerLens cannot bridge UnheardOfForCausalLM: .*hooks"):
        TransformerLensBackend(hf, proved(hf, derive_layout(hf)))


def test_a_twin_shares_every_weight_and_no_module() -> None:
    hf = tiny_model("gpt2")
    other = twin(hf)
    assert all(a is b for a, b in zip(hf.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(hf.buffers(), other.buffers(), strict=True))
    assert not {id(m) for m in hf.modules()} & {id(m) for m in other.modules()}
    assert other.config is not hf.config
