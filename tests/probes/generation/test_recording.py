"""Recording: what is stored, that order and shards do not matter, that an interrupted run resumes to the same bytes."""

import weakref
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from unittest.mock import Mock

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonscope.data.errors import ContextError, InputError, SiteError, StoreError
from reasonscope.data.storage.manifest import Manifest
from reasonscope.data.text.think_tags import ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation import reading_pass
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.recording import _in_shard, as_numpy, as_tensor, record, record_written
from reasonscope.probes.generation.rollout import trace_seed
from reasonscope.probes.models import prompting
from reasonscope.probes.models.model import load_model, tell_other_weights
from reasonscope.probes.models.prompting import PromptOptions, as_recorded

recording = import_module("reasonscope.probes.generation.recording")  # the package calls its function by the same name
SITES = ["resid_post.2", "z.0", "router.0"]
HOT = Sampling(temperature=1.0, max_new_tokens=20, seed=7)
PROBLEMS = [
    Problem(id=f"p{i}", messages=(Message(role="user", content=f"{i} + {i * i} ="),), answer=str(i + i * i))
    for i in range(7)
] + [Problem(id="raw", prompt="abc")]


@pytest.fixture
def model(model_of):
    return model_of("qwen3_moe")


def run(model, path, problems=PROBLEMS, **kwargs):
    return record(model, problems, path, **{"sites": SITES, "sampling": HOT, "batch_size": 3, **kwargs})


def test_what_is_stored(model, tmp_path):
    store = run(model, tmp_path / "run", samples=2)
    assert sorted(store.ids) == sorted(f"{problem.id}/{n}" for problem in PROBLEMS for n in (0, 1))
    assert store.sites == tuple(SITES) and store.check() == []
    trace = store.trace("p3/1")
    assert trace.sample == 1 and trace.problem == PROBLEMS[3] and trace.model == model.fingerprint
    assert trace.sampling == replace(HOT, seed=trace_seed(7, "p3/1"))
    assert trace.text.startswith("<s>user: 3 + 9 =\n<think>\n")
    assert len(trace.logprobs) == len(trace.token_ids) - trace.n_prompt_tokens > 0
    (seen,) = replay(model, [trace.token_ids.tolist()], [Site.parse(site) for site in SITES])
    for site in SITES:
        stored = store.activations("p3/1", site)
        assert stored.shape[0] == len(trace.token_ids) - 1
        np.testing.assert_allclose(stored, seen[Site.parse(site)].numpy(), atol=2e-5)
    assert store.trace("p3/0").token_ids.tolist() != trace.token_ids.tolist()


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "phi3"])
@pytest.mark.parametrize("sampling", [HOT, replace(HOT, temperature=0.7), replace(HOT, temperature=0.0)])
def test_what_was_written_elsewhere_gets_the_scores_of_its_tokens(model_of, tmp_path, family, sampling):
    """What the reading pass measures is what decoding kept."""
    model = model_of(family)
    written = run(model, tmp_path / "run", PROBLEMS[:5], sites="resid_post.0", sampling=sampling)
    traces = [written.trace(id) for id in written.ids]
    unknown = [
        replace(trace, logprobs=np.full_like(trace.logprobs, np.nan), entropies=np.full_like(trace.entropies, np.nan))
        for trace in traces
    ]
    unknown[0] = replace(unknown[0], logprobs=None, entropies=None)
    read = record_written(model, unknown, tmp_path / "read", sites="resid_post.0", batch_size=3)
    for trace in traces:
        np.testing.assert_allclose(read.trace(trace.id).logprobs, trace.logprobs, atol=2e-4)
        np.testing.assert_allclose(read.trace(trace.id).entropies, trace.entropies, atol=2e-4)


@pytest.mark.parametrize("alone", [True, False])
def test_the_first_token_of_a_trace_without_a_prompt_has_no_score(model, tmp_path, alone):
    """A tokenizer without a BOS encodes an empty prompt to no token."""
    written = list(run(model, tmp_path / "run", PROBLEMS[:3], sites="resid_post.0"))
    bare = [replace(trace, n_prompt_tokens=0, logprobs=None, entropies=None) for trace in written]
    traces = bare if alone else [*bare[:2], replace(written[2], logprobs=None, entropies=None)]
    read = record_written(model, traces, tmp_path / "read", sites="resid_post.0")
    for trace in written[: len(bare) if alone else 2]:
        found = read.trace(trace.id)
        for scores, known in ((found.logprobs, trace.logprobs), (found.entropies, trace.entropies)):
            assert len(scores) == len(trace.token_ids) and np.isnan(scores[0]) and np.isfinite(scores[1:]).all()
            np.testing.assert_allclose(scores[trace.n_prompt_tokens :], known, atol=2e-4)
    assert np.isfinite(read.trace(written[2].id).entropies).all() is not alone


