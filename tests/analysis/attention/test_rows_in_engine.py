"""Attention that vLLM reduces is the attention that the hooks read, and what it cannot reduce is refused by name."""

import base64

import numpy as np
import pytest
import torch

from reasonscope.analysis.attention.close_attention import close_attention
from reasonscope.analysis.attention.head_profiles import head_rhythm, head_table
from reasonscope.analysis.attention.recurrence import recurrence
from reasonscope.analysis.attention.rows.functionals import RowMeans
from reasonscope.analysis.attention.rows.served import _take, served_model
from reasonscope.analysis.runs.options import HeadsOptions, ReceiversOptions
from reasonscope.analysis.runs.runner import AnalysisTask, analyse
from reasonscope.data.errors import ContextError, InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Sampling, Span
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.prompting import load_prompting
from reasonscope.probes.vllm.writer import vllm_writer
from reasonscope.steering.recipes.recipe import Recipe, RecipePart
from reasonscope.steering.vectors.vector import SteeringVector

pytest.importorskip("openai")


@pytest.fixture
def served(address):
    bare = load_prompting("organism")
    return served_model(bare, vllm_writer(address, bare, served_as="m"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    store = record(
        model, load_problems("ledger", n=1), path / "store", sampling=Sampling(temperature=0, max_new_tokens=200)
    )
    return path, store.trace(store.ids[0])


def same(found, expected):
    np.testing.assert_allclose(found.values, expected.values, atol=1e-4, rtol=1e-5)
    assert found.arrays.keys() == expected.arrays.keys()
    for name, values in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[name], values, atol=1e-4, rtol=1e-5)


def test_heads_in_the_engine_are_those_of_the_hooks(served, model, run):
    known = trace_sentences(run[1])
    same(head_table(served, run[1], known), head_table(model, run[1], known))
    same(close_attention(served, run[1], known), close_attention(model, run[1], known))


def test_no_row_counts_twice_after_a_preemption(served, engine, model, run):
    ids = run[1].token_ids[:60].tolist()
    engine.lie = "preempted early"
    found, expected = (head_rhythm(one, ids, Span(10, 60)) for one in (served, model))
    assert engine.lie == ""
    np.testing.assert_allclose(found.fai, expected.fai, atol=1e-5)
    np.testing.assert_allclose(found.waad, expected.waad, atol=1e-4)


def test_receivers_and_heads_of_a_run_by_a_server(address, model, run):
    told = {"backend": "vllm", "server": address, "served_as": "m"}
    expected = {one.method: one for one in analyse("receivers", run[0])}
    found = {one.method: one for one in analyse("receivers", run[0], **told)}
    assert found.keys() == expected.keys() and len(found) == 3
    for method, one in found.items():
        same(one, expected[method])
    table, close = analyse("heads", run[0], **told)
    known = trace_sentences(run[1])
    same(table, head_table(model, run[1], known))
    same(close, close_attention(model, run[1], known))


def test_attention_of_a_steered_run_is_steered(address, model, tmp_path):
    drawn = np.random.default_rng(0).standard_normal(128).astype(np.float32) * 5
    vector = SteeringVector(directions={Site("resid_post", 1): drawn}, method="test", provenance={})
    recipe = Recipe(name="r", parts=(RecipePart(vector=vector, scope={"on": "think"}),))
    how = {"sampling": Sampling(temperature=0, max_new_tokens=60), "steer": recipe}
    record(model, load_problems("ledger", n=1), tmp_path / "store", **how)
    (trace,), told = TraceStore.open(tmp_path / "store"), {"backend": "vllm", "server": address, "served_as": "m"}
    there, here = (AnalysisTask.of(tmp_path, "receivers", **more).study().attention for more in (told, {}))
    ids, rows = trace.token_ids.tolist(), Span(trace.n_prompt_tokens, len(trace.token_ids))
    found, expected, plain = (head_rhythm(one, ids, rows) for one in (there, here, model))
    np.testing.assert_allclose(found.span, expected.span, atol=1e-4)
    assert np.abs(plain.span - expected.span).max() > 0.01


def test_what_the_engine_cannot_reduce_is_refused_by_name(served, run):
    with pytest.raises(InputError, match=r"reduces attention head by head.*--backend hooks"):
        recurrence(served, run[1], trace_sentences(run[1]))
    with pytest.raises(InputError, match=r"leave out --exact, or --backend vllm"):
        HeadsOptions(exact=True, backend="vllm", server="http://localhost:1")
    with pytest.raises(InputError, match=r"--backend vllm and --server together"):
        ReceiversOptions(server="http://localhost:1")
    with pytest.raises(ContextError):
        served_read(served, [3] * (served.context_length + 1))


def served_read(served, ids):
    return head_rhythm(served, ids, Span(0, len(ids)))


def test_code_goes_to_a_trusted_address_only(run):
    with pytest.raises(InputError, match=r"travels as code.*--trust-server"):
        analyse("receivers", run[0], backend="vllm", server="http://10.0.0.3:8000")


def test_failures_in_the_engine_are_errors_here(served, engine, run):
    ids = run[1].token_ids[:20].tolist()
    engine.lie = "no lens"
    with pytest.raises(InputError, match="did not read attention; is vllm-lens active"):
        served_read(served, ids)
    engine.lie = ""
    engine.worker.attentions[3].impl.alibi_slopes = [1.0]
    with pytest.raises(InputError, match=r"could not read attention: RuntimeError: .*ALiBi"):
        served_read(served, ids)


def test_a_prompt_that_was_not_read_whole_is_an_error(served, engine, run):
    begin = engine.worker.begin
    engine.worker.begin = lambda request, start, ids: begin(request, start + 2, ids)
    with pytest.raises(InputError, match="were not read; was the prefix cache used"):
        served_read(served, run[1].token_ids[:20].tolist())


def report_of(first, heads, rows=4):
    values = torch.arange(heads * 4, dtype=torch.float32).view(heads, 4) + 100 * first
    told = {"dtype": "float32", "original_dtype": "torch.float32", "shape": [heads, 4], "compression": "none"}
    data = base64.b64encode(values.numpy().tobytes()).decode()
    return {f"0.{first}.sums": {"data": data, **told}, f"0.{first}.rows": rows}, values


def test_the_heads_of_all_ranks_are_joined_in_order():
    (low, a), (high, b) = report_of(0, 2), report_of(2, 2)
    functional = RowMeans(Span(0, 4), 1, 5)
    _take({**high, **low}, functional, 4, {0: 4}, "http://x")
    assert functional.sums["sums"][0, :4].tolist() == torch.cat([a, b]).tolist()
    assert functional.sums["sums"][0, 4].isnan().all()
    with pytest.raises(InputError, match="2 of 4 heads of layer 0"):
        _take(low, functional, 4, {0: 4}, "http://x")
    with pytest.raises(InputError, match="at fewer than 4 tokens"):
        _take(report_of(0, 4, rows=3)[0], functional, 4, {0: 4}, "http://x")
