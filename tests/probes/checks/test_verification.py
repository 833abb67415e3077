"""`verify` passes on every family, and fails where something is wrong: each check has its saboteur."""

from copy import copy, deepcopy
from dataclasses import replace

import pytest
import torch
from tokenizers import processors
from transformers import BitsAndBytesConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Message, Problem
from reasonscope.probes.architecture.families import tiny_of
from reasonscope.probes.architecture.layout import Term
from reasonscope.probes.backends import hooks
from reasonscope.probes.backends.base import PassByPass
from reasonscope.probes.checks.verification import verify
from reasonscope.probes.models.model import Model, load_model

NAMES = [
    "hidden states", "contributions", "head writes", "attention rows", "batch", "cache", "replay", "read alone",
    "attention kernels", "independent passes", "strength 0",
    "positions edited", "one BOS", "think tags",
]  # fmt: skip


class Sabotage(PassByPass):
    """A backend that hands passes on after `change` has spoilt their arguments."""

    name = "sabotage"

    def __init__(self, inner, change):
        self.inner, self.change = inner, change

    def forward(self, ids, **kwargs):
        return self.inner.forward(ids, **self.change(ids, kwargs))


def failed(checks):
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_every_family_passes_with_both_attention_kernels(family, model_of, kernel):
    model = model_of(family)
    before = model.hf.config._attn_implementation
    if kernel == "sdpa" and not model.hf._supports_sdpa:
        pytest.skip(f"{family} has no fused attention in transformers")
    model.hf.set_attn_implementation(kernel)
    try:
        checks = verify(model)
    finally:
        model.hf.set_attn_implementation(before)
    assert [check.name for check in checks] == NAMES
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert all(check.value < 1e-5 for check in checks[:7])


@pytest.mark.parametrize(
    "family",
    ["qwen3_next", "falcon_h1", "nemotron_h", "granitemoehybrid", "cohere2", "qwen3_vl", "mamba", "falcon_mamba"],
)
def test_other_kinds_of_blocks_pass_too(family, tokenizer):
    """Linear and full attention in turn, side by side, one part per block, multipliers, parallel blocks, a text tower."""
    checks = verify(load_model(tiny_of(family), tokenizer=tokenizer))
    assert [check.name for check in checks] == NAMES
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_float64_is_judged_in_float64(family, hf_of, tokenizer):
    checks = verify(load_model(deepcopy(hf_of(family)).double(), tokenizer=tokenizer))
    assert failed(checks) == set() and checks[1].limit == 1e-9


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
def test_bfloat16_passes_within_its_own_tolerance(family, hf_of, tokenizer):
    checks = verify(load_model(deepcopy(hf_of(family)).bfloat16(), tokenizer=tokenizer))
    assert failed(checks) == set()
    assert checks[1].limit == 0.05


def packed(model, told):
    """The same model, whose configuration says that its weights are packed."""
    hf = copy(model.hf)
    hf.config = deepcopy(hf.config)
    hf.config.quantization_config = told
    return replace(model, hf=hf)


@pytest.mark.parametrize(
    ("told", "limits"),
    [
        (None, (1e-4, 1e-3)),
        ({"quant_method": "gptq"}, (5e-2, 1e-1)),
        (BitsAndBytesConfig(load_in_4bit=True), (5e-2, 1e-1)),
        (BitsAndBytesConfig(load_in_8bit=True), (0.3, 0.3)),
    ],
)
def test_packed_weights_are_judged_by_their_rounding(told, limits, model_of):
    checks = {check.name: check for check in verify(packed(model_of("qwen3"), told))}
    assert all(check.passed for check in checks.values())
    assert (checks["head writes"].limit, checks["batch"].limit) == limits
    assert checks["attention kernels"].limit == (limits[1] if told else 1e-4)
    # Sums of what was stored, and rows of attention, do not depend on how weights are packed.
    assert {checks[name].limit for name in ("hidden states", "contributions", "attention rows")} == {1e-4}


@pytest.mark.parametrize(
    ("family", "change", "expected"),
    [
        ("gemma2", {"attn_out": (Term(path="self_attn"),)}, {"contributions"}),
        ("olmo2", {"mlp_out": (Term(path="mlp"),)}, {"contributions"}),
        ("llama", {"o_proj": "self_attn.q_proj"}, {"head writes"}),
        ("gpt_oss", {"sinks": False}, {"attention rows"}),
    ],
)
def test_a_wrong_layout_fails(family, change, expected, model_of, hf_of):
    right = model_of(family)
    layout = replace(right.layout, of_block=tuple(replace(block, **change) for block in right.layout.of_block))
    model = replace(right, layout=layout, backend=hooks.HooksBackend(hf_of(family), layout))
    assert expected <= failed(verify(model))


def test_a_wrong_final_norm_fails(model_of):
    right = model_of("llama")
    layout = replace(right.layout, final_norm="model.layers.0.input_layernorm")
    assert "hidden states" in failed(verify(replace(right, layout=layout)))


def unmasked(ids, kwargs):
    mask = kwargs["mask"]  # None if padding comes after the tokens, which needs no mask
    return {**kwargs, "mask": None if mask is None else torch.ones_like(mask)}


