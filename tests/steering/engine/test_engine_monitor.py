"""A probe that vLLM reads writes what the same probe writes with hooks, and closes the thinking at the same token."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.app.cli import app
from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.prompting import load_prompting
from reasonscope.probes.vllm.writer import vllm_writer
from reasonscope.steering.decoding.monitor import ProbeMonitor
from reasonscope.steering.engine.in_engine import in_engine
from reasonscope.steering.engine.monitor import EngineMonitor
from reasonscope.steering.recipes.controls import exit_part
from reasonscope.steering.recipes.recipe import Recipe, RecipePart
from reasonscope.steering.vectors.vector import SteeringVector

pytest.importorskip("openai")
SITE = Site("resid_post", 2)
GREEDY = Sampling(temperature=0, max_new_tokens=60)
PROBLEMS = load_problems("ledger", n=2)


@pytest.fixture(scope="module")
def bare():
    return load_prompting("organism")


@pytest.fixture(scope="module")
def probe(model):
    coef = np.random.default_rng(0).standard_normal(model.d_model) / 400  # so that scores differ
    return LinearProbe(
        coef=coef, intercept=0.5, site=SITE, task="binary", method="test", model=model.fingerprint, provenance={}
    )


def both(address, model, bare, probe, folder, *, steer=None, **how):
    """The store of vLLM and that of the hooks, with their monitors."""
    there, here = EngineMonitor(bare, probe, **how), ProbeMonitor(model, probe, **how)
    steering = None if steer is None else in_engine(steer, bare)
    writer = vllm_writer(address, bare, served_as="m", workers=2, look=there.look, steering=steering)
    common = {"sampling": GREEDY, "steer": steer}
    found = record(bare, PROBLEMS, folder / "engine", server=writer, monitor=there, sites=[SITE], **common)
    return found, record(model, PROBLEMS, folder / "hooks", monitor=here, **common), there, here


def same(found, expected, there, here):
    assert sorted(found.ids) == sorted(expected.ids)
    for trace in expected:
        assert found.trace(trace.id).token_ids.tolist() == trace.token_ids.tolist()
        np.testing.assert_allclose(there.kept[trace.id], here.kept[trace.id], atol=1e-4)
    assert sorted(there.closed) == sorted(here.closed) and there.meta == here.meta and there.told() == here.told()


def test_scores_are_those_of_the_hooks(address, model, bare, probe, tmp_path):
    found = both(address, model, bare, probe, tmp_path)
    same(*found)
    assert found[0].meta.get("monitor") is None and not found[2].closed


@pytest.mark.parametrize("how", [{"window": 3}, {"window": 8, "at": "paragraph"}], ids=str)
def test_the_thinking_closes_at_the_same_token(address, model, bare, probe, tmp_path, how):
    closing = model.tokenizer.encode("\n</think>", add_special_tokens=False)
    found = both(address, model, bare, probe, tmp_path, stop_above=0.5, closing=closing, **how)
    same(*found)
    assert found[2].closed and found[0].meta["monitor"]["stop_above"] == 0.5


def test_a_monitor_reads_what_steering_leaves(address, model, bare, probe, tmp_path):
    drawn = np.random.default_rng(1).standard_normal(128).astype(np.float32) * 2
    part = RecipePart(
        vector=SteeringVector(directions={SITE: drawn}, method="test", provenance={}), scope={"on": "think"}
    )
    same(*both(address, model, bare, probe, tmp_path, steer=Recipe(name="r", parts=(part,)), stop_above=0.9))


def test_nothing_is_decided_twice_after_a_preemption(address, engine, model, bare, probe, tmp_path):
    engine.lie = "preempted"
    there = EngineMonitor(bare, probe, stop_above=0.5, window=3)
    writer = vllm_writer(address, bare, served_as="m", look=there.look)
    ((_, done, _),) = writer.stream([model.encode_prompt(PROBLEMS[0])], GREEDY, [0])
    there.note("x", done)
    here = ProbeMonitor(model, probe, stop_above=0.5, window=3)
    store = record(model, PROBLEMS[:1], tmp_path / "hooks", sampling=GREEDY, monitor=here)
    assert engine.lie == "" and done.token_ids.tolist() == store.trace(store.ids[0]).token_ids.tolist()
    np.testing.assert_allclose(there.kept["x"], here.kept[store.ids[0]], atol=1e-4)


EXITS = {"fixed budget": ("fixed budget", 9.0), "probe": ("probe", 0.5)}


@pytest.mark.parametrize("name", EXITS)
def test_an_exit_rule_stops_where_it_stops_here(address, model, bare, probe, tmp_path, name):
    rule, threshold = EXITS[name]
    told = {"probe": probe} if rule == "probe" else {}
    recipe = Recipe(name="r", controls=(exit_part(rule, threshold, every=2, **told),))
    writer = vllm_writer(address, bare, served_as="m", steering=in_engine(recipe, bare))
    store = record(bare, PROBLEMS, tmp_path / "engine", server=writer, steer=recipe, sampling=GREEDY, sites=[SITE])
    ours = record(model, PROBLEMS, tmp_path / "hooks", steer=recipe, sampling=GREEDY)
    plain = record(model, PROBLEMS, tmp_path / "plain", sampling=GREEDY)
    for trace in ours:
        assert store.trace(trace.id).token_ids.tolist() == trace.token_ids.tolist()
    assert any(plain.trace(t.id).token_ids.tolist() != t.token_ids.tolist() for t in ours)


@pytest.mark.parametrize(
    "rule", ["closing margin", "confidence before a doubt", "stable answers", "stated answers", "random stops"]
)
def test_other_exit_rules_are_refused_by_name(bare, rule):
    recipe = Recipe(name="r", controls=(exit_part(rule, 1.0),))
    with pytest.raises(InputError, match=rf"the exit rule “{rule}”.*--backend hooks"):
        in_engine(recipe, bare)


def test_what_cannot_be_read_is_refused_by_name(address, engine, model, bare, probe, tmp_path):
    for site, message in ((Site("mlp_out", 2), "not at mlp_out.2"), (Site("resid_pre", 0), "not at resid_pre.0")):
        with pytest.raises(SiteError, match=message):
            EngineMonitor(bare, replace(probe, site=site))
    with pytest.raises(InputError, match="window of 0"):
        EngineMonitor(bare, probe, window=0)
    monitor = EngineMonitor(bare, probe, stop_above=0.1)
    plain = vllm_writer(address, bare, served_as="m")
    with pytest.raises(InputError, match=r"look=monitor\.look"):
        record(bare, PROBLEMS, tmp_path / "a", server=plain, monitor=monitor, sampling=GREEDY)
    watched = vllm_writer(address, bare, served_as="m", look=monitor.look)
    with pytest.raises(InputError, match="nobody takes what it reads"):
        record(bare, PROBLEMS, tmp_path / "b", server=watched, sampling=GREEDY)
    with pytest.raises(InputError, match="use EngineMonitor"):
        record(bare, PROBLEMS, tmp_path / "c", server=plain, monitor=ProbeMonitor(model, probe), sampling=GREEDY)
    engine.worker.parallel_config = SimpleNamespace(pipeline_parallel_size=2)
    with pytest.raises(InputError, match="does not sample if the model is served pipeline-parallel"):
        record(bare, PROBLEMS, tmp_path / "d", server=watched, monitor=monitor, sampling=GREEDY)
    engine.worker.parallel_config = None
    engine.lie = "no lens"
    reads = EngineMonitor(bare, probe)
    writer = vllm_writer(address, bare, served_as="m", look=reads.look)
    with pytest.raises(InputError, match=r"did not read the probe at resid_post\.2"):
        list(writer.stream([model.encode_prompt(PROBLEMS[0])], GREEDY, [0]))


def test_from_the_command_line(address, engine, probe, tmp_path, monkeypatch):
    probe.save(tmp_path / "mine.safetensors")
    told = [
        "record",
        "--backend",
        "vllm",
        "--server",
        address,
        "--served-as",
        "m",
        "--n",
        "2",
        "--temperature",
        "0",
        "--max-new-tokens",
        "40",
    ]
    done = CliRunner().invoke(
        app,
        [
            *told,
            "--sites",
            "",
            "--monitor",
            f"{tmp_path}/mine.safetensors",
            "--stop-above",
            "0.5",
            "--out",
            f"{tmp_path}/run/store",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "traces was closed above 0.5" in done.output
    (path,) = (tmp_path / "run" / "scores").glob("*.safetensors")
    assert read_scores(path).scores.keys() == set(TraceStore.open(tmp_path / "run" / "store").ids)
