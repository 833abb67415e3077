"""The same numbers again: across runs, across batches, and in float32 over 16-bit weights."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.checks.verification import verify
from reasonscope.probes.generation.recording import record
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.determinism import compute_in_float32, make_deterministic
from reasonscope.probes.models.model import load_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 11]])


def bytes_of(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def problems():
    return load_problems("ledger", n=6, seed=3)


def test_the_same_seed_gives_the_same_store_bit_for_bit(problems, tmp_path):
    for name in ("a", "b"):
        record(
            load_model("organism"), problems[:3], tmp_path / name, sites=["resid_post.2", "z.0"],
            sampling=Sampling(temperature=0.8, max_new_tokens=20, seed=5), batch_size=2,
        )  # fmt: skip
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16", "float32_compute": True}])
def test_batches_change_no_greedy_token_in_float32(problems, options):
    model = load_model("organism", **options)
    written = [rollouts(model, problems, Sampling(max_new_tokens=40), batch_size=size) for size in (1, 3, 6)]
    for one, *others in zip(*written, strict=True):
        assert all(other.token_ids.tolist() == one.token_ids.tolist() for other in others)


def test_float32_over_16_bit_weights_is_float32_to_the_last_bit(family, hf_of):
    narrow = deepcopy(hf_of(family)).bfloat16()
    wide = deepcopy(narrow).float()
    weights = {name: parameter.clone() for name, parameter in narrow.named_parameters()}
    compute_in_float32(narrow)
    with torch.no_grad():
        found, expected = narrow(IDS).logits, wide(IDS).logits
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert all(torch.equal(p, weights[n]) and p.dtype == torch.bfloat16 for n, p in narrow.named_parameters())


def test_weights_are_narrow_again_after_an_error(hf_of):
    narrow = deepcopy(hf_of("llama")).bfloat16()
    compute_in_float32(narrow)

    def broken(*_):
        raise ZeroDivisionError

    handle = narrow.model.layers[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError):
        narrow(IDS)
    handle.remove()
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


def test_a_model_in_float32_compute_says_so_and_passes_verify_as_float32(hf_of, tokenizer):
    model = load_model(deepcopy(hf_of("qwen3")).bfloat16(), tokenizer=tokenizer, float32_compute=True)
    assert model.fingerprint["compute"] == "float32" and model.fingerprint["dtype"] == "bfloat16"
    checks = verify(model)
    assert all(check.passed for check in checks), checks
    assert next(check for check in checks if check.name == "batch").limit == 1e-3
    with pytest.raises(InputError, match="backend='hooks'"):
        load_model("organism", backend="nnsight", float32_compute=True)
    with pytest.raises(InputError, match=r"torch\.float32"):
        load_model("organism", dtype="float32", float32_compute=True)


def test_deterministic_kernels_are_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        model = load_model("organism")
        logits = [model.hf(IDS).logits.detach().numpy() for _ in range(2)]
        assert np.array_equal(*logits)
    finally:
        torch.use_deterministic_algorithms(before)
