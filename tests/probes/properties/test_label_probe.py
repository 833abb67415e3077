"""Any label: found at the place where it stands and not elsewhere, by field, file or mapping; every fault in one line."""

from dataclasses import replace

import numpy as np
import pytest

from reasonscope import probes
from reasonscope.data.errors import InputError
from reasonscope.data.organism.corpus import tokenizer_texts
from reasonscope.data.organism.tokenizer import chat, train_tokenizer
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.fitting.positions import Place
from reasonscope.probes.properties.label_probe import judge_on, span_states
from reasonscope.probes.properties.labels import file_name, labelled
from reasonscope.probes.properties.scores import write_scores

FEW = {"folds": 3, "n_permutations": 39, "n_resamples": 100}


@pytest.fixture(scope="module")
def traces():
    """60 problems; the topic is known to the thinking only, the size is a number, every tenth is cut off."""
    rng, bpe, made = np.random.default_rng(0), train_tokenizer(tokenizer_texts(0, 50)), []
    for i in range(60):
        prompt, completion = chat(f"What is {i}?", "Wait. " * int(rng.integers(8, 30)), "7")
        given, written = bpe.encode(prompt).ids, bpe.encode(completion).ids
        meta = {"topic": ["algebra", "geometry"][int(rng.random() < 0.5)], "tree": {"size": float(rng.normal())}}
        made.append(
            build_trace(
                id=f"{i}/0",
                problem=Problem(id=f"{i}", prompt=prompt, meta=meta),
                token_ids=given + (written[:20] if i % 10 == 9 else written),
                n_prompt_tokens=len(given),
                tokenizer=bpe,
            )
        )
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory, traces):
    """Thinking tokens know the topic in dimension 3 and the size in dimension 5; the first layer knows nothing."""
    rng = np.random.default_rng(1)
    states = {
        site: [rng.standard_normal((len(t.token_ids) - 1, 8)).astype(np.float32) for t in traces]
        for site in ("resid_post.0", "resid_post.1")
    }
    for trace, rows in zip(traces, states["resid_post.1"], strict=True):
        rows[trace.tokens.thinking.slice, 3] += 4 * (trace.problem.meta["topic"] == "geometry")
        rows[trace.tokens.thinking.slice, 5] += 3 * trace.problem.meta["tree"]["size"]
    made = TraceStore.create(tmp_path_factory.mktemp("labels") / "store", sites=list(states))
    made.append(traces, states)
    return made


@pytest.mark.parametrize("position", ["mean", "first_thinking", "every:5", 0.5])
def test_a_field_is_found_where_it_stands(store, position):
    found = probes.fit(store, "meta.topic", position=position, **FEW)
    assert found.comparison.predicts
    assert found.comparison.beats
    assert (found.positive, found.counts.keys()) == ("geometry", {"algebra", "geometry"})
    assert found.probe.site.layer == 1
    assert found.comparison.metrics["tpr_at_1_fpr"].value > 0.5
    assert found.comparison.metrics["calibration_error"].value < 0.2
    assert found.reliability.n.sum() == found.n_rows
    assert (found.n_traces, found.n_left_out, found.n_truncated) == (60, 0, 6)
    assert {"prompt_length", "bag_of_words", "thinking_length", "first_layer"} <= found.comparison.baselines.keys()
    assert "predicts whether meta.topic is 'geometry'" in found.summary().finding


def test_it_is_not_found_elsewhere(store):
    found = probes.fit(store, "meta.topic", position="last_prompt", **FEW)
    assert not found.comparison.predicts
    assert "does not predict" in found.summary().finding


def test_numbers_are_a_regression(store):
    found = probes.fit(store, "meta.tree.size", task="regression", position="mean", **FEW)
    assert (found.comparison.metric, found.positive, found.reliability) == ("Spearman", "", None)
    assert found.comparison.score.low > 0.9
    assert found.probe.task == "regression"
    assert found.to_dict()["comparison"]["metrics"]["r2"]["value"] > 0.8
    assert "R²" in found.summary().notes[1]


def test_every_nth_token_is_a_row_and_keeps_problems_together(store, traces):
    found = probes.fit(store, "meta.topic", position="every:5", **FEW)
    assert found.n_rows == sum(len(Place.parse("every:5").rows(trace)) for trace in traces) > 120
    assert (found.n_traces, found.n_groups) == (60, 60)


def test_labels_of_a_file_by_problem(store, traces, tmp_path):
    path = tmp_path / "topics.csv"
    lines = [f"{trace.problem.id},{trace.problem.meta['topic']}" for trace in traces[:50]]
    path.write_text("\n".join(["problem,label", *lines]), encoding="utf-8")
    found = probes.fit(store, path, position="mean", positive="Algebra", **FEW)
    assert (found.label, found.positive, found.n_left_out, found.n_traces) == ("topics", "algebra", 10, 50)
    assert found.comparison.score.low > 0.8


def test_a_saved_probe_is_judged_on_what_it_has_not_seen(store, traces, tmp_path):
    fitted = probes.fit(store, "meta.topic", traces[:40], position="mean", **FEW).probe
    fitted.save(tmp_path / "topic.safetensors")
    found = judge_on(LinearProbe.load(tmp_path / "topic.safetensors"), store, "meta.topic", n_resamples=100)
    assert (found.n_traces, found.n_seen, found.n_groups) == (20, 40, 20)
    assert found.metrics["auroc"].value > 0.9
    assert "does not say" not in " ".join(found.notes())
    assert "on 20 traces" in found.notes()[0]
    everything = probes.fit(store, "meta.topic", position="mean", **FEW).probe
    with pytest.raises(InputError, match="learned from the problems of all 60 traces"):
        judge_on(everything, store, "meta.topic")
    nowhere = replace(fitted, provenance={**fitted.provenance, "position": "middle"})
    with pytest.raises(InputError, match="unknown position 'middle'"):
        judge_on(nowhere, store, "meta.topic")


