"""A recipe in vLLM writes what the same recipe writes with hooks, or is refused by name."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reasonscope.analysis.runs.runner import AnalysisTask
from reasonscope.data.errors import InputError, SiteError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.branches import Branch
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.prompting import load_prompting
from reasonscope.probes.vllm.address import check_address
from reasonscope.probes.vllm.identity import check_vectors
from reasonscope.probes.vllm.steering import Shipped
from reasonscope.probes.vllm.writer import vllm_writer
from reasonscope.steering.engine.in_engine import in_engine
from reasonscope.steering.engine.shipping import shipped
from reasonscope.steering.recipes.recipe import DecodingPart, Recipe, RecipePart
from reasonscope.steering.vectors.vector import SteeringVector

pytest.importorskip("openai")
GREEDY = Sampling(temperature=0, max_new_tokens=40)
SITE = Site("resid_post", 5)
PROBLEMS = load_problems("ledger", n=2)


def vector(*sites, seed=0, length=60.0):
    drawn = np.random.default_rng(seed)
    directions = {Site.parse(s): (drawn.standard_normal(128) * length / 128**0.5).astype(np.float32) for s in sites}
    return SteeringVector(directions=directions, method="test", provenance={})


def recipe(*parts, **more):
    return Recipe(name="tried", parts=parts, **more)


RECIPES = {
    "static": recipe(RecipePart(vector=vector("resid_post.2", "resid_post.3"), strength=0.5)),
    "resid_pre": recipe(RecipePart(vector=vector("resid_pre.3", "resid_pre.0"), scope={"generation_window": (0, None)})),
    "last of the prompt": recipe(RecipePart(vector=vector("resid_post.2", length=300.0), scope={"prompt_positions": (-1,)})),
    "thinking": recipe(RecipePart(vector=vector("resid_post.2"), scope={"on": "think"})),
    "separators": recipe(RecipePart(vector=vector("resid_post.2", length=300.0), scope={"on": "think", "steps": "separators"})),
    "closing window": recipe(RecipePart(vector=vector("resid_post.3", length=300.0), scope={"on": "close_window"})),
    "clamp": recipe(
        RecipePart(vector=vector("resid_post.3"), operator={"name": "clamp", "to": 200.0}, scope={"on": "think"}),
        RecipePart(vector=vector("resid_post.3", seed=1), scope={"tokens": (5, 9, 13)}),
    ),
    "ablate": recipe(RecipePart(vector=vector("resid_post.1", "resid_post.4"), operator={"name": "ablate"})),
    "kinds of steps": recipe(
        RecipePart(vector=vector("resid_post.2"), scope={"steps": "execution"}),
        RecipePart(vector=vector("resid_post.3"), operator={"name": "rotate"}, strength=0.3, scope={"steps": "reflection"}),
    ),
    "prefill": recipe(RecipePart(vector=vector("resid_post.2"), scope={"on": "think"}), prefill="First"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bare():
    return load_prompting("organism")


@pytest.fixture(scope="module")
def finished(model):
    """Whole completions: the last tokens close the thinking and answer."""
    prompts = [model.encode_prompt(problem) for problem in PROBLEMS]
    done = generate(model, prompts, replace(GREEDY, max_new_tokens=400), seeds=[0, 0])
    assert all(one.finish_reason == "stop" for one in done)
    return [one.token_ids.tolist() for one in done]


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_are_those_of_the_hooks(address, engine, model, bare, finished, name):
    steering = in_engine(RECIPES[name], bare)
    condition = RECIPES[name].condition(model, measure=False)
    prompts = [model.encode_prompt(problem, prefill=steering.prefill) for problem in PROBLEMS]
    if name == "closing window":
        prompts = [prompt[:-12] for prompt in finished]
    writer = vllm_writer(address, bare, steering=steering, served_as="m", workers=2)
    found = {i: (done, states[SITE]) for i, done, states in writer.stream(prompts, GREEDY, [0, 0], [SITE])}
    edits = condition.intervention
    ours = generate(model, prompts, GREEDY, seeds=[0, 0], write=edits.edits, on_step=edits.on_step)
    assert edits.n_edited > 0
    for i, alone in enumerate(ours):
        done, states = found[i]
        assert done.token_ids.tolist() == alone.token_ids.tolist()
        edits.begin([len(prompts[i])])
        (steered,), (plain,) = (replay(model, [done.token_ids.tolist()], [SITE], write=w) for w in (edits.edits, None))
        torch.testing.assert_close(states, steered[SITE], atol=2e-3, rtol=1e-4)  # some states are thousands long
        assert not torch.allclose(states, plain[SITE], atol=0.1)
    assert {body["cache_salt"] for body in engine.asked} == {f"reasonscope {RECIPES[name].hash}"}


def test_a_steered_recording_says_so_and_has_the_steered_states(address, model, bare, tmp_path):
    one = RECIPES["thinking"]
    writer = vllm_writer(address, bare, steering=in_engine(one, bare), served_as="m", workers=2)
    how = {"sites": "resid_post.2,resid_post.4", "sampling": replace(GREEDY, max_new_tokens=12), "steer": one}
    store = record(bare, PROBLEMS, tmp_path / "engine", server=writer, **how)
    ours = record(model, PROBLEMS, tmp_path / "hooks", **how)
    assert store.meta["steered"] == ours.meta["steered"] and store.recipe is not None and store.recipe.exists()
    for trace in ours:
        assert store.trace(trace.id).token_ids.tolist() == trace.token_ids.tolist()
        assert store.trace(trace.id).meta["steered"]["hash"] == one.hash
        for site in store.sites:
            there, here = (s.activations(trace.id, site) for s in (store, ours))
            np.testing.assert_allclose(there, here, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="steered otherwise"):
        record(bare, PROBLEMS, tmp_path / "other", server=writer.plain, **how)


def test_a_continuation_of_a_steered_text_knows_what_was_prompt(address, model, bare):
    one = recipe(RecipePart(vector=vector("resid_post.2", length=300.0), scope={"generation_window": (3, 6)}))
    prompt = model.encode_prompt(PROBLEMS[0])
    whole = vllm_writer(address, bare, steering=in_engine(one, bare), served_as="m").complete([prompt], GREEDY, [0])[0]
    again = vllm_writer(address, bare, steering=in_engine(one, bare, [prompt]), served_as="m")
    cut = len(prompt) + 8
    rest = again.complete([whole.token_ids[:cut].tolist()], replace(GREEDY, max_new_tokens=32), [0])[0]
    assert rest.token_ids.tolist() == whole.token_ids[: len(rest.token_ids)].tolist()


def test_rollouts_of_a_steered_run_are_written_by_the_steered_engine(address, model, tmp_path):
    one = RECIPES["thinking"]
    how = {"sampling": replace(GREEDY, max_new_tokens=24), "steer": one}
    store = record(model, PROBLEMS, tmp_path / "run" / "store", sites=(), **how)
    told = {"traces": [store.ids[0]], "server": address, "served_as": "m"}
    writer = AnalysisTask.of(tmp_path / "run", "anchors", **told).study().writer
    trace = store.trace(store.ids[0])
    cut = trace.n_prompt_tokens + 8
    (done,) = writer(trace.token_ids, [Branch(cut=cut, seed=0)], replace(GREEDY, max_new_tokens=16))
    assert done.token_ids.tolist() == trace.token_ids.tolist()


def test_a_server_that_ignores_vectors_is_noticed(address, engine, bare, tmp_path):
    """Without vllm-lens, vLLM takes the field and does nothing with it."""
    one = RECIPES["static"]
    writer = vllm_writer(address, bare, steering=in_engine(one, bare), served_as="m")
    check_vectors(writer)
    engine.lie = "no vectors"
    with pytest.raises(InputError, match=r"does not add the vector of tried at resid_post\.2"):
        record(bare, PROBLEMS, tmp_path / "run", sampling=GREEDY, server=writer, steer=one)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (recipe(decoding=(DecodingPart(name="tip", value=1.0),)), InputError, "how tokens are chosen.*tip"),
        (recipe(RecipePart(vector=vector("mlp_out.2"))), SiteError, "not mlp_out.2"),
        (recipe(RecipePart(vector=vector("resid_post.6"))), SiteError, "6 layers"),
        (recipe(RecipePart(vector=replace(vector("resid_post.2"), directions={Site("resid_post", 2): np.ones(8, np.float32)}))),
         InputError, "width 8"),
        (recipe(RecipePart(vector=replace(vector("resid_post.2"), provenance={"model": {"architecture": "llama"}}))),
         InputError, "made from a llama"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_by_name(bare, wrong, error, message):
    with pytest.raises(error, match=message):
        in_engine(wrong, bare)


def test_an_error_in_the_worker_is_an_error_here(address, engine, model, bare):
    """vllm-lens would log it, and go on without steering."""
    begin = engine.worker.begin

    def broken(*told):
        begin(*told)
        engine.worker.model_runner = SimpleNamespace(input_batch=None)

    engine.worker.begin = broken
    writer = vllm_writer(address, bare, steering=in_engine(RECIPES["thinking"], bare), served_as="m")
    with pytest.raises(InputError, match="could not steer by tried: AttributeError"):
        writer.complete([model.encode_prompt(PROBLEMS[0])], GREEDY, [0])
    engine.lie = "no lens"
    with pytest.raises(InputError, match=r"ran the hook of tried on 0 of \d+ tokens"):
        writer.complete([model.encode_prompt(PROBLEMS[0])], GREEDY, [0])


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
def test_code_goes_to_this_machine(url):
    check_address(url)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.3:8000", "https://example.com", "http://127.0.0.1.example.com", "nonsense"]
)
def test_code_goes_nowhere_else_unless_told(url, bare):
    with pytest.raises(InputError, match=r"travels as code.*--trust-server"):
        vllm_writer(url, bare, steering=in_engine(RECIPES["thinking"], bare))
    check_address(url, trusted=True)
    vllm_writer(url, bare, steering=in_engine(RECIPES["static"], bare))  # a vector is no code
    vllm_writer(url, bare)


def test_the_hook_works_in_a_process_that_has_no_reasonscope(bare):
    """And is pickled again there, as the API server does for its workers."""
    told = json.dumps({"parts": [], "marks": None})
    packed = pickle.dumps(Shipped(shipped("reasonscope.steering.engine.worker", "EngineHook", told, 5)))
    code = f"""
import pickle, sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "reasonscope":
            raise ImportError(name)
sys.meta_path.insert(0, Without())
once = pickle.loads({packed!r})
twice = pickle.loads(pickle.dumps(once))
print(type(twice).__name__, twice._n_prompt, [m for m in sys.modules if m.partition(".")[0] == "reasonscope"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "EngineHook 5 []"
