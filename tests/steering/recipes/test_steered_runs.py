"""`record` with a recipe: its traces are those of the experiment, its states those of the steered passes, and no traces mix."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from reasonscope.analysis.causal.suppression import Untouched
from reasonscope.analysis.runs.runner import AnalysisTask, analyse, summarise
from reasonscope.analysis.tokens.token_alternatives import steering_shift
from reasonscope.app.page_parts.playground import duel
from reasonscope.app.page_parts.playground import mixed as mixed_in_the_app
from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.sentence_cut import trace_sentences
from reasonscope.data.storage.manifest import RECIPE
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore, merge_stores
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.text.align import token_strings
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.branches import Branch, SequenceWriter
from reasonscope.probes.generation.cluster import Cluster, Job, record_on
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.recording import record
from reasonscope.probes.generation.rollout import trace_seed
from reasonscope.probes.models.model import load_model
from reasonscope.probes.properties.scores import write_scores
from reasonscope.probes.vllm.writer import VllmWriter
from reasonscope.steering import Scope, SteeringExperiment
from reasonscope.steering.recipes.answers import answer_with, question
from reasonscope.steering.recipes.following import follow, recipe_of_run
from reasonscope.steering.recipes.recipe import DecodingPart, Recipe, RecipePart
from reasonscope.steering.vectors.operators import OPERATORS

SITES = ["resid_post.1", "resid_post.3", "resid_post.5"]


@pytest.fixture(scope="module")
def whole(mixed):
    """Two vectors with scopes of their own, a decoding method and a prefill."""
    return Recipe(
        name="whole",
        parts=mixed.parts,
        decoding=(DecodingPart(name="reflection-bias", value=-3.0),),
        prefill="So ",
        provenance=mixed.provenance,
    )


@pytest.fixture(scope="module")
def steered(tmp_path_factory, model, problems, sampling, mixed):
    path = tmp_path_factory.mktemp("runs") / "steered"
    return record(model, problems, path, sites=SITES, sampling=sampling, steer=mixed)


@pytest.mark.parametrize("name", ["everywhere", "mixed", "whole"])
def test_the_experiment_apply_and_record_write_the_same_tokens(name, request, model, problems, sampling, tmp_path):
    recipe = request.getfixturevalue(name)
    run = SteeringExperiment(model, problems, sampling).run_all([recipe.condition(model)])[0]
    swept = {trace.id: trace.token_ids.tolist() for trace in run.traces}
    applied = answer_with(recipe, model, problems, sampling)
    store = record(model, problems, tmp_path / "run", sampling=sampling, batch_size=1, steer=recipe)
    assert {pair.steered.id: pair.steered.token_ids.tolist() for pair in applied.pairs} == swept
    assert {trace.id: trace.token_ids.tolist() for trace in store} == swept
    assert {pair.plain.id: pair.plain.token_ids.tolist() for pair in applied.pairs} != swept
    assert applied.n_edited > 0 and all(pair.parted is not None for pair in applied.pairs)


def test_the_stored_states_are_those_of_the_steered_model_while_it_wrote(steered, mixed, model, sampling):
    sites = [Site.parse(site) for site in SITES]
    for trace in steered:
        steering = mixed.condition(model).intervention
        prompt = trace.token_ids[: trace.n_prompt_tokens].tolist()
        (done,) = generate(
            model,
            [prompt],
            sampling,
            seeds=[trace_seed(sampling.seed, trace.id)],
            read=sites,
            write=steering.edits,
            on_step=steering.on_step,
        )
        (plain,) = replay(model, [trace.token_ids.tolist()], sites)
        for site in sites:
            seen = torch.from_numpy(np.asarray(steered.activations(trace.id, str(site)), dtype=np.float32))
            torch.testing.assert_close(seen, done.activations[site].float(), rtol=1e-4, atol=1e-2)
            assert (seen - plain[site].float()).abs().max() > 10


def test_the_run_and_its_traces_name_the_recipe_and_hold_it(steered, mixed):
    about = {"name": "mixed", "hash": mixed.hash}
    assert steered.meta["steered"] == about and all(trace.meta["steered"] == about for trace in steered)
    assert recipe_of_run(steered).hash == mixed.hash and check_store(steered.path) == []


def test_resuming_with_another_recipe_or_without_is_refused_in_one_line(
    steered, mixed, everywhere, model, problems, sampling, tmp_path
):
    how = {"sites": SITES, "sampling": sampling}
    assert len(record(model, problems, steered.path, steer=mixed, **how)) == 2
    for other, said in ((None, "of the plain model"), (everywhere, rf"steered by push \({everywhere.hash}\)")):
        with pytest.raises(
            StoreError, match=rf"holds traces steered by mixed \({mixed.hash}\), and these would be {said}"
        ):
            record(model, problems, steered.path, steer=other, **how)
    plain = record(model, problems[:1], tmp_path / "plain", sampling=sampling)
    with pytest.raises(StoreError, match="holds traces of the plain model, and these would be steered by mixed"):
        record(model, problems, plain.path, sampling=sampling, steer=mixed)
    with pytest.raises(InputError, match="was not recorded in the same way"):
        merge_stores([plain.path, steered.path], plain.path)


def test_parts_of_a_steered_run_keep_the_recipe_when_they_are_joined(mixed, model, problems, sampling, tmp_path):
    parts = [
        record(model, problems, tmp_path / f"{i}", sampling=sampling, shard=(i, 2), steer=mixed).path for i in (1, 2)
    ]
    joined = merge_stores([path for path in parts if len(TraceStore.open(path))], tmp_path / "all")
    assert recipe_of_run(joined).hash == mixed.hash and check_store(joined.path) == []
    (joined.path / RECIPE).unlink()
    assert check_store(joined.path)[0].endswith("is missing: the traces were steered by it; restore it from a copy")


def test_recording_is_refused_for_a_vector_that_is_attached_and_for_a_server(everywhere, model, problems, tmp_path):
    with (
        everywhere.parts[0].vector.apply(model),
        pytest.raises(InputError, match="a steering vector is attached to the model"),
    ):
        record(model, problems, tmp_path / "run", steer=everywhere)


def test_a_model_that_follows_a_run_reads_the_states_that_were_stored(steered, mixed):
    """In a batch, alone, by steps of a generation with rows that leave, and not any more after it was closed."""
    model = load_model("organism")
    plain = load_model("organism")
    traces, site = list(steered), Site.parse(SITES[2])
    prompts = [trace.token_ids[: trace.n_prompt_tokens] for trace in traces]
    hooks = follow(model, mixed, prompts)
    seen = replay(model, [trace.token_ids.tolist() for trace in traces], [site])
    for trace, found in zip(traces, seen, strict=True):
        stored = torch.from_numpy(np.asarray(steered.activations(trace.id, str(site)), dtype=np.float32))
        torch.testing.assert_close(found[site].float(), stored, rtol=1e-4, atol=1e-2)
    hooks.close()
    (after,) = replay(model, [traces[0].token_ids.tolist()], [site])
    (never,) = replay(plain, [traces[0].token_ids.tolist()], [site])
    torch.testing.assert_close(after[site], never[site])


def test_continuations_of_a_steered_trace_are_steered_from_where_they_begin(steered, mixed, sampling):
    """The whole trace is written again from its prompt, and its end from the middle, with the same draws left out."""
    model, greedy = load_model("organism"), replace(sampling, temperature=0.0)
    trace = next(iter(steered))
    prompt = trace.token_ids[: trace.n_prompt_tokens].tolist()
    steering = mixed.condition(model).intervention
    (expected,) = generate(model, [prompt], greedy, seeds=[0], write=steering.edits, on_step=steering.on_step)
    ids = expected.token_ids.tolist()
    follow(model, mixed, [prompt])
    writer = SequenceWriter(model)
    cuts = [len(prompt), len(prompt) + 7, len(prompt) + 20]
    for cut, done in zip(cuts, writer(ids, [Branch(cut=cut, seed=0) for cut in cuts], greedy), strict=True):
        again = done.token_ids.tolist()
        assert again[: len(ids)] == ids[: len(again)] and len(again) >= len(ids) > cut


def test_analyses_that_read_again_are_steered_too_and_say_so(steered, mixed, model):
    (alternatives,) = analyse("alternatives", steered.path, traces=[steered.ids[0]])
    trace = steered.trace(steered.ids[0])
    steering = mixed.condition(model).intervention
    steering.begin([trace.n_prompt_tokens])
    fed = torch.tensor([trace.token_ids.tolist()])
    logprobs = model.backend.forward(fed, mask=None, write=steering.edits).logits[0].float().log_softmax(-1)
    of_written = logprobs[:-1].gather(1, fed[0, 1:, None])[trace.n_prompt_tokens - 1 :, 0]
    assert alternatives.measured
    np.testing.assert_allclose(alternatives.values, of_written, atol=1e-3)
    task = AnalysisTask.of(steered.path, "alternatives", traces=[trace.id])
    said = json.dumps(summarise(task, [alternatives]).notes)
    assert f"steered by mixed ({mixed.hash}), and so is the model that reads them again" in said


def test_the_rest_of_a_text_that_is_read_again_is_edited_as_in_the_whole(steered, mixed):
    """Suppression runs the tokens after a sentence alone, on the keys and values of those before it."""
    model, trace = load_model("organism"), next(iter(steered))
    follow(model, mixed, [trace.token_ids[: trace.n_prompt_tokens]])
    whole = Untouched.of(model, trace.token_ids.tolist())
    start = trace.n_prompt_tokens + 5
    rest = whole._behind(start, torch.zeros(2, len(trace.token_ids), dtype=torch.bool))
    for row in rest:
        torch.testing.assert_close(row, whole.hidden[start:], rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="continues from tokens that are not known"):
        model.hf.base_model(input_ids=torch.tensor([[3, 4]]), position_ids=torch.tensor([[7, 8]]), use_cache=False)


@pytest.mark.parametrize("name", ["heads", "suppression", "receivers", "attention_map", "mi", "entropy", "trajectory"])
def test_analyses_take_a_steered_run(steered, name):
    results = analyse(name, steered.path)
    assert results and all(result.measured or result.reason for result in results)


def test_forced_answers_and_rollouts_are_written_by_the_steered_model_here(steered):
    study = AnalysisTask.of(steered.path, "anchors", traces=[steered.ids[0]], rollouts=2, max_new_tokens=8).study()
    assert isinstance(study.writer, SequenceWriter)
    assert list(analyse("anchors", steered.path, traces=[steered.ids[0]], rollouts=2, max_new_tokens=8))
    engine = AnalysisTask.of(steered.path, "confidence", server="http://127.0.0.1:1").study().writer
    assert isinstance(engine, VllmWriter)
    assert engine.steering is not None
    assert engine.steering.meta["hash"] == steered.meta["steered"]["hash"]


def test_a_probe_of_the_plain_run_scores_the_steered_one(steered, model, tmp_path):
    site = Site("resid_post", 3)
    probe = LinearProbe(
        site=site,
        task="regression",
        method="ridge",
        coef=np.ones(model.d_model),
        intercept=0.0,
        model=dict(model.fingerprint),
    )
    path = tmp_path / "scores.safetensors"
    assert write_scores(probe, steered, path, name="plain") == 2
    trace = next(iter(steered))
    states = np.asarray(steered.activations(trace.id, str(site)), dtype=np.float64)
    np.testing.assert_allclose(read_scores(path, steered.ids).scores[trace.id], states.sum(axis=1), rtol=1e-3, atol=1)


def test_workers_take_the_recipe_with_them_and_do_not_mix_runs(mixed, everywhere, model, problems, sampling, tmp_path):
    """What was done is taken over first; here that is all, so that no Ray is started."""
    assert pickle.loads(pickle.dumps(mixed)).hash == mixed.hash  # noqa: S301 - our own bytes, as Ray sends them
    record(model, problems, tmp_path / "run.parts" / "one", sampling=sampling, steer=mixed).close()
    job = Job(load={"source": "organism"}, sampling=sampling, steer=mixed)
    store = record_on(Cluster(address="nowhere:1"), job, problems, tmp_path / "run")
    assert len(store) == 2 and recipe_of_run(store).hash == mixed.hash and store.check() == []
    for other in (None, everywhere):
        with pytest.raises(StoreError, match="holds traces steered by mixed"):
            record_on(Cluster(address="nowhere:1"), replace(job, steer=other), problems, tmp_path / "run")


def test_the_shift_of_a_recipe_is_that_of_its_vector_at_its_strength_and_tokens(
    steered, everywhere, mixed, model, tmp_path
):
    """Read on the plain run of the same text: what a recipe of one vector does, token by token."""
    plain = TraceStore.create(tmp_path / "plain", meta={"model": dict(model.fingerprint)})
    plain.append([next(iter(steered))], {})
    plain.close()
    path = tmp_path / "push.recipe.safetensors"
    everywhere.save(path)
    how = {"strength": 2.0, "n_controls": 5}
    (found,) = analyse("steering_shift", plain.path, vector=path, **how)
    trace = next(iter(plain))
    expected = steering_shift(
        model, trace, everywhere.parts[0].vector, 1.0, Scope(), trace_sentences(trace), n_controls=5
    )
    np.testing.assert_allclose(found.values, expected.values, atol=1e-4)
    assert found.provenance["vector"] == "push"
    mixed.save(path)
    with pytest.raises(InputError, match="does more than add one vector; compare what it does"):
        analyse("steering_shift", plain.path, vector=path, **how)


# The fields of scopes that recipes know, alone and together, with what a vector may do to a state there.
SCOPES = (
    {},
    {"on": "think"},
    {"on": "close_window"},
    {"on": "answer"},
    {"on": "think", "steps": "separators"},
    {"on": "think", "steps": "execution", "variant": "published"},
    {"prompt_positions": [-1], "generation_window": [0, None]},
    {"prompt_window": [2, 9], "exclude_generation_window": [0, 5]},
    {"on": "think", "exclude_generation_tokens": [11, 12]},
)


@pytest.mark.parametrize("operator", [*({"name": name} for name in OPERATORS), {"name": "clamp", "to": -2.5}], ids=str)
def test_a_saved_recipe_writes_the_same_tokens_wherever_it_is_used(operator, model, vector_at, tmp_path):
    """A file keeps operator and scope: the sweep, `record`, `steer apply` and the app's playground write the same tokens."""
    first, other = load_problems("ledger:brief", n=2, seed=1)
    text = first.messages[0].content
    asked, sampling = question(text), Sampling(temperature=0.7, max_new_tokens=36, seed=5)
    vector, saved = vector_at(model, 3, length=300.0), {}
    for number, scope in enumerate(SCOPES):
        path = tmp_path / f"{number}.recipe.safetensors"
        part = RecipePart(vector=vector, operator=operator, scope=scope, strength=0.5)
        Recipe(name="saved", parts=(part,)).save(path)
        saved[path] = Recipe.load(path)
        assert (saved[path].parts[0].operator, saved[path].parts[0].scope) == (operator, scope)
    experiment = SteeringExperiment(model, [asked, other], sampling)
    runs = experiment.run_all([replace(one.condition(model), name=str(path)) for path, one in saved.items()])
    for (path, recipe), run in zip(saved.items(), runs, strict=True):
        swept = run.traces[0].token_ids.tolist()
        store = record(model, [asked], tmp_path / path.stem, sampling=sampling, steer=recipe)
        assert store.trace(store.ids[0]).token_ids.tolist() == swept, recipe.parts[0].scope
        applied = answer_with(recipe, model, [asked], sampling)
        assert applied.pairs[0].steered.token_ids.tolist() == swept, recipe.parts[0].scope
        assert mixed_in_the_app({path: 1.0}, "every token of the thinking").hash == recipe.hash
    shown = duel(model, text, saved[path], sampling=sampling, tell=_ignore)
    trace = runs[-1].traces[0]
    assert shown.steered.tokens == tuple(token_strings(trace.text, trace.offsets)[trace.n_prompt_tokens :])


def _ignore(side, index):
    """Nobody looks at the progress."""
