"""The length probe finds what activations encode, reports the baselines, and finds nothing in noise."""

from dataclasses import replace

import numpy as np
import pytest

from reasonscope import probes
from reasonscope.analysis.organism import _text_predictions
from reasonscope.data.errors import InputError
from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.tokenizer import chat, train_tokenizer
from reasonscope.data.ranks import spearman
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.properties.length_probe import length_data
from reasonscope.probes.properties.remaining_probe import _thinking_points


@pytest.fixture(scope="module")
def traces():
    rng = np.random.default_rng(0)
    bpe = train_tokenizer(tokenizer_texts(0, 50))
    made = []
    for i in range(60):
        prompt, completion = chat(
            f"What is balance {i}?" + " It rains." * int(rng.integers(4)), "Wait. " * int(rng.integers(5, 60)), "A"
        )
        given, written = bpe.encode(prompt).ids, bpe.encode(completion).ids
        problem = Problem(id=str(i), prompt=prompt)
        made.append(
            build_trace(
                id=f"{i}/0", problem=problem, token_ids=given + written, n_prompt_tokens=len(given), tokenizer=bpe
            )
        )
    return made


def stored(path, traces, *, informed):
    """A run whose layer 1 knows the length at the last prompt token, or nothing does."""
    rng = np.random.default_rng(1)
    sites = ["resid_post.0", "resid_post.1"]
    arrays = {
        site: [rng.standard_normal((len(t.token_ids) - 1, 8)).astype(np.float32) for t in traces] for site in sites
    }
    if informed:
        for trace, rows in zip(traces, arrays["resid_post.1"], strict=True):
            rows[trace.n_prompt_tokens - 1, 3] = np.log(trace.n_thinking_tokens)
    store = TraceStore.create(path, sites=sites)
    store.append(traces, arrays)
    return store


def test_it_finds_the_layer_that_knows(tmp_path, traces):
    probe = probes.length(stored(tmp_path, traces, informed=True), traces)
    found = probe.comparison
    assert found.metric == "Spearman" and found.score.value > 0.9
    assert found.score.low <= found.score.value <= found.score.high
    assert found.baselines.keys() == {"prompt_length", "bag_of_words", "first_layer"}
    assert all(abs(score.value) < 0.5 for score in found.baselines.values())
    assert (probe.n_groups, probe.n_truncated) == (60, 0)
    text = _text_predictions(traces)
    assert text.keys() == {"prompt_length", "bag_of_words"}
    assert {name: spearman(probe.true, values) for name, values in text.items()} == pytest.approx(
        {name: found.baselines[name].value for name in text}
    )
    assert found.difference.low > 0 and found.beats and found.text_difference.low > 0
    assert found.shuffled.p_value == 1 / 200 and abs(found.shuffled.null.mean()) < 0.3
    assert found.metrics["concordance"].value > 0.9
    assert found.metrics["r2_log"].value > 0.8
    assert set(probe.layer) == {probe.probe.site} == {Site("resid_post", 1)}
    assert (probe.within_difficulty, probe.within_dataset, probe.between_share) == (None, None, None)


def test_shuffles_and_resamples_can_be_fewer(tmp_path, traces):
    store = stored(tmp_path, traces, informed=False)
    quick = probes.length(store, traces, folds=3, n_permutations=19, n_resamples=50)
    assert len(quick.comparison.shuffled.null) == 19
    whole = probes.length(store, traces, folds=3)
    assert len(whole.comparison.shuffled.null) == 199
    assert quick.comparison.score.value == whole.comparison.score.value
    for name in ("concordance", "r2_log", "r2"):
        assert quick.comparison.metrics[name].value == whole.comparison.metrics[name].value
        assert quick.comparison.metrics[name].interval != whole.comparison.metrics[name].interval
    rated = [replace(t, problem=replace(t.problem, difficulty=float(i % 3))) for i, t in enumerate(traces)]
    within = [
        probes.length(stored(tmp_path / str(n), rated, informed=False), rated, folds=3, n_permutations=1, n_resamples=n)
        for n in (50, 60)
    ]
    assert within[0].within_difficulty.interval != within[1].within_difficulty.interval
    assert within[0].comparison.difference.interval != within[1].comparison.difference.interval


def test_a_new_prompt_gets_tokens_and_an_interval(tmp_path, traces):
    store = stored(tmp_path, traces, informed=True)
    probe = probes.length(store, traces)
    states = np.stack([store.activations(t.id, "resid_post.1")[t.n_prompt_tokens - 1] for t in traces])
    forecast = probe.forecast(states)
    assert spearman(probe.true, forecast.tokens) > 0.9
    assert (forecast.low < forecast.tokens).all() and (forecast.tokens < forecast.high).all()
    assert np.mean((forecast.low <= probe.true) & (probe.true <= forecast.high)) >= 0.9
    with pytest.raises(InputError, match="the last axis of this probe is 8"):
        probe.forecast(states[:, :5])


def test_within_one_difficulty_and_one_data_set_the_order_is_judged_apart(tmp_path, traces):
    rated = [replace(t, problem=replace(t.problem, difficulty=float(i % 3))) for i, t in enumerate(traces)]
    probe = probes.length(stored(tmp_path, rated, informed=True), rated, datasets=["a", "b"] * 30)
    assert probe.within_difficulty.low > 0.7
    assert probe.within_dataset.low > 0.7
    assert "difficulty" in probe.comparison.baselines


