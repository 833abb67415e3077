"""Weights that are not in one memory: held back by accelerate, or on another machine; and reductions where the model runs."""

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.trace import Message, Problem, Sampling, Span
from reasonscope.probes.architecture.families import tiny_model
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.nnsight import NNsightBackend
from reasonscope.probes.checks.verification import verify
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.recording import record
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.layout_check import prove_layout
from reasonscope.probes.models.model import load_model
from reasonscope.steering.vectors.intervention import Steering
from reasonscope.steering.vectors.orthogonalise import orthogonalised
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector

IDS = torch.tensor([[1, 5, 9, 13, 17]])
SITES = [Site("resid_post", 1), Site("z", 2)]
PROBLEMS = [Problem(id=f"p{i}", messages=(Message(role="user", content=f"{i} + 1 ="),), answer="1") for i in range(3)]
GREEDY = Sampling(temperature=0, max_new_tokens=6)


@pytest.fixture(params=["host", "disk", "part on disk"])
def dispatched(request, tokenizer, tmp_path):
    """The tiny Qwen 2 whose weights accelerate keeps somewhere and brings in while a layer runs."""
    accelerate = pytest.importorskip("accelerate")
    hf, cpu = tiny_model("qwen2"), torch.device("cpu")
    if request.param == "host":
        accelerate.cpu_offload(hf, cpu)
    elif request.param == "disk":
        accelerate.disk_offload(hf, tmp_path / "weights", cpu)
    else:
        places = {name: "cpu" for name, _ in hf.named_children() if name != "model"}
        places |= {f"model.{name}": "cpu" for name, _ in hf.model.named_children() if name != "layers"}
        places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
        hf = accelerate.dispatch_model(
            hf, places, main_device="cpu", offload_dir=tmp_path / "weights", force_hooks=True
        )
    return load_model(hf, tokenizer=tokenizer)


