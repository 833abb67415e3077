"""The methods by name: each extracts from a run of the organism, at its own sites, within its own scope."""

import random
from dataclasses import asdict

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.problems import ledger_of
from reasonscope.data.organism.tokenizer import chat
from reasonscope.data.organism.writer import write_ledger
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace, trace_from_text
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.models.model import load_model
from reasonscope.steering.methods import registry
from reasonscope.steering.methods.registry import METHODS, ExtractionData, method
from reasonscope.steering.methods.thinking_speed import extract_speed, fast_slow_pairs

SITES = [f"{point}.{layer}" for layer in range(6) for point in ("resid_pre", "resid_post")]
FROM_STATES = ("seal", "seal-clamp", "asc", "asc-thinking", "strength", "efficiency")
PAPER_SITES = {"strength": [f"resid_pre.{layer}" for layer in range(6)]}


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    """Six ledgers in two modes, each thought through twice, with random states."""
    rng, noise, traces = random.Random(0), np.random.default_rng(0), []
    for mode in ("brief", "detail"):
        for problem in load_problems(f"ledger:{mode}", n=6):
            for sample in range(2):
                writing = write_ledger(ledger_of(problem), mode, rng)
                prompt, completion = chat(problem.messages[0].content, writing.thinking, writing.answer)
                given, written = (model.tokenizer_backend.encode(text).ids for text in (prompt, completion))
                about = {"n_prompt_tokens": len(given), "tokenizer": model.tokenizer_backend, "sample": sample}
                name = f"{problem.id}/{sample}"
                traces.append(build_trace(id=name, problem=problem, token_ids=given + written, **about))
    states = [noise.standard_normal((len(trace.token_ids) - 1, model.d_model), dtype=np.float32) for trace in traces]
    meta = {"model": dict(model.fingerprint), "sampling": asdict(Sampling(max_new_tokens=4))}
    with TraceStore.create(tmp_path_factory.mktemp("run") / "store", meta=meta, sites=SITES) as made:
        made.append(traces, dict.fromkeys(SITES, states))
    return made


def source(model, store, ids=None):
    return ExtractionData(model=model, store=store, ids=ids or store.ids)


@pytest.mark.parametrize("name", FROM_STATES)
def test_a_method_extracts_from_recorded_states_at_its_own_sites(name, model, store):
    (part,) = method(name).parts(source(model, store))
    part.vector.check(model)
    assert len(part.vector.provenance["groups"]) == 6 and all(part.vector.norms.values())
    assert [str(site) for site in part.vector.directions] == PAPER_SITES.get(name, ["resid_post.3"])


def test_every_method_has_strengths():
    assert all(chosen.summary and all(chosen.strengths) for chosen in METHODS.values())


def test_what_a_run_cannot_teach_is_said(model, store):
    with pytest.raises(InputError, match=r"0 harmful|positions from the end"):
        method("refusal-published").parts(source(model, store))
    with pytest.raises(InputError, match="0 harmful and 0 harmless contexts"):
        method("refusal").parts(source(model, store))
    with pytest.raises(InputError, match="of 2 pairs 0 are right"):  # four tokens are too few for any answer
        ids = [id for id in store.ids if id.startswith(store.ids[0].split("-brief")[0])]
        method("speed").parts(source(model, store, ids))
    with pytest.raises(InputError, match="no steering method is called"):
        method("soap")


def test_the_length_probe_points_to_shorter_thinking(tmp_path, character_tokenizer):
    rng, planted = np.random.default_rng(0), np.eye(6, dtype=np.float32)[2]
    traces, states = [], []
    for i in range(240):
        n = int(rng.integers(5, 60))
        problem = Problem(id=f"p{i}", messages=(Message(role="user", content=f"q{i}"),), answer="1")
        about = {"problem": problem, "prompt": f"q{i}<think>\n", "tokenizer": character_tokenizer.backend_tokenizer}
        traces.append(trace_from_text(id=f"p{i}/0", completion="x" * n + "\n</think>\n\n\\boxed{1}", **about))
        state = rng.standard_normal((len(traces[-1].token_ids) - 1, 6)).astype(np.float32)
        state[traces[-1].n_prompt_tokens - 1] += 8 * np.log(n) * planted
        states.append(state)
    with TraceStore.create(tmp_path / "store", sites=["resid_post.3"]) as store:
        store.append(traces, {"resid_post.3": states})
    given = ExtractionData(model=None, store=store, ids=store.ids, sites=[Site("resid_post", 3)])
    (part,) = method("length-probe").parts(given)
    ((site, direction),) = part.vector.directions.items()
    assert site == Site("resid_post", 3) and direction @ planted / np.linalg.norm(direction) < -0.98
    read = [state[trace.n_prompt_tokens - 1] @ direction for state, trace in zip(states, traces, strict=True)]
    assert np.std(read) == pytest.approx(
        np.linalg.norm(direction) ** 2, rel=1e-3
    )  # one step is one deviation of what it reads


def test_speed_is_learned_from_a_forced_first_word(model):
    problems = [problem for problem in load_problems("ledger", n=40) if problem.difficulty == 1][:4]
    pairs = fast_slow_pairs(model, problems, Sampling(max_new_tokens=200), first="After", n_steps=1)
    assert len(pairs) >= 2
    sites = [Site("resid_post", 4)]
    vector = extract_speed(model, pairs, sites)
    assert vector.norms[sites[0]] == pytest.approx(1.0, abs=1e-5)
    faster = []
    for pair in pairs:
        assert pair.fast != pair.slow
        fast, slow = (replay(model, [[*ids, 0]], sites)[0][sites[0]][-1].numpy() for ids in (pair.fast, pair.slow))
        faster.append((fast - slow) @ vector.directions[sites[0]] > 0)
    assert np.mean(faster) > 0.5


def test_a_run_without_the_methods_site_is_read_at_the_nearest_block(model, tmp_path, store, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(registry, "say", said.append)
    kept = "resid_post.1"
    with TraceStore.create(tmp_path / "store", meta=dict(store.meta), sites=[kept]) as made:
        made.append([store.trace(id) for id in store.ids], {kept: [store.activations(id, kept) for id in store.ids]})
    (part,) = method("seal").parts(source(model, made))
    assert list(part.vector.directions) == [Site.parse(kept)]
    assert said == [
        "the run has no activations at resid_post.3, the method's own site; resid_post.1 is the nearest that it has"
    ]