def test_states_leave_the_accelerator_as_soon_as_they_are_read(model, tmp_path, monkeypatch):
    """Only those of one pass are ever there."""
    there, replayed = weakref.WeakSet(), reading_pass.replay

    class Elsewhere:
        def __init__(self, states):
            self._states = states
            there.add(self)

        def cpu(self):
            return self._states

    def replay_elsewhere(*args, **kwargs):
        assert not there
        return [{site: Elsewhere(states) for site, states in one.items()} for one in replayed(*args, **kwargs)]

    traces = list(run(model, tmp_path / "run", PROBLEMS[:5], sites="resid_post.0"))
    monkeypatch.setattr(reading_pass, "_READ_TOKENS", 1)  # a pass per trace
    monkeypatch.setattr(reading_pass, "replay", replay_elsewhere)
    _, seen = reading_pass.read_traces(model, traces, [Site("resid_post", 0)])
    assert [states[Site("resid_post", 0)].shape[0] for states in seen] == [len(t.token_ids) - 1 for t in traces]


def test_a_model_that_scales_its_logits_leaves_the_scores_unknown(model, tmp_path, monkeypatch):
    written = run(model, tmp_path / "run", PROBLEMS[:1], sites="resid_post.0")
    (trace,) = (replace(written.trace(id), logprobs=None, entropies=None) for id in written.ids)
    monkeypatch.setattr(recording, "require_plain", lambda *_: None)
    handle = model.hf.register_forward_hook(lambda _module, _given, out: out.__setattr__("logits", out.logits * 3))
    read = record_written(model, [trace], tmp_path / "read", sites="resid_post.0")
    handle.remove()
    assert read.trace(trace.id).entropies is None


def test_neither_order_nor_batches_nor_shards_change_a_trace(model, tmp_path):
    whole = run(model, tmp_path / "whole")
    others = [
        run(model, tmp_path / "reversed", PROBLEMS[::-1], batch_size=5),
        *(run(model, tmp_path / f"{i}", shard=(i, 3), sites=()) for i in (1, 2, 3)),
    ]
    assert sorted(id for store in others[1:] for id in store.ids) == sorted(whole.ids)
    for store in others:
        for id in store.ids:
            assert store.trace(id).token_ids.tolist() == whole.trace(id).token_ids.tolist()
    assert others[1].sites == ()


@given(st.text(), st.integers(1, 40))
def test_each_problem_is_in_exactly_one_shard(id, parts):
    assert sum(_in_shard(id, (part, parts)) for part in range(1, parts + 1)) == 1


def test_an_interrupted_run_resumes_to_the_same_bytes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_SHARD_BYTES", 1)  # a shard a batch
    whole = run(model, tmp_path / "whole")
    batches, replayed = [], reading_pass.replay

    def interrupted(*args, **kwargs):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return replayed(*args, **kwargs)

    monkeypatch.setattr(reading_pass, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "run")
    monkeypatch.setattr(reading_pass, "replay", replayed)
    resumed = run(model, tmp_path / "run")
    assert len(whole.ids) == 8 and resumed.ids == whole.ids
    files = [{p.name: p.read_bytes() for p in (tmp_path / name / "shards").iterdir()} for name in ("whole", "run")]
    assert files[0] == files[1]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    assert run(model, tmp_path / "run").ids == whole.ids  # nothing is left to do
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")} == before