@pytest.mark.parametrize(
    ("label", "settings", "message"),
    [
        ("meta.colour", {}, r"none of the 60 traces has the field meta.colour; .*meta.topic"),
        ("topics.csv", {}, "neither a file nor a field of the run"),
        ({f"{i}": "a" for i in range(60)}, {}, "all 60 traces have label = 'a'; label some of another class"),
        ({f"{i}": "abc"[i % 3] for i in range(60)}, {}, "has 3 classes .*name the one to predict with --positive$"),
        ({f"{i}": i % 3 for i in range(60)}, {}, "ask for --task regression"),
        ({f"{i}": "abc"[i % 3] for i in range(60)}, {"positive": "d"}, "no trace has label = 'd'; its classes are: 'a' 20"),
        ({f"{i}": i > 1 for i in range(60)}, {}, r"the class 'true' \(52 rows\) in 52 and the class 'false' \(2 rows\) in 2; label"),
        ({f"{i}": "x" for i in range(60)}, {"task": "regression"}, "not a finite number"),
        ({f"{i}": 1 for i in range(60)}, {"task": "regression"}, "is 1 for all 60 traces"),
        ("meta.topic", {"position": "nowhere"}, "unknown position 'nowhere'"),
    ],
)  # fmt: skip
def test_faults_are_one_line_with_a_remedy(store, label, settings, message):
    with pytest.raises(InputError, match=message) as error:
        probes.fit(store, label, **{**FEW, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "positive"),
    [(["yes", "no"], "yes"), ([True, False], "true"), ([1, 0], "1"), (["b", "a"], "b"), (["Wrong", "Right"], "Right")],
)  # fmt: skip
def test_of_two_classes_the_affirmative_one_is_predicted(traces, values, positive):
    label = {f"{i}": values[i % 2] for i in range(60)}
    assert labelled(label, traces, "classification").positive == positive


def test_places_are_rows(traces):
    closed, cut = traces[0], traces[9]
    rows = {name: Place.parse(name).rows(closed) for name in ("prompt", "first_thinking", "closing", "last", "every:4")}
    assert rows["prompt"] == [closed.n_prompt_tokens - 1]
    assert rows["first_thinking"] == [closed.tokens.thinking.start]
    assert rows["closing"] == [closed.tokens.close_window.stop - 1]
    assert rows["last"] == [len(closed.token_ids) - 2]
    assert rows["every:4"] == list(range(closed.tokens.thinking.start, closed.tokens.thinking.stop, 4))
    assert Place.parse("closing").rows(cut) == []
    assert Place.parse("mean").rows(cut)[-1] == len(cut.token_ids) - 2
    assert Place.parse("0.5").rows(closed) == Place.parse(0.5).rows(closed)


def test_files_are_named_after_the_label():
    assert [file_name(label) for label in ("meta.topic", "meta.a.b", "dir/my labels.csv")] == [
        "topic",
        "a_b",
        "my_labels",
    ]


@pytest.mark.parametrize("kind", ["attention", "multi-max"])
def test_a_probe_of_all_tokens_is_judged_beside_a_linear_one(store, traces, kind):
    found = probes.fit(
        store, "meta.topic", traces[:48], kind=kind, position="every:4", folds=3, n_permutations=3, n_resamples=100
    )
    assert (found.kind, found.probe.method, found.n_rows, found.n_traces) == (kind, kind, 48, 48)
    assert found.comparison.score.value > 0.8
    assert found.comparison.baselines["linear_probe_of_the_mean"].value > 0.8
    assert f"({kind})" in found.summary().finding
    judged = judge_on(found.probe, store, "meta.topic", n_resamples=100)
    assert (judged.n_traces, judged.n_seen) == (12, 48)
    assert judged.metrics["auroc"].value > 0.8


def test_a_probe_of_all_tokens_scores_the_tokens_as_they_come(store, traces, tmp_path):
    found = probes.fit(
        store, "meta.topic", kind="attention", sites=[Site("resid_post", 1)], folds=3, n_permutations=1, n_resamples=20
    )
    assert write_scores(found.probe, store, tmp_path / "scores.safetensors", name="topic") == 60
    scores, trace = read_scores(tmp_path / "scores.safetensors").scores, traces[0]
    span = span_states(store, trace, found.place, found.probe.site)
    first, last = trace.tokens.thinking.start, trace.tokens.thinking.stop
    assert scores[trace.id][first:last] == pytest.approx(found.probe.probabilities(span), rel=1e-4)
    assert set(scores[trace.id][: first + 1]) == {scores[trace.id][first]}
    assert set(scores[trace.id][last - 1 :]) == {scores[trace.id][last - 1]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kind": "mlp"}, "unknown kind"), ({"kind": "attention", "position": "closing"}, "all of the thinking")],
)
def test_what_cannot_be_read_is_said(store, settings, message):
    with pytest.raises(InputError, match=message):
        probes.fit(store, "meta.topic", **settings)
