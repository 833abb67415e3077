"""The methods by name: each extracts from a run of the organism, at its own sites, within its own scope."""

import random
from dataclasses import asdict

import numpy as np
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.organism.tokenizer import chat
from reasonscope.data.organism.writer import write_ledger
from reasonscope.data.parse import build_trace
from reasonscope.data.problems import ledger_of, load_problems
from reasonscope.data.store import TraceStore
from reasonscope.data.trace import Sampling
from reasonscope.probes.model import load_model
from reasonscope.probes.sites import Site
from reasonscope.steering.methods import METHODS, method

SITES = [f"{point}.{layer}" for layer in range(6) for point in ("resid_pre", "resid_post")]
FROM_STATES = ("seal", "asc", "asc-thinking", "strength", "efficiency")


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


@pytest.mark.parametrize("name", FROM_STATES)
def test_a_method_extracts_from_recorded_states_at_its_own_sites(name, model, store):
    chosen = method(name)
    vector = chosen.vector(model, store, store.ids)
    vector.check(model)
    assert len(vector.provenance["groups"]) == 6 and all(vector.norms.values())
    assert set(vector.directions) == set(chosen.sites(model))


def test_paper_layers_are_shares_of_the_depth(model):
    assert method("seal").sites(model) == (Site("resid_post", 3),)
    assert method("speed").sites(model) == (Site("resid_post", 4), Site("resid_post", 5))
    assert method("strength").sites(model) == tuple(Site("resid_pre", layer) for layer in range(6))


def test_every_method_has_a_scope_and_strengths(model):
    for chosen in METHODS.values():
        chosen.scope(model)
        assert chosen.summary and all(chosen.strengths)


def test_what_a_run_cannot_teach_is_said(model, store):
    with pytest.raises(InputError, match=r"0 harmful|positions from the end"):
        method("refusal").vector(model, store, store.ids)
    with pytest.raises(InputError, match="of 2 pairs 0 are right"):  # four tokens are too few for any answer
        method("speed").vector(model, store, [id for id in store.ids if id.startswith(store.ids[0].split("-brief")[0])])
    with pytest.raises(InputError, match="no steering method is called"):
        method("soap")