def test_rollouts_of_a_prompt_are_averaged(tmp_path, traces):
    again = [replace(t, id=f"{t.problem.id}/1") for t in traces[:20]]
    longer = [replace(t, id=f"{t.problem.id}/1", problem=a.problem) for t, a in zip(traces[20:40], again, strict=True)]
    both = [*traces, *again]
    data = length_data(stored(tmp_path / "a", both, informed=True), both)
    assert len(data.tokens) == 60 and data.tokens[0] == traces[0].n_thinking_tokens
    assert data.between_share == 1  # the copies are as long as what they copy
    mixed = [*traces[:20], *longer]
    shared = length_data(stored(tmp_path / "b", mixed, informed=True), mixed)
    same = [t for t in longer if t.token_ids[: t.n_prompt_tokens].tobytes() == _prompt(traces, t.problem.id)]
    assert len(shared.tokens) == 40 - len(same)
    assert shared.between_share is None or shared.between_share < 1


def _prompt(traces, problem_id):
    trace = next(t for t in traces if t.problem.id == problem_id)
    return trace.token_ids[: trace.n_prompt_tokens].tobytes()


def test_truncated_traces_stay_in_and_are_counted(tmp_path, traces):
    cut = [replace(t, state="truncated") if t.n_thinking_tokens > 100 else t for t in traces]
    n = sum(t.state == "truncated" for t in cut)
    probe = probes.length(stored(tmp_path, cut, informed=True), cut)
    assert probe.n_truncated == n > 5
    assert len(probe.true) == 60
    assert probe.band.high == np.inf  # nobody knows how long these would have been
    assert probe.comparison.metrics["concordance"].value > 0.9
    warned = [note for note in probe.summary().notes if note.startswith("Warning")]
    assert f"{n} of 60 traces" in warned[0] and "--max-new-tokens" in warned[0]


def test_a_problem_in_two_groups_is_named(tmp_path, traces):
    apart = [traces[0], replace(traces[1], problem=replace(traces[0].problem, group="other")), *traces[2:]]
    with pytest.raises(InputError, match="problem '0' has rows in the groups"):
        probes.length(stored(tmp_path, apart, informed=True), apart)


def test_what_remains_is_read_along_the_thinking_against_the_position(tmp_path, traces):
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal((len(t.token_ids) - 1, 4)).astype(np.float32) for t in traces]
    for trace, rows in zip(traces, arrays, strict=True):
        left = trace.tokens.thinking.stop - 1 - np.arange(len(rows))
        rows[:, 2] = np.log1p(np.maximum(left, 0)) + 0.1 * rng.standard_normal(len(rows))
    store = TraceStore.create(tmp_path, sites=["resid_post.1"])  # the first layer would be a baseline
    store.append(traces, {"resid_post.1": arrays})
    quick = probes.remaining(store, traces, per_trace=2, n_permutations=9, n_resamples=20)
    assert len(quick.comparison.shuffled.null) == 9
    probe = probes.remaining(store, traces, per_trace=4)
    assert probe.comparison.score.value > 0.9
    assert probe.comparison.baselines["elapsed_position"].value > 0.2  # the further, the less is left
    assert probe.comparison.difference.low > 0
    assert probe.comparison.shuffled.p_value == 1 / 200
    assert probe.within_position.low > 0.8
    first = traces[0]
    assert probe.true[0] == first.n_thinking_tokens - 1
    assert probe.token[0] == first.tokens.thinking.start
    with pytest.raises(InputError, match="ask for at least one"):
        _thinking_points(traces, per_trace=0)


def test_every_trace_has_as_many_rows_however_short_its_thinking_is(traces):
    many = _thinking_points(traces, per_trace=400)
    counts = [sum(trace is one for trace in many.traces) for one in traces]
    assert set(counts) == {400} and max(trace.n_thinking_tokens for trace in traces) < 400
    of_first = [token for trace, token in zip(many.traces, many.tokens, strict=True) if trace is traces[0]]
    assert of_first == sorted(of_first) and set(of_first) == set(traces[0].thinking_positions.tolist())


def test_it_finds_nothing_in_noise(tmp_path, traces):
    assert abs(probes.length(stored(tmp_path, traces, informed=False), traces).comparison.score.value) < 0.4


def test_runs_without_residuals_and_traces_without_thinking_are_refused(tmp_path, traces):
    with pytest.raises(InputError, match="no activations of the residual stream"):
        probes.length(TraceStore.create(tmp_path / "a", sites=["z.0"]), traces)
    store = stored(tmp_path / "b", traces, informed=False)
    with pytest.raises(InputError, match="has no thinking"):
        probes.length(store, [replace(traces[0], state="absent"), *traces[1:]])
    with pytest.raises(InputError, match="none of the 1 traces has thinking"):
        probes.length(store, [replace(traces[0], state="absent")])


def test_traces_that_a_server_wrote_are_judged_without_the_baseline_of_the_output(tmp_path, traces):
    def said(trace, value):
        written = np.full(len(trace.token_ids) - trace.n_prompt_tokens, value, dtype=np.float32)
        return replace(trace, entropies=written, logprobs=-written)

    for value, expected in ((1.0, True), (np.nan, False)):  # a server measures neither entropies nor log-probabilities
        told = [said(trace, value) for trace in traces]
        store = stored(tmp_path / f"{value}", told, informed=True)
        found = probes.length(store, told, n_permutations=5, n_resamples=20)
        assert ("next_token" in found.comparison.baselines) is expected
