"""Traces that think again after a first answer: whatever is said about the thinking leaves out what is written in between."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reasonscope import probes
from reasonscope.analysis.anchors.rollouts import continuation
from reasonscope.analysis.attention.close_attention import close_attention
from reasonscope.analysis.attention.head_profiles import head_table
from reasonscope.analysis.attention.maps import attention_map
from reasonscope.analysis.attention.recurrence import recurrence
from reasonscope.analysis.tokens.confidence import confidence_of_trace
from reasonscope.analysis.tokens.entropy import entropy_of_trace
from reasonscope.analysis.tokens.mi import emitting_rows, mi_of_trace
from reasonscope.analysis.tokens.misalignment import misalignment_of_trace
from reasonscope.analysis.traces.reflection import _share_behind
from reasonscope.analysis.traces.trajectory import trajectory_of_trace
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace
from reasonscope.data.text.steps_and_sentences import sentences, steps
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.positions import thinking_to_window
from reasonscope.probes.generation.decoding import Completion
from reasonscope.probes.properties.refusal_cliff import _plateau_and_end
from reasonscope.steering import Ablation, ablation_effect
from reasonscope.steering.decoding.budget import _training_rows
from reasonscope.steering.methods.seal import extract_seal
from reasonscope.steering.methods.thinking_speed import _truncated_pair
from reasonscope.steering.vectors.contrast import _rows_of
from reasonscope.steering.vectors.scope import Scope

SITE = Site("resid_post", 0)
BETWEEN = "\n\nA first try: 6?\n\n"


def text_of(first, second, between=BETWEEN):
    return f"<think>\n{first}\n</think>{between}<think>\n{second}\n</think>\n\n\\boxed{{7}}</s>"


def traced(model, i, first, second, *, between=BETWEEN):
    """A trace of two blocks of thinking, with entropies that are 1 in the thinking and 100 elsewhere."""
    prompt, completion = f"<s>What is {i}?", text_of(first, second, between)
    given, written = (model.tokenizer.encode(text, add_special_tokens=False) for text in (prompt, completion))
    problem = Problem(id=str(i), prompt=prompt, answer="7" if i % 2 else "8", difficulty=i % 3)
    made = build_trace(
        id=f"{i}/0", problem=problem, token_ids=given + written, n_prompt_tokens=len(given), tokenizer=model.tokenizer_backend,
        finish_reason="stop",
    )  # fmt: skip
    inside = np.isin(np.arange(len(given), len(given) + len(written)), made.thinking_positions)
    return replace(made, entropies=np.where(inside, 1.0, 100.0).astype(np.float32))


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("qwen2")


@pytest.fixture(scope="module")
def trace(model):
    return traced(model, 1, "We add.\n\nWait, so?\n\nIt is 6.", "Let me see.\n\nWait, no.\n\nIt is 7.")


@pytest.fixture(scope="module")
def between(trace):
    """The tokens between the two blocks that neither belong to the thinking nor emit a token of it."""
    first, second = trace.thinking_blocks
    return np.arange(first.stop + 1, second.start - 1)


def test_the_trace_is_what_these_tests_need(trace, between):
    assert len(trace.thinking_blocks) == 2 and trace.state == "closed" and len(between) > 10
    assert trace.n_thinking_tokens == len(trace.thinking_positions) < len(trace.tokens.thinking)
    assert "first try" in trace.thinking and not any("first" in one.text for one in sentences(trace))


def runs(folder, model):
    """Two runs of the same traces whose stored states differ only between the blocks."""
    rng, made = np.random.default_rng(0), []
    for i in range(24):
        first = "\n\n".join(rng.choice(["We add.", "Wait, no.", "It is 6.", "Alternatively, count."], 3 + i % 4))
        made.append(traced(model, i, f"We add.\n\nWait, no.\n\n{first}", "Let me see.\n\nWait.\n\nIt is 7."))
    plain = [rng.standard_normal((len(t.token_ids) - 1, 8)).astype(np.float32) for t in made]
    spoilt = [states.copy() for states in plain]
    for t, states in zip(made, spoilt, strict=True):
        first, second = t.thinking_blocks
        states[first.stop + 1 : second.start - 1] = 1e4
    stores = []
    for name, states in (("plain", plain), ("spoilt", spoilt)):
        store = TraceStore.create(folder / name, sites=[str(SITE)])
        store.append(made, {str(SITE): states})
        stores.append(store)
    return stores


MEASURES = {
    "remaining": lambda store: probes.remaining(store, per_trace=4, folds=3).comparison.score.value,
    "correctness": lambda store: probes.correctness(store, folds=3, n_permutations=19).to_dict(),
    "length": lambda store: probes.length(store, folds=3, n_permutations=19).comparison.score.value,
    "label at the mean": lambda store: _fitted(store, "mean"),
    "label at every token": lambda store: _fitted(store, "every:3"),
    "label half-way": lambda store: _fitted(store, "0.5"),
    "attention probe": lambda store: _fitted(store, "mean", kind="attention"),
    "mi": lambda store: _of_each(store, _mi),
    "trajectory": lambda store: _of_each(store, _trajectory),
    "seal": lambda store: extract_seal(store, SITE).directions[SITE].tolist(),
    "mean of the thinking": lambda store: _of_each(
        store, lambda store, t: store.activations(t.id, str(SITE))[_rows_of(t, "thinking_mean", len(t.token_ids) - 1)]
    ),
    "separators": lambda store: _of_each(
        store, lambda store, t: store.activations(t.id, str(SITE))[_rows_of(t, "separators", len(t.token_ids) - 1)]
    ),
    "budget": lambda store: [part.tolist() for part in _training_rows(store, [SITE], store.ids)],
    "cliff": lambda store: _of_each(
        store, lambda store, t: np.array(_plateau_and_end(store.activations(t.id, str(SITE))[:, 0], t, plateau=1.0))
    ),
}


def _fitted(store, position, **options):
    labels = {trace.id: float(trace.n_thinking_tokens) for trace in store}
    report = probes.fit(store, labels, position=position, task="regression", folds=3, n_permutations=19, **options)
    return report.comparison.score.value


def _of_each(store, measure):
    return [np.asarray(measure(store, trace), dtype=np.float64).tolist() for trace in store]


def _mi(store, trace):
    gold = {SITE: np.arange(8.0)}
    found = mi_of_trace(trace, {SITE: store.activations(trace.id, str(SITE))}, gold, sentences=sentences(trace))
    assert [int(label) for label in found.axis("token").labels] == trace.thinking_positions.tolist()
    return found.values[0]


def _trajectory(store, trace):
    return trajectory_of_trace(trace, lambda site: store.activations(trace.id, str(site)), [SITE], block=10).values


@pytest.fixture(scope="module")
def stores(tmp_path_factory, model):
    return runs(tmp_path_factory.mktemp("blocks"), model)


@pytest.mark.parametrize("name", MEASURES)
def test_states_between_the_blocks_change_nothing(name, stores):
    plain, spoilt = (MEASURES[name](store) for store in stores)
    assert plain == spoilt


def test_what_remains_is_counted_in_thinking(stores):
    states, following, left = _training_rows(stores[0], [SITE], stores[0].ids[:1])
    one = stores[0].trace(stores[0].ids[0])
    assert left.tolist() == list(range(one.n_thinking_tokens + 1, 0, -1)) and len(states) == len(left)
    assert following[-1] == one.token_ids[one.tokens.thinking.stop]


def test_rows_of_activations_leave_out_what_is_between(trace, between):
    assert not set(between) & {*emitting_rows(trace).tolist(), *thinking_to_window(trace).tolist()}
    assert (emitting_rows(trace) + 1).tolist() == trace.thinking_positions.tolist()
    assert {step.separator for step in steps(trace)} <= set(trace.thinking_positions.tolist())


def test_entropy_is_that_of_the_thinking(trace):
    assert entropy_of_trace(trace, sentences=sentences(trace)).numbers["thinking"]["value"] == 1.0


def test_attention_is_read_in_the_thinking(model, trace):
    cut = sentences(trace)
    again = recurrence(model, trace, cut)
    assert [int(label) for label in again.axis("token").labels] == trace.thinking_positions.tolist()
    table, closing = head_table(model, trace, cut), close_attention(model, trace, cut)
    gaps = np.isin(np.arange(trace.tokens.thinking.start, trace.tokens.thinking.stop), trace.thinking_positions)
    for line in (table.arrays["waad"], table.arrays["fai"], closing.arrays["tokens"]):
        assert np.isfinite(line).tolist() == gaps.tolist()
    assert len(closing.values) == len(cut)
    shares = attention_map(model, trace, cut)
    assert shares.values.sum(axis=0) == pytest.approx(1.0, abs=1e-5)


def test_only_thinking_looks(model, trace):
    """What the text between the blocks attends to is not what the thinking attends to."""
    as_one = replace(trace, meta={})
    assert as_one.n_thinking_tokens > trace.n_thinking_tokens
    ours, theirs = (head_table(model, one, sentences(trace)).at(metric="span") for one in (trace, as_one))
    assert not np.allclose(ours, theirs)


def _blocks(trace):
    return [trace.text[span.slice].strip() for span in trace.thinking_spans]


def test_a_base_model_is_judged_on_the_thinking(model, tiny, trace):
    other = replace(model, hf=tiny("qwen2").hf)
    found = misalignment_of_trace(other, model, trace, sentences(trace), bins=3)
    assert len(found.arrays["misses"]) == len(trace.written_thinking) == trace.n_thinking_tokens


def written(ids, n_prompt):
    given = {"token_ids": np.array(ids), "n_prompt_tokens": n_prompt, "finish_reason": "stop"}
    return Completion(**given, logprobs=np.zeros(len(ids) - n_prompt), entropies=np.zeros(len(ids) - n_prompt))


def test_forced_answers_come_after_shares_of_the_thinking(trace):
    cuts = []

    def writer(ids, branches, sampling):
        cuts.extend(branch.cut for branch in branches)
        return [written([*ids[: branch.cut], 5], branch.cut) for branch in branches]

    confidence_of_trace(writer, replace(trace, final_answer="7"), [1], lambda ids: "7", parts=4, samples=1)
    within = [int((trace.thinking_positions < cut).sum()) for cut in dict.fromkeys(cuts)]
    assert within == [round(k * trace.n_thinking_tokens / 4) for k in range(5)]
    first, second = trace.thinking_blocks
    assert not any(first.stop < cut < second.start for cut in cuts)


def test_continuations_and_steps_leave_out_what_is_between(model, trace):
    text = text_of("Three.", "Seven. Yes.").removeprefix("<think>\n")
    done = written([1, *model.tokenizer.encode(text)], 1)
    found = continuation(done, model.decode, Thinking())
    assert found.sentences == ("Three.", "Seven.", "Yes.") and found.answer == "7"
    pair = _truncated_pair(trace, trace, n_steps=4)
    assert len(pair.fast) == len(pair.slow)


def test_the_share_after_the_first_answer(trace):
    first = next(one for one in sentences(trace) if "6" in one.text)
    assert _share_behind(trace, first) == (trace.thinking_positions >= first.tokens.stop).mean()


def test_an_ablation_reads_its_side_effects_in_the_thinking(model, trace, monkeypatch):
    seen = {}

    def divergences(model, traces, readers, spans):
        seen.update({name: span(traces[0]) for name, span in spans.items()})
        raise StopIteration

    monkeypatch.setattr("reasonscope.steering.ablation.effects.divergences", divergences)
    with pytest.raises(StopIteration):
        ablation_effect(model, [trace, traced(model, 2, *_blocks(trace))], Ablation(name="mlp", mlps=(0,)))
    assert seen["thinking"].tolist() == trace.thinking_positions.tolist()


def test_a_scope_on_the_thinking_is_on_its_blocks(model, trace, between):
    ids = torch.tensor([trace.token_ids.tolist()])
    edited = np.flatnonzero(Scope.thinking(model).mask(ids, n_prompt=torch.tensor([trace.n_prompt_tokens]))[0])
    inside = np.concatenate([np.arange(block.start, block.stop) for block in trace.thinking_blocks])
    assert set(inside) <= set(edited)
    assert not set(edited) & set(between[1:-1])