def test_complete_batches_are_kept_when_a_run_is_interrupted(model, tmp_path, monkeypatch):
    done, generated = [], recording.generate

    def interrupted(*args, **kwargs):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return generated(*args, **kwargs)

    monkeypatch.setattr(recording, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "run")
    monkeypatch.undo()
    assert len(recording.TraceStore.open(tmp_path / "run").ids) == 6
    assert len(run(model, tmp_path / "run", samples=2).ids) == 16  # and more samples may follow


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError("CUDA out of memory"), InputError("bad")])
def test_a_run_that_failed_before_its_first_trace_leaves_nothing(model, tmp_path, monkeypatch, error):
    monkeypatch.setattr(recording, "generate", Mock(side_effect=error))
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        run(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_first_trace_binds_nobody(model, tmp_path):
    """What SIGKILL leaves between the making of the store and its first trace."""
    meta = {"model": {"name": "other"}, "sampling": {}, "prompt": {}}
    recording.TraceStore.create(tmp_path / "run", meta=meta, sites=["z.1"]).close()
    (tmp_path / "run" / "shards" / "000000.parquet").write_bytes(b"begun")
    store = run(model, tmp_path / "run", PROBLEMS[:1])
    assert store.sites == tuple(SITES) and len(store) == 1 and store.check() == []


def test_a_part_without_problems_is_a_store_all_the_same(model, tmp_path):
    alone = PROBLEMS[:1]
    (own,) = (i for i in (1, 2) if _in_shard(alone[0].id, (i, 2)))
    assert len(run(model, tmp_path / "run", alone, shard=(3 - own, 2))) == 0
    assert recording.TraceStore.open(tmp_path / "run").check() == []


def test_progress_moves_with_every_token(model, tmp_path, heard, monkeypatch):
    seen, generated = [], recording.generate

    def follow(*args, on_step, **kwargs):
        def both(step):
            on_step(step)
            (work,) = heard
            seen.append((work.done, work.tokens, work.share, work.at_most))

        return generated(*args, on_step=both, **kwargs)

    monkeypatch.setattr(recording, "generate", follow)
    store = run(model, tmp_path / "run")
    (work,) = heard
    assert (work.what, work.unit, work.total, work.done, work.share) == ("recording", "traces", 8, 8, 1.0)
    assert work.tokens == sum(len(trace.logprobs) for trace in store)
    assert len({tokens for _, tokens, _, _ in seen}) > 20  # not once a batch
    shares = [share for _, _, share, _ in seen]
    assert shares == sorted(shares) and shares[0] == 0
    assert seen[0][3] and not seen[-1][3]  # the first batch has a bound, the last an estimate


def test_progress_counts_what_was_there(model, tmp_path, heard):
    run(model, tmp_path / "run", PROBLEMS[:3])
    run(model, tmp_path / "run")
    assert [(work.started_at, work.done, work.total) for work in heard] == [(0, 3, 3), (3, 8, 8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": replace(HOT, temperature=0.5)}, r"sampling.temperature: 1.0 \(now 0.5\)"),
        ({"sites": ["z.0"]}, r"sites: resid_post.2, z.0, router.0 \(now z.0\)"),
        ({"think": False}, r"prompt.think: True \(now False\)"),
    ],
)
def test_a_store_that_was_recorded_otherwise_is_refused(model, tmp_path, change, message):
    run(model, tmp_path / "run", PROBLEMS[:1])
    with pytest.raises(StoreError, match=message):
        run(model, tmp_path / "run", PROBLEMS[:1], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": (Message(role="user", content="2 + 2 ="),)}, r"'p1' .*messages: .*1 \+ 1 =.* \(now .*2 \+ 2 ="),
        ({"messages": (Message(role="system", content="1 + 1 ="),)}, r"messages: .*'user'.* \(now .*'system'"),
        ({"messages": (), "prompt": "1 + 1 ="}, r"prompt: None \(now 1 \+ 1 ="),
        ({"answer": "4"}, r"answer: 2 \(now 4\)\. Give another folder"),
        ({"answer": None}, r"answer: 2 \(now None\)"),
    ],
)
@pytest.mark.parametrize("shard", [(1, 1), (2, 2)])
def test_a_problem_that_was_changed_is_refused_and_what_changed_is_named(model, tmp_path, change, message, shard):
    stored = run(model, tmp_path / "run", PROBLEMS[:3], sites=())
    before = [trace.text for trace in stored]
    changed = [PROBLEMS[0], replace(PROBLEMS[1], **change), *PROBLEMS[2:5]]
    with pytest.raises(StoreError, match=message):
        run(model, tmp_path / "run", changed, sites=(), shard=shard)
    assert [trace.text for trace in recording.TraceStore.open(tmp_path / "run")] == before


def test_what_a_problem_says_beside_its_question_and_answer_may_change(model, tmp_path):
    run(model, tmp_path / "run", PROBLEMS[:2], sites=())
    noted = [
        replace(problem, meta={"share": 1 / 3, "from": float("nan")}, difficulty=0.1, group="sums")
        for problem in PROBLEMS[:4]
    ]
    assert len(run(model, tmp_path / "run", noted, sites=())) == 4
    assert len(run(model, tmp_path / "run", noted, sites=(), samples=2)) == 8


def test_traces_of_problems_that_nobody_asks_for_are_named(model, tmp_path, heard):
    run(model, tmp_path / "run", PROBLEMS[:5], sites=(), samples=2)
    assert len(run(model, tmp_path / "run", PROBLEMS[2:6], sites=(), samples=2)) == 12
    run(model, tmp_path / "run", PROBLEMS[:6], sites=(), shard=(1, 2))
    (line,) = heard.lines
    assert "traces of 2 problems not asked for now, such as 'p0'" in line and "--out" in line


def test_traces_that_were_changed_elsewhere_are_refused(model, tmp_path):
    traces = list(run(model, tmp_path / "run", PROBLEMS[:2], sites=()))
    record_written(model, traces, tmp_path / "read", sites="z.0")
    assert len(record_written(model, traces, tmp_path / "read", sites="z.0")) == 2
    graded = replace(traces[1], problem=replace(traces[1].problem, answer="7"))
    with pytest.raises(StoreError, match=r"answer: .* \(now 7\)"):
        record_written(model, [traces[0], graded], tmp_path / "read", sites="z.0")
    with pytest.raises(StoreError, match=r"another text"):
        record_written(
            model, [traces[0], replace(traces[1], text=traces[1].text[::-1])], tmp_path / "read", sites="z.0"
        )


def test_another_model_is_refused_and_named(model, model_of, tmp_path):
    run(model, tmp_path / "run", PROBLEMS[:1], sites=["z.0"])
    with pytest.raises(StoreError, match=r"model.architecture: qwen3_moe \(now qwen3\); .*model.weights"):
        run(model_of("qwen3"), tmp_path / "run", PROBLEMS[:1], sites=["z.0"])
    with pytest.raises(StoreError, match="not empty"):
        run(model, tmp_path / "run", PROBLEMS[:1], sites=["z.0"], resume=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"problems": []}, InputError, "no problems to record"),
        ({"problems": PROBLEMS[:1] * 2}, InputError, "'p0' occurs twice"),
        ({"problems": [Problem(id="big", prompt="a" * 200)]}, ContextError, "problem 'big' has 201 tokens"),
        ({"sites": ["attn_probs.0"]}, SiteError, "cannot be recorded"),
        ({"sites": ["resid_post.3"]}, SiteError, "3 layers"),
        ({"shard": (0, 2)}, InputError, "shard 0/2"),
        ({"samples": 0}, InputError, "invalid samples 0"),
        ({"batch_size": 0}, InputError, "invalid batch size 0"),
    ],
)
def test_what_cannot_be_recorded(model, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run(model, tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()  # refused before anything is made


def test_bfloat16_keeps_its_bits():
    tensor = torch.randn(5, 3).bfloat16()
    array = as_numpy(tensor)
    assert array.dtype == ml_dtypes.bfloat16
    assert np.array_equal(array.astype(np.float32), tensor.float().numpy())
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        there = tensor.to(kind)
        back = as_tensor(as_numpy(there))
        assert back.dtype == kind and torch.equal(back, there)


def test_the_store_says_in_which_type_and_packing_its_model_ran(model, tmp_path):
    half = load_model(deepcopy(model.hf).bfloat16(), tokenizer=model.tokenizer)
    meta = run(half, tmp_path / "run", PROBLEMS[:2]).meta
    assert as_recorded(meta, {"dtype": None, "quantise": None})["dtype"] == "bfloat16"
    assert as_recorded(meta, {"dtype": "float32"})["dtype"] == "float32"
    assert not as_recorded(meta, {})["quantise"] and not as_recorded(meta, {})["float32_compute"]
    packed = {"model": {**meta["model"], "quantised": "4bit", "compute": "float32"}}
    assert as_recorded(packed, {"quantise": None})["quantise"] == "4bit"
    assert as_recorded(packed, {"quantise": "8bit"})["quantise"] == "8bit"
    assert as_recorded(packed, {"float32_compute": False})["float32_compute"]
    assert as_recorded({"model": {"quantised": "gptq"}}, {})["quantise"] is None  # the checkpoint itself is packed


@pytest.mark.parametrize(
    ("name", "given", "revision"),
    [
        (None, None, "abc"),
        ("org/it", None, "abc"),
        ("org/it", "def", "def"),
        ("org/other", None, None),
        ("org/other", "def", "def"),
    ],
)
def test_the_model_of_a_run_is_loaded_at_its_revision(monkeypatch, name, given, revision):
    monkeypatch.setattr(prompting, "is_adapter", lambda source: False)
    meta = {"model": {"name": "org/it", "revision": "abc"}}
    assert as_recorded(meta, {"revision": given}, name)["revision"] == revision


def test_an_adapter_is_not_loaded_at_the_revision_of_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    meta = {"model": {"name": str(tmp_path), "revision": "of the base"}}
    assert as_recorded(meta, {})["revision"] is None
    (tmp_path / "adapter_config.json").unlink()
    assert as_recorded(meta, {})["revision"] == "of the base"


def shifted(model, name):
    """The model with one weight changed, as if its repository had moved."""
    hf = deepcopy(model.hf)
    next(hf.parameters()).data.view(-1)[0] += 1
    return load_model(hf, tokenizer=model.tokenizer, revision=name)


OTHERS = {
    "the same": (lambda model: load_model(deepcopy(model.hf), tokenizer=model.tokenizer), False),
    "moved": (lambda model: shifted(model, "new"), True),
    "of another type": (
        lambda model: load_model(shifted(model, "new").hf.bfloat16(), tokenizer=model.tokenizer),
        False,
    ),
}


@pytest.mark.parametrize(("load", "told"), OTHERS.values(), ids=OTHERS)
def test_other_weights_than_those_of_the_run_are_told(model, tmp_path, heard, load, told):
    tell_other_weights(run(model, tmp_path / "run", PROBLEMS[:1]).meta, load(model))
    assert any("at revision new has other weights here than" in line for line in heard.lines) is told


@pytest.mark.parametrize("unknown", ["weights", "dtype", "model"])
def test_weights_that_are_not_known_are_not_hashed(model, unknown, monkeypatch):
    monkeypatch.setattr(type(model), "fingerprint", property(lambda _: pytest.fail("hashed")))
    known = {"name": "it", "dtype": "float32", "weights": "abc"}
    tell_other_weights(
        {"model": {part: known[part] for part in known if part != unknown}} if unknown != "model" else {}, model
    )


# By arguments of `record`, or by the options that the model was loaded with.
BEGUN = [
    (PromptOptions(), {"think": False}),
    (PromptOptions(think=False), {}),
    (PromptOptions(think=False, open_tag=True), {"think": True}),
    (PromptOptions(system="Add."), {"open_tag": True}),
    (PromptOptions(system="Add.", open_tag=True), {}),
]


@pytest.mark.parametrize(("prompt", "how"), BEGUN)
def test_the_model_of_a_run_is_asked_again_with_the_prompts_of_the_run(model, tmp_path, prompt, how):
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    asked = replace(model, tokenizer=tokenizer, prompt=prompt)
    store = run(asked, tmp_path / "run", PROBLEMS[:2], **how)
    again = replace(asked, prompt=as_recorded(store.meta, {})["prompt"])
    for trace in store:
        assert again.encode_prompt(trace.problem) == trace.token_ids[: trace.n_prompt_tokens].tolist()
    assert "<think>" in again.decode(again.encode_prompt(PROBLEMS[0]))
    assert run(again, tmp_path / "run", PROBLEMS[:2]).ids == store.ids  # the same settings, so it resumes


@pytest.mark.parametrize(
    "thinking", [Thinking(mode="completion"), Thinking(mode="none"), Thinking(tags=ThinkTags(open="<a>", close="</a>"))]
)
def test_the_store_says_how_its_thinking_is_found(model, tmp_path, thinking):
    other = replace(model, thinking=thinking)
    store = run(other, tmp_path / "run", PROBLEMS[:2])
    assert as_recorded(store.meta, {})["thinking"] == thinking
    states = {trace.state for trace in store}
    assert states <= (
        {"absent"}
        if thinking.mode == "none"
        else {"closed", "truncated", "empty"}
        if thinking.mode == "completion"
        else {"absent"}
    )
    with pytest.raises(StoreError, match=r"thinking\.mode|thinking\.tags"):
        run(model, tmp_path / "run", PROBLEMS[:2])


def test_a_store_from_before_these_settings_is_resumed(model, tmp_path):
    store = run(model, tmp_path / "run", PROBLEMS[:2])
    manifest = Manifest.read(tmp_path / "run")
    meta = dict(manifest.meta)
    del meta["thinking"]
    meta["sampling"] = {name: meta["sampling"][name] for name in ("temperature", "top_p", "max_new_tokens", "seed")}
    replace(manifest, meta=meta).write(tmp_path / "run")
    again = run(model, tmp_path / "run", PROBLEMS[:4])
    assert len(again) == 4 and set(store.ids) <= set(again.ids)
    with pytest.raises(StoreError, match=r"sampling\.top_k: 0 \(now 5\)"):
        run(model, tmp_path / "run", PROBLEMS[:4], sampling=replace(HOT, top_k=5))
