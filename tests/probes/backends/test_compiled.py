"""Compiled models: an edit acts as on the model itself, or is an error, however torch.compile was used and whatever ran before."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.backends.compiled import eagerly, is_compiled
from reasonscope.probes.generation.activations import capture
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import load_model
from reasonscope.steering.vectors.intervention import Steering
from reasonscope.steering.vectors.patching import patched
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector

IDS, SITE, INNER = torch.arange(3, 12)[None], Site("resid_post", 0), Site("z", 1)
GRAPHS = "eager"  # the graphs of dynamo, run as they are: hooks are lost where graphs are made, not where kernels are


def plain():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def whole(hf):
    hf.compile(backend=GRAPHS)
    return hf


def dynamic(hf):
    hf.compile(backend=GRAPHS, dynamic=True)
    return hf


def wrapped(hf):
    return torch.compile(hf, backend=GRAPHS)


def forward_alone(hf):
    hf.forward = torch.compile(hf.forward, backend=GRAPHS)
    return hf


def block_by_block(hf):
    for block in hf.model.layers:
        block.compile(backend=GRAPHS)
    return hf


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steering():
    direction = torch.linspace(-3, 3, 32).numpy()
    vector = SteeringVector(directions={SITE: direction}, method="test", provenance={})
    return Steering(vector, 1.0, Scope())


@pytest.mark.parametrize("way", [whole, dynamic, wrapped, forward_alone, block_by_block])
def test_edits_act_and_reads_read(way, tokenizer):
    reference = load_model(plain(), tokenizer=tokenizer)
    compiled = way(plain())
    with torch.no_grad():
        compiled(IDS), compiled(IDS[:, :5])  # graphs without hooks, for two lengths
    model = load_model(compiled, tokenizer=tokenizer)
    out, expected = (
        m.backend.forward(IDS, mask=None, read=[SITE, INNER], write=steering().edits) for m in (model, reference)
    )
    torch.testing.assert_close(out.logits, expected.logits)
    for site in (SITE, INNER):
        torch.testing.assert_close(out.activations[site], expected.activations[site])
    written = [_written(m) for m in (model, reference)]
    assert written[0] == written[1]
    with torch.no_grad():
        with capture(model, [SITE]) as found:
            compiled(IDS)
        done = steering()
        with patched(model, done, name="the vector"):
            moved = compiled(IDS).logits
        again = compiled(IDS).logits
    assert found[SITE].shape == (1, 9, 32) and done.n_edited == 9
    torch.testing.assert_close(moved, expected.logits)
    torch.testing.assert_close(again, reference.hf(IDS).logits.detach())


def _written(model):
    edits = steering()
    prompt = [IDS[0].tolist()]
    sampling = Sampling(temperature=0, max_new_tokens=4)
    (done,) = generate(model, prompt, sampling, seeds=[0], write=edits.edits, on_step=edits.on_step)
    return done.token_ids.tolist()


def test_a_model_that_is_compiled_after_it_was_loaded(tokenizer):
    model = load_model(plain(), tokenizer=tokenizer)
    before = model.backend.forward(IDS, mask=None, write=steering().edits).logits
    assert not is_compiled(model.hf)
    block_by_block(model.hf)
    with torch.no_grad():
        model.hf(IDS)
    assert is_compiled(model.hf)
    torch.testing.assert_close(model.backend.forward(IDS, mask=None, write=steering().edits).logits, before)


def test_what_cannot_be_read_says_so(tokenizer):
    hf = plain()
    hf.model.layers[1] = torch.compile(hf.model.layers[1], backend=GRAPHS)
    with pytest.raises(InputError, match="compile them in place"):
        load_model(hf, tokenizer=tokenizer)
    with pytest.raises(InputError, match="backend='nnsight' cannot read a compiled model"):
        load_model(whole(plain()), tokenizer=tokenizer, backend="nnsight")


def test_contexts_that_overlap_end_with_the_last():
    calls = []
    run = torch.compile(lambda x: x + 1, backend=lambda graph, _: calls.append(1) or graph.forward)
    one, other = eagerly(), eagerly()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    run(torch.ones(1))
    assert not calls
    other.__exit__(None, None, None)
    run(torch.ones(1))
    assert calls