def noisy(ids, kwargs):
    write = {site: lambda a, w, e=edit: e(a, w) + 1e-6 * a for site, edit in (kwargs.get("write") or {}).items()}
    return {**kwargs, "write": write}


def remembering():
    """Keeps the edit of the pass before for the next one that has none."""
    kept = {}

    def change(ids, kwargs):
        write, last = kwargs.get("write") or {}, dict(kept)
        kept.clear()
        kept.update(write)
        return {**kwargs, "write": write or last}

    return change


def overwriting(ids, kwargs):
    """Where several sites are read, an edit that was not asked for."""
    if len(kwargs.get("read") or ()) > 3 and not kwargs.get("write"):
        site = kwargs["read"][0]
        return {**kwargs, "write": {site: lambda a, w: a * 1.001}} if site.point == "resid_pre" else kwargs
    return kwargs


def first_pass_only(ids, kwargs):
    return {**kwargs, "write": None} if kwargs.get("cache") is not None else kwargs


def deaf(ids, kwargs):
    return {**kwargs, "write": None}


def rolled(ids, kwargs):
    """Edits are given, and change, what stands one token to the left."""
    write = kwargs.get("write") or {}
    rolled = {site: lambda a, w, e=edit: e(a.roll(1, 1), w).roll(-1, 1) for site, edit in write.items()}
    return {**kwargs, "write": rolled}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (unmasked, {"batch", "positions edited"}),
        (noisy, {"strength 0"}),
        (remembering, {"independent passes"}),
        (overwriting, {"read alone"}),
        (first_pass_only, {"positions edited"}),
        (deaf, {"independent passes", "positions edited"}),
        (rolled, {"positions edited"}),
    ],
)
@pytest.mark.parametrize("told", [None, BitsAndBytesConfig(load_in_4bit=True), BitsAndBytesConfig(load_in_8bit=True)])
def test_a_backend_that_cheats_fails(change, expected, told, model_of):
    model = packed(model_of("llama"), told)
    change = change() if change is remembering else change
    checks = verify(replace(model, backend=Sabotage(model.backend, change)))
    assert expected <= failed(checks)


def test_a_cache_that_forgets_fails(model_of):
    model = model_of("llama")

    class Forgetful(Sabotage):
        def forward(self, ids, **kwargs):
            out = super().forward(ids, **kwargs)
            if out.cache is not None:
                for layer in out.cache.layers:
                    layer.values = layer.values * 0.5
            return out

    checks = verify(replace(model, backend=Forgetful(model.backend, lambda ids, kwargs: kwargs)))
    assert failed(checks) == {"cache", "replay", "positions edited"}


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize(("by", "axis"), [(1, -1), (-1, -1), (1, -2), (-1, -2)])
def test_attention_rows_off_by_one_token_fail(family, by, axis, model_of):
    model = model_of(family)

    class Shifted(Sabotage):
        def forward(self, ids, **kwargs):
            out = super().forward(ids, **kwargs)
            shifted = {
                site: a.roll(by, axis) if site.point == "attn_probs" else a for site, a in out.activations.items()
            }
            return replace(out, activations=shifted)

    checks = verify(replace(model, backend=Shifted(model.backend, lambda ids, kwargs: kwargs)))
    assert failed(checks) == {"attention rows"}


def test_a_kernel_that_scales_otherwise_fails(hf_of, tokenizer, monkeypatch):
    model = load_model(deepcopy(hf_of("llama")), tokenizer=tokenizer)
    model.hf.set_attn_implementation("sdpa")
    right = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def louder(*args, scaling, **kwargs):
        return right(*args, scaling=1.2 * scaling, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", louder)
    assert failed(verify(model)) == {"attention kernels"}


def test_a_lost_bos_is_reported(model_of, monkeypatch):
    encode = Model.encode_prompt
    monkeypatch.setattr(Model, "encode_prompt", lambda self, problem: encode(self, problem)[1:])
    model = model_of("qwen3")
    checks = {check.name: check for check in verify(model)}
    assert failed(checks.values()) == {"one BOS"} and "bare 0, own 0, chat 0" in checks["one BOS"].detail
    by_template = deepcopy(model.tokenizer)  # one that puts no BOS by itself loses none
    by_template.backend_tokenizer.post_processor = processors.Sequence([])
    assert failed(verify(replace(model, tokenizer=by_template))) == set()


def test_a_bos_that_marks_each_turn_is_not_a_doubled_one(model_of):
    model = model_of("qwen3")
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}{{ bos_token }}<think>"
    marked = replace(model, tokenizer=_with_template(model.tokenizer, template))
    assert marked.encode_prompt(Problem(id="a", messages=(Message(role="user", content="1"),))).count(1) == 2
    assert failed(verify(marked)) == set()


def test_missing_tags_are_noted_and_a_doubled_bos_fails(model_of):
    model = model_of("qwen3")
    checks = {check.name: check for check in verify(replace(model, thinking=Thinking(mode="completion")))}
    assert checks["think tags"].passed and checks["think tags"].detail.startswith("none: ")  # a note, not a failure
    template = "{{ bos_token }}" + model.tokenizer.chat_template
    doubled = replace(model, tokenizer=_with_template(model.tokenizer, template))
    assert failed(verify(doubled)) == {"one BOS"}


def _with_template(tokenizer, template):
    other = deepcopy(tokenizer)
    other.chat_template = template
    return other