@pytest.mark.filterwarnings("default")  # accelerate's own
def test_a_dispatched_model_is_read_written_and_recorded(dispatched, model_of, tmp_path):
    whole = model_of("qwen2")
    write = {Site("attn_out", 1): lambda a, _: a.flip(-1)}
    outs = [m.backend.forward(IDS, mask=torch.ones_like(IDS), read=SITES, write=write) for m in (dispatched, whole)]
    for site in SITES:
        torch.testing.assert_close(outs[0].activations[site], outs[1].activations[site])
    assert dispatched.fingerprint["weights"] == whole.fingerprint["weights"]
    stores = [
        record(model, PROBLEMS, tmp_path / name, sites=SITES, sampling=GREEDY)
        for name, model in (("there", dispatched), ("here", whole))
    ]
    vector = SteeringVector(directions={Site("resid_post", 1): np.ones(32, np.float32)}, method="t", provenance={})
    steered = []
    for model in (dispatched, whole):
        steering = Steering(vector, 4.0, Scope())
        steered.append(rollouts(model, PROBLEMS, GREEDY, write=steering.edits, on_step=steering.on_step))
    for one, other in zip(*steered, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    for trace in stores[1]:
        np.testing.assert_array_equal(stores[0].trace(trace.id).token_ids, trace.token_ids)
        for site in map(str, SITES):
            there, here = (store.activations(trace.id, site) for store in stores)
            np.testing.assert_allclose(there, here, atol=1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_weights_that_are_held_back_are_read_as_what_they_do(family, tokenizer):
    accelerate = pytest.importorskip("accelerate")
    hf = tiny_model(family)
    plain = load_model(hf, tokenizer=tokenizer)
    expected = [None if w is None else w.clone() for w in plain.layout.output_weights(hf, 1)]
    offloaded = load_model(accelerate.cpu_offload(hf, torch.device("cpu")), tokenizer=tokenizer)
    weight, bias = offloaded.layout.output_weights(offloaded.hf, 1)
    torch.testing.assert_close(weight, expected[0], atol=1e-6, rtol=0)
    assert (bias is None) == (expected[1] is None)


class Packed(torch.nn.Module):
    """A linear layer of 8-bit weights with a scale a row, as quantisers make them."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, rows):
        return rows @ (self.weight * self.scale).T


def test_quantised_weights_run_and_are_read_as_what_they_do(tokenizer):
    hf, plain = tiny_model("qwen3"), tiny_model("qwen3")
    for block, same in zip(hf.model.layers, plain.model.layers, strict=True):
        block.self_attn.o_proj = Packed(block.self_attn.o_proj)
        same.self_attn.o_proj.weight.data = block.self_attn.o_proj.weight * block.self_attn.o_proj.scale
    model, other = (load_model(given, tokenizer=tokenizer) for given in (hf, plain))
    write = {Site("z", 1): lambda a, _: a / 2}
    outs = [m.backend.forward(IDS, mask=torch.ones_like(IDS), read=SITES, write=write) for m in (model, other)]
    for site in SITES:
        torch.testing.assert_close(outs[0].activations[site], outs[1].activations[site])
    weights = [m.layout.output_weights(m.hf, 1)[0] for m in (model, other)]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="the weights are quantised"):
        orthogonalised(model, np.ones(32, np.float32))


SEQUENCES = [[1, 5, 9, 13, 17, 21], [1, 7, 11]]
SPANS = [[Span(0, 2), Span(4, 5)], [Span(1, 2)]]


@pytest.mark.parametrize("backend", ["hooks", "transformer_lens", "nnsight", "nnsight, sent away"])
def test_means_are_taken_where_the_model_runs(backend, hf_of, tokenizer, model_of):
    whole = replay(model_of("qwen3"), SEQUENCES, SITES)
    name, _, away = backend.partition(",")
    model = load_model(hf_of("qwen3"), tokenizer=tokenizer, backend=name, remote="local" if away else False)
    means = replay(model, SEQUENCES, SITES, spans=SPANS)
    for seen, rows, spans in zip(means, whole, SPANS, strict=True):
        for site in SITES:
            assert seen[site].shape == (len(spans), *rows[site].shape[1:])
            for mean, span in zip(seen[site], spans, strict=True):
                torch.testing.assert_close(mean, rows[site][span.start : span.stop].mean(0), atol=1e-5, rtol=1e-5)


def test_a_span_of_one_row_keeps_its_bits(hf_of, tokenizer):
    model = load_model(tiny_model("qwen3").bfloat16(), tokenizer=tokenizer)
    (rows,), (kept,) = (replay(model, SEQUENCES[:1], SITES, **how) for how in ({}, {"spans": [[Span(3, 4)]]}))
    assert all(torch.equal(kept[site][0], rows[site][3]) and kept[site].dtype == torch.bfloat16 for site in SITES)


@pytest.mark.parametrize(
    ("sites", "spans", "error", "message"),
    [
        (SITES, SPANS[:1], InputError, "2 sequences, but spans of 1"),
        (SITES, [[Span(0, 6)], []], InputError, "lie within its 5 rows"),
        (SITES, [[Span(2, 2)], []], InputError, "not be empty"),
        ([Site("attn_probs", 0)], SPANS, SiteError, "leave out spans"),
    ],
)
def test_spans_that_cannot_be(sites, spans, error, message, model_of):
    with pytest.raises(error, match=message):
        replay(model_of("qwen3"), SEQUENCES, sites, spans=spans)


def test_a_model_elsewhere_brings_its_structure_alone(monkeypatch):
    """No server is asked here: its pass is one of the organism in this process."""
    here = load_model("organism")
    monkeypatch.setattr(NNsightBackend, "forward", lambda self, *args, **kwargs: here.backend.forward(*args, **kwargs))
    proved = []
    monkeypatch.setattr("reasonscope.probes.models.model.prove_layout", lambda *a: proved.append(a) or prove_layout(*a))
    there = load_model("organism", backend="nnsight", remote="https://host")
    assert all(parameter.is_meta for parameter in there.hf.parameters()) and proved[0][2] is there.backend
    assert there.fingerprint["weights"] is None
    assert {**there.fingerprint, "weights": here.fingerprint["weights"]} == here.fingerprint
    (one,), (other,) = (rollouts(m, PROBLEMS[:1], GREEDY) for m in (here, there))
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    with pytest.raises(InputError, match="remote needs backend='nnsight'"):
        load_model("organism", remote=True)


class Rounding(torch.nn.Linear):
    """A linear layer that rounds what it is given to 8 bits by the largest value of a row, as W8A8 checkpoints do."""

    def forward(self, rows):
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / 127
        return super().forward((rows / scale).round() * scale)


def test_layers_that_round_their_inputs_keep_heads_and_neurons(tokenizer):
    hf = tiny_model("qwen3")
    for block in hf.model.layers:
        block.self_attn.o_proj.__class__ = block.mlp.down_proj.__class__ = Rounding
    unsaid = load_model(hf, tokenizer=tokenizer)
    assert {"z", "mlp_post"} <= unsaid.layout.of_block[0].lacks.keys()  # a product that is not what it seems
    hf.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"all": {"input_activations": {"num_bits": 8}}},
    }
    model = load_model(hf, tokenizer=tokenizer)
    assert model.layout.layers_with("z") == model.layout.layers_with("mlp_post") == (0, 1, 2)
    checks = {check.name: check for check in verify(model)}
    assert all(check.passed for check in checks.values()) and checks["head writes"].value > 1e-3
