"""A monitor reads while the model writes what a probe reads in the finished text, and closes the thinking of the right rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from reasonscope.app.cli import app
from reasonscope.data.errors import InputError, SiteError, StoreError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.evaluation.conformal import alarm_threshold
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.probes.properties.refusal_cliff import token_scores
from reasonscope.steering.decoding.monitor import (
    ProbeMonitor,
    _bar,
    _windowed,
    calibrated_threshold,
    monitor_options,
    save_live_scores,
)
from reasonscope.steering.vectors.thinking import WrittenThinking

SITE = Site("resid_post", 2)
SAMPLING = Sampling(temperature=0.7, max_new_tokens=40)


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def probe(model):
    coef = np.random.default_rng(0).standard_normal(model.d_model) / 400  # so that scores are near 1
    learned = {"learned_from": ["nothing"], "target": "a number"}
    return LinearProbe(
        coef=coef, intercept=0.5, site=SITE, task="binary", method="test", model=model.fingerprint, provenance=learned
    )


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    problems = load_problems("ledger:brief", n=3)
    return record(model, problems, tmp_path_factory.mktemp("run") / "run", sites=[SITE], sampling=SAMPLING)


def written(model, monitor, prompts, seeds, sampling=SAMPLING):
    return generate(
        model,
        prompts,
        sampling,
        seeds=seeds,
        write=monitor.edits,
        on_step=monitor.on_step,
        processors=monitor.processors,
    )


def asked(store):
    traces = list(store)
    return traces, [t.token_ids[: t.n_prompt_tokens].tolist() for t in traces], [t.sampling.seed for t in traces]


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_live_scores_are_those_of_the_finished_text(model, probe, store, task):
    probe = replace(probe, task=task)
    traces, prompts, seeds = asked(store)
    assert len({len(prompt) for prompt in prompts}) > 1  # so that some rows are padded
    monitor = ProbeMonitor(model, probe)
    for _ in range(2):  # a monitor begins again with every generation
        done = written(model, monitor, prompts, seeds)
        for trace, completion, live in zip(traces, done, monitor.scores(), strict=True):
            assert completion.token_ids.tolist() == trace.token_ids.tolist()
            np.testing.assert_allclose(live, token_scores(probe, store, trace), atol=1e-4)


def test_a_threshold_that_is_never_passed_changes_nothing(model, probe, store):
    traces, prompts, seeds = asked(store)
    monitor = ProbeMonitor(model, probe, stop_above=1.0)
    done = written(model, monitor, prompts, seeds)
    assert [c.token_ids.tolist() for c in done] == [t.token_ids.tolist() for t in traces]
    assert monitor.stopped == {}


def test_each_row_is_closed_after_the_first_window_that_passes(model, probe, store):
    _, prompts, seeds = asked(store)
    thinking, closing = WrittenThinking.of(model), model.tokenizer.encode("\n</think>", add_special_tokens=False)
    free = ProbeMonitor(model, probe)
    plain = written(model, free, prompts, seeds)
    window, expected = 3, []
    for completion, line in zip(plain, free.scores(), strict=True):
        opened = completion.token_ids.tolist().index(thinking.opens)
        own = line[opened + 1 + thinking.given :]
        expected.append(_windowed(own.astype(float), window))
    threshold = float(np.median([means[:20].max() for means in expected]))
    monitor = ProbeMonitor(model, probe, stop_above=threshold, window=window, closing=closing)
    done = written(model, monitor, prompts, seeds)
    assert 0 < len(monitor.stopped) < len(prompts)
    for row, completion in enumerate(done):
        ids = completion.token_ids.tolist()
        if row not in monitor.stopped:
            assert ids == plain[row].token_ids.tolist()
            continue
        at = int(np.flatnonzero(expected[row] > threshold)[0]) + window
        assert monitor.stopped[row] == at
        begin = ids.index(thinking.opens) + 1 + thinking.given
        assert ids[begin + at : begin + at + len(closing)] == closing
        assert ids[: begin + at] == plain[row].token_ids.tolist()[: begin + at]
    alone = ProbeMonitor(model, probe, stop_above=threshold, window=window, closing=closing)
    row = next(iter(monitor.stopped))
    (single,) = written(model, alone, [prompts[row]], [seeds[row]])
    assert single.token_ids.tolist() == done[row].token_ids.tolist()
    np.testing.assert_allclose(alone.scores()[0], monitor.scores()[row], atol=1e-4)


def test_a_paragraph_is_finished_before_the_thinking_is_closed(model, probe, store):
    problems = load_problems("ledger", n=3)
    prompts = [model.encode_prompt(problem) for problem in problems]
    monitor = ProbeMonitor(model, probe, stop_above=0.0, window=8, at="paragraph")
    done = written(model, monitor, prompts, [0, 1, 2], replace(SAMPLING, temperature=0.0, max_new_tokens=120))
    assert set(monitor.stopped) == {0, 1, 2} and monitor.meta["at"] == "paragraph"
    for completion in done:
        thinking = model.tokenizer.decode(completion.token_ids.tolist()).split("<think>")[1].split("</think>")[0]
        assert thinking.rstrip().endswith(".") and "\n\n" not in thinking.strip()


def test_what_does_not_fit_is_refused(model, probe, store):
    with pytest.raises(InputError, match="window"):
        ProbeMonitor(model, probe, stop_above=0.5, window=0)
    with pytest.raises(InputError, match="closing tag"):
        ProbeMonitor(model, probe, stop_above=0.5, closing=(5,))
    with pytest.raises(InputError, match="differs in weights"):
        ProbeMonitor(model, replace(probe, model={**probe.model, "weights": "others"}))
    with pytest.raises(SiteError):
        ProbeMonitor(model, replace(probe, site=Site("resid_post", 99)))
    with pytest.raises(InputError, match="on_step"):
        generate(model, asked(store)[1], SAMPLING, seeds=[0, 1, 2], write=ProbeMonitor(model, probe).edits)
    with pytest.raises(InputError, match="nothing"):
        ProbeMonitor(model, probe).latest()


@pytest.mark.parametrize(
    ("task", "above", "said"),
    [
        ("binary", 1.5, "scores of this probe are probabilities"),
        ("binary", -0.1, "scores of this probe are probabilities"),
        ("binary", float("nan"), "scores of this probe are probabilities"),
        ("regression", float("nan"), "give a finite number"),
        ("regression", float("inf"), "give a finite number"),
    ],
)
def test_a_threshold_that_every_score_passes_or_none_is_refused(model, probe, tmp_path, task, above, said):
    path = tmp_path / "probe.safetensors"
    replace(probe, task=task).save(path)
    with pytest.raises(InputError, match=f"--stop-above .*{said}"):
        monitor_options(model, path, stop_above=above)
    assert monitor_options(model, path, stop_above=0.5)[1]["stop_above"] == 0.5


def test_the_threshold_bounds_false_alarms_on_new_problems():
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal(60) for _ in range(400)]
    groups = [str(i) for i in range(59)]
    alarms = [draw[59] > alarm_threshold(draw[:59], groups, false_alarms=0.1) for draw in draws]
    assert 0.06 < np.mean(alarms) < 0.14
    assert alarm_threshold(np.arange(19.0), groups[:19], false_alarms=0.05) == 18
    with pytest.raises(InputError, match="calibrate on 19 or more"):
        alarm_threshold(np.arange(18.0), groups[:18], false_alarms=0.05)
    for share in (0, 1):
        with pytest.raises(InputError, match="give a share between 0 and 1"):
            alarm_threshold(np.arange(18.0), groups[:18], false_alarms=share)


def test_a_run_that_the_probe_learned_from_does_not_calibrate_it(probe, store):
    highest = []
    for trace in store:
        scores = token_scores(probe, store, trace)
        places = trace.thinking_positions
        highest.append(_windowed(scores[places[places < len(scores)]], 2).max())
    assert calibrated_threshold(probe, store, false_alarms=0.3, window=2) == pytest.approx(max(highest))
    seen = {"learned_from": [trace.problem.group for trace in store]}
    with pytest.raises(InputError, match="learned from the problems of all 3 traces"):
        calibrated_threshold(replace(probe, provenance=seen), store, false_alarms=0.3)


def test_a_recording_keeps_what_the_monitor_read_beside_the_run(model, probe, store, tmp_path):
    traces = list(store)
    problems = [trace.problem for trace in traces]
    monitor = ProbeMonitor(model, probe)
    path = tmp_path / "scores" / "test.safetensors"
    first = record(model, problems[:1], tmp_path / "run", sampling=SAMPLING, monitor=monitor)
    assert save_live_scores(monitor, first, path, name="test") == 0
    again = ProbeMonitor(model, probe)
    whole = record(model, problems, tmp_path / "run", sampling=SAMPLING, monitor=again)  # resumes
    assert "monitor" not in whole.meta  # it only reads, so the traces are those of any recording
    assert save_live_scores(again, whole, path, name="test") == 0
    found = read_scores(path)
    assert found.about["site"] == str(SITE) and found.about["unit"] == "probability"
    for trace in traces:
        assert whole.trace(trace.id).text == trace.text
        np.testing.assert_allclose(found.scores[trace.id], token_scores(probe, store, trace), atol=1e-4)
    assert again.told() == "the probe was read on every token of 2 traces"


def test_a_run_that_a_monitor_stops_says_so_and_mixes_with_no_other(model, probe, store, tmp_path):
    problems = [trace.problem for trace in store]
    monitor = ProbeMonitor(model, probe, stop_above=0.0)
    stopped = record(model, problems, tmp_path / "run", sampling=SAMPLING, monitor=monitor)
    assert stopped.meta["monitor"]["stop_above"] == 0.0 and stopped.meta["monitor"]["site"] == str(SITE)
    assert stopped.meta["monitor"]["learned_from"] == ["nothing"]
    unknown = ProbeMonitor(model, replace(probe, provenance={}), stop_above=0.0, calibrated_on={"c"})
    assert "learned_from" not in unknown.meta
    assert all(trace.n_thinking_tokens <= 1 for trace in stopped)
    assert monitor.told() == "the thinking of 3 of 3 traces was closed above 0"
    with pytest.raises(StoreError, match="monitor"):
        record(model, problems, tmp_path / "run", sampling=SAMPLING)
    known = replace(probe, provenance={"learned_from": ["b", "a"]})
    of_both = ProbeMonitor(model, known, stop_above=0.0, calibrated_on={"c", "a"})
    assert of_both.meta["learned_from"] == ["a", "b", "c"]
    never = ProbeMonitor(model, probe, stop_above=2.0)
    record(model, problems, tmp_path / "other", sampling=SAMPLING, monitor=never)
    assert never.told() == "the score never passed 2 in 3 traces, so nothing was stopped"


def test_the_command_records_with_a_monitor(probe, tmp_path):
    saved, out = tmp_path / "mine.safetensors", tmp_path / "run"
    probe.save(saved)
    asked = [
        "record",
        "--problems",
        "ledger:brief",
        "--n",
        "2",
        "--max-new-tokens",
        "20",
        "--sites",
        "",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, [*asked, "--monitor", str(saved), "--stop-above", "0.999999"])
    assert done.exit_code == 0, done.output
    assert "never passed 1 in 2 traces" in done.output
    assert len(read_scores(tmp_path / "run-results" / "scores" / "mine.safetensors").scores) == 2
    with pytest.raises(InputError, match="need --monitor"):
        CliRunner().invoke(app, [*asked, "--stop-above", "2"], catch_exceptions=False)


def test_a_step_is_passed_over_only_if_no_score_can_be_above_the_threshold(probe):
    rng = np.random.default_rng(0)
    for task in ("binary", "regression"):
        for intercept, spread in ((0.5, 1.0), (-30.0, 20.0), (0.0, 1e-4)):
            one = replace(probe, task=task, intercept=intercept)
            projections = torch.from_numpy(rng.standard_normal(4000) * spread - intercept).float()
            scores = projections + intercept
            scores = scores.sigmoid() if task == "binary" else scores
            for above in (*scores[:20].tolist(), 0.0, 1.0, 1e-7, 1 - 1e-7):  # a calibrated threshold is a score
                bar = _bar(one, above)
                assert not ((scores > above) & (projections <= bar)).any()
                if task == "regression" or 0.01 < above < 0.99:
                    clearly = scores < above - 0.01 * (1 + abs(intercept))
                    assert not (clearly & (projections > bar)).any()
