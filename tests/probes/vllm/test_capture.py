"""What vLLM gives while it writes is what the hooks read afterwards, and what it should not give is not believed."""

import json
import time
from dataclasses import replace

import pytest
import torch
from fake_vllm import served, serving

from reasonscope.data.errors import InputError, SiteError, StoreError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import load_prompting
from reasonscope.probes.vllm.writer import _begins_again, vllm_writer

pytest.importorskip("openai")
GREEDY = Sampling(temperature=0, max_new_tokens=6)
SITES = [Site("resid_post", 1), Site("resid_pre", 3), Site("resid_post", 5)]
PROBLEMS = load_problems("ledger", n=5)


@pytest.fixture
def writer(engine):
    with serving(engine) as url:
        yield vllm_writer(url, load_prompting("organism"), served_as="m", workers=2)


def same_states(found, expected):
    """To float32's rounding: some states are thousands long, and sums of other shapes end in other bits."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    torch.testing.assert_close(found, expected, atol=1e-6 * float(expected.norm(dim=-1).max()), rtol=1e-4)


def test_states_and_tokens_are_those_of_the_hooks(writer, engine, model):
    prompts = [model.encode_prompt(problem) for problem in PROBLEMS]
    found = {i: (done, states) for i, done, states in writer.stream(prompts, GREEDY, [0] * 5, SITES)}
    alone = generate(model, prompts, GREEDY, seeds=[0] * 5)
    for i, ours in enumerate(alone):
        done, states = found[i]
        assert done.token_ids.tolist() == ours.token_ids.tolist() and done.finish_reason == ours.finish_reason
        (read,) = replay(model, [done.token_ids.tolist()], SITES)
        for site in SITES:
            same_states(states[site], read[site])
    told = engine.asked[0]["vllm_xargs"]
    assert told == {"output_residual_stream": "[1, 2, 5]", "activations_transport": "binary"}


@pytest.mark.parametrize("site", ["z.1", "resid_pre.0", "resid_post.6", "mlp_out.2"])
def test_other_sites_are_refused_by_name(writer, site):
    with pytest.raises(SiteError, match=rf"no {site}"):
        next(writer.stream([[1, 2]], GREEDY, [0], [Site.parse(site)]))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("shape", "sent activations of"),
        ("nan", "NaN or infinite"),
        ("longer", "bytes or more for activations"),
        ("ids", "spell"),
        ("no lens", "sent no activations; install vllm-lens"),
    ],
)
def test_a_lying_server_is_an_error(writer, engine, model, lie, message):
    engine.lie = lie
    with pytest.raises(InputError, match=message):
        list(writer.stream([model.encode_prompt(PROBLEMS[0])], GREEDY, [0], SITES))


def test_activations_that_a_full_buffer_dropped_are_asked_for_again(writer, engine, model):
    engine.keep_at_most = 0
    asked = replace(writer, retries=0)
    with pytest.raises(InputError, match=r"no activations in 1 tries.*VLLM_LENS_ACT_MAX_BYTES"):
        list(asked.stream([model.encode_prompt(PROBLEMS[0])], GREEDY, [0], SITES))
    assert len(engine.asked) == 1


def test_a_sequence_that_the_engine_read_twice_is_asked_for_again(writer, engine, model):
    """vllm-lens appends the rows of a second reading, and cuts off the end."""
    engine.lie = "preempted"
    prompt = model.encode_prompt(PROBLEMS[0])
    ((_, done, states),) = replace(writer, retries=1).stream([prompt], GREEDY, [0], SITES)
    (read,) = replay(model, [done.token_ids.tolist()], SITES)
    same_states(states[SITES[0]], read[SITES[0]])
    assert len(engine.asked) == 2


def test_repeated_tokens_are_not_taken_for_a_second_reading():
    rows = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    again = torch.cat([rows, rows])
    assert _begins_again(again, list(range(18)))
    assert not _begins_again(rows, list(range(9)))
    assert not _begins_again(torch.ones(6, 8), [5] * 6)


def test_a_recording_streams_into_the_store_and_goes_on_after_a_kill(writer, engine, model, tmp_path, monkeypatch):
    monkeypatch.setattr("reasonscope.probes.vllm.verified._SECONDS", 0.0)  # every trace is checked by itself
    how = {"sites": "resid_post.1,resid_post.5", "sampling": GREEDY, "server": replace(writer, retries=0, workers=1)}
    bare = load_prompting("organism")
    engine.lie = "dies after 5"
    with pytest.raises(InputError, match="cannot read"):
        record(bare, PROBLEMS, tmp_path / "run", **how)
    engine.lie = ""
    before, kept = len(engine.asked), len(TraceStore.open(tmp_path / "run"))
    store = record(bare, PROBLEMS, tmp_path / "run", **how)
    whole = record(model, PROBLEMS, tmp_path / "hooks", sites=how["sites"], sampling=GREEDY)
    assert sorted(store.ids) == sorted(whole.ids)
    for id in store.ids:
        assert store.trace(id).token_ids.tolist() == whole.trace(id).token_ids.tolist()
        for site in store.sites:
            same_states(store.activations(id, site), whole.activations(id, site))
    written = [body for body in engine.asked[before:] if body["max_tokens"] == 6]
    assert 1 <= kept < 5 and len(written) == 5 - kept
    assert "answered" in store.meta["server"]


def test_another_model_under_the_same_name_mixes_nothing(writer, engine, model, tmp_path, monkeypatch):
    monkeypatch.setattr("reasonscope.probes.vllm.verified._SECONDS", 0.0)
    bare, base = load_prompting("organism"), load_model("organism-base", dtype="float32")
    how = {"sites": "resid_post.5", "sampling": GREEDY, "server": replace(writer, workers=1)}
    record(bare, PROBLEMS[:2], tmp_path / "run", **how)
    reply, swap_after, own, other = engine.reply, len(engine.asked) + 4, engine.hf, served(base.hf)

    def swapped(body):
        with engine.lock:  # not while it writes for another request
            engine.hf = other if len(engine.asked) > swap_after else own
        return reply(body)

    engine.reply = swapped
    with pytest.raises(StoreError, match="another model answers"):
        record(bare, PROBLEMS, tmp_path / "run", **how)
    store = record(model, PROBLEMS, tmp_path / "hooks", sampling=GREEDY)
    mixed = TraceStore.open(tmp_path / "run")
    for id in mixed.ids:
        assert mixed.trace(id).token_ids.tolist() == store.trace(id).token_ids.tolist()
    with pytest.raises(StoreError, match="another model answers"):  # and a resumed run notices at once
        record(bare, PROBLEMS, tmp_path / "run", **how)


def test_what_was_written_around_a_restart_is_written_again(writer, engine, tmp_path, monkeypatch):
    monkeypatch.setattr("reasonscope.probes.vllm.verified._SECONDS", 0.0)
    reply = engine.reply

    def restarting(body):
        engine.started = 1000.0 + (len(engine.asked) > 3)
        return reply(body)

    engine.reply = restarting
    how = {"sites": "resid_post.5", "sampling": GREEDY, "server": replace(writer, workers=1)}
    store = record(load_prompting("organism"), PROBLEMS[:3], tmp_path / "run", **how)
    asked = [json.dumps(body["prompt"]) for body in engine.asked if body["max_tokens"] == 6]
    assert len(store) == 3 and len(asked) == 4 and len(set(asked)) == 3


def test_no_more_is_written_than_is_taken(writer, engine, model):
    """At most `workers` completions wait and as many are being written, so memory does not grow with the run."""
    prompts = [model.encode_prompt(PROBLEMS[i % 5]) for i in range(12)]
    stream = writer.stream(prompts, replace(GREEDY, max_new_tokens=1), [0] * 12, SITES)
    next(stream)
    time.sleep(1.0)
    assert len(engine.asked) <= 1 + 2 * writer.workers + 1
    stream.close()
    asked = len(engine.asked)
    time.sleep(0.2)
    assert len(engine.asked) == asked
