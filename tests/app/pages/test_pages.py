"""Every page of the app on the example, an empty run, a damaged one, imported traces and results; no model runs in any of them."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from reasonscope.analysis.anchors.published import published_importances
from reasonscope.analysis.results import Axis, Band, Result, result_path
from reasonscope.analysis.runs.opened_run import open_run
from reasonscope.analysis.runs.saved_numbers import read_numbers, save_numbers
from reasonscope.app.demo.bundled import EXAMPLE
from reasonscope.app.demo.real_example import EXAMPLES, MOST_BYTES
from reasonscope.app.page_parts import colourings, components, measurements, readings, runs, state
from reasonscope.app.page_parts.alternatives import shown_alternatives
from reasonscope.app.page_parts.reader import _reader_data
from reasonscope.app.server import main
from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.exchange.importers import import_jsonl, import_thought_anchors
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import TokenScores, save_scores

VIEWS = ("overview", "traces", "mi", "anchors", "heads", "probes", "refusal", "steering", "ablations", "compare")
HOSTILE = "<script>alert(1)</script> **bold** $x$ [a](http://evil.example/) ![i](http://evil.example/i.png)"


def _show(view: str, folder: str) -> None:
    from importlib import import_module
    from pathlib import Path

    from reasonscope.analysis.runs.opened_run import open_run
    from reasonscope.app.page_parts import components, state

    state.offer_runs({"this": Path(folder)})
    with components.show_errors():
        import_module(f"reasonscope.app.pages.{view}").show(open_run(Path(folder)))


def page(view: str, run: Path, **query: str) -> AppTest:
    test = AppTest.from_function(_show, args=(view, str(run)), default_timeout=60)
    test.query_params.update(query)
    return test.run()


def words(test: AppTest) -> str:
    """All that a page says."""
    elements = [*test.info, *test.warning, *test.error, *test.caption, *test.markdown, *test.code, *test.subheader]
    return "\n".join(str(element.value) for element in elements)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "empty"
    TraceStore.create(folder, sites=[]).close()
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Completions without tokens, one of which is hostile; and results on it that an analysis would leave."""
    folder = tmp_path_factory.mktemp("runs") / "imported"
    rows = [
        {
            "id": "plain",
            "prompt": "3 + 4?",
            "completion": "<think>\nI add. It is 7.\n\nWait, 7.\n</think>\n\n7",
            "answer": "7",
        },
        {
            "id": "hostile",
            "prompt": HOSTILE,
            "completion": f"<think>\n{HOSTILE} So. It is \\boxed{{7}}.\n</think>\n\n{HOSTILE}",
        },
    ]
    file = folder.parent / "completions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with TraceStore.create(folder / "store", sites=[]) as store:
        store.append(import_jsonl(file), {})
    leave_results(folder, "plain", 3)
    return folder


def leave_results(folder: Path, id: str, n: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((2, n))
    cut = cut_trace(TraceStore.open(folder / "store").trace(id))
    assert len(cut.sentences) == n
    chance = {"null_missing": "made up for a test"}
    Result(
        method="anchors",
        quantity="importance",
        unit="nats",
        axes=(Axis.of("metric", ["resampling_kl", "counterfactual_kl"]), Axis.of("sentence", n)),
        values=values,
        null=Band.of(0.0, 0.1, values.shape, "shuffled"),
        interval=Band.of(values - 0.1, values + 0.1, values.shape, "bootstrap"),
        arrays={"effects": np.tril(rng.standard_normal((n, n)), -1)},
        provenance={"trace": id, "seed": 0, "cut": cut.cut_hash},
    ).save(result_path(folder / "results", "anchors", id))
    Result(
        method="heads", quantity="span", unit="tokens", axes=(Axis.of("metric", ["span"]), Axis.of("layer", 2), Axis.of("head", 3)),
        values=rng.random((1, 2, 3)), provenance={"trace": id}, **chance,
    ).save(result_path(folder / "results", "heads", id))  # fmt: skip


@pytest.fixture
def damaged(imported, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(imported, run)
    shard = next((run / "store" / "shards").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    return run


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_shows_the_example(view):
    test = page(view, EXAMPLE)
    assert not test.exception
    assert len(test.error) == 0
    assert len(test.header) == 1


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_of_an_empty_run_says_what_to_do(view, empty):
    test = page(view, empty)
    assert not test.exception
    assert any(word in words(test) for word in ("empty", "reasonscope "))


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_of_a_damaged_run_is_one_line(view, damaged):
    test = page(view, damaged)
    assert not test.exception
    assert len(test.error) == 1 and "\n" not in test.error[0].value
    assert "parquet" in test.error[0].value


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_shows_imported_traces(view, imported):
    test = page(view, imported)
    assert not test.exception
    assert len(test.error) == 0


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_shows_a_published_run(view, published):
    test = page(view, published)
    assert not test.exception
    assert len(test.error) == 0


def test_a_published_sentence_shows_its_numbers_what_was_resampled_and_its_links(published):
    test = page("anchors", published, sentence="1", metric="counterfactual kl", truth="true")
    row = test.dataframe[0].value
    assert row["number"][0] == "counterfactual kl" and row["value"][0] == "0.2" and row["unit"][0] == "nats"
    assert set(row["chance"]) == {"not known"}  # nothing was published to draw it from
    instead = test.dataframe[1].value
    assert instead["instead"].tolist() == ["So it is 8."] and instead["rollouts"].tolist() == ["2 of 3"]
    (link,) = [button for button in test.button if button.label.startswith("3 ")]
    link.click().run()
    assert test.subheader[0].value == "Sentence 3" and test.query_params["sentence"] == "3"
    assert test.latex and "boxed" in test.latex[0].value
    [before] = [button for button in test.button if button.label == "Previous"]
    before.click().run()
    assert test.subheader[0].value == "Sentence 2"
    assert any("Labelled dependencies" in toggle.label for toggle in test.toggle)


@pytest.fixture
def edited(published, tmp_path):
    """The published run, one of whose published sentences was edited: it stands nowhere in the thinking."""
    with TraceStore.create(tmp_path / "store", sites=[]) as store:
        for trace in TraceStore.open(published / "store"):
            chunks = [dict(chunk) for chunk in trace.meta["chunks"]]
            chunks[1]["chunk"] = "Nobody wrote this."
            store.append([trace := replace(trace, meta={**trace.meta, "chunks": chunks})], {})
            published_importances(trace).save(result_path(tmp_path / "results", "anchors", trace.id))
            leave_line(tmp_path, trace.id, [10.0, 11.0, 12.0], cut_trace(trace).cut_hash)
    return tmp_path


def leave_line(folder: Path, id: str, values: list[float], cut: str) -> None:
    Result(
        method="close_attention", quantity="attention", unit="1", axes=(Axis.of("sentence", len(values)),), values=values,
        null_missing="made up for a test", provenance={"trace": id, "cut": cut},
    ).save(result_path(folder / "results", "close_attention", id))  # fmt: skip


def test_a_trace_of_which_a_published_sentence_is_left_out_is_coloured_in_place(edited):
    run = open_run(edited)
    (row,) = readings.trace_rows(run)
    ours, theirs = colourings.colouring_name("close_attention"), "importance · counterfactual_kl"
    for name, values, said in ((ours, [10, 11, 12], "12"), (theirs, [0, 0.4, 0.6], "0.6")):
        colour = colourings.colouring(run, row.id, name)
        np.testing.assert_allclose(colour.values, values)
        data = _reader_data(readings.cut_of(run, row.id), colour)
        assert [index for _, index, *_ in data["blocks"] if index is not None] == [0, 1, 2]
        test = page("traces", edited, trace=row.id, colour=name, sentence="2")
        assert not test.exception and "boxed" in test.latex[0].value
        assert f": {said}" in words(test).replace("\\", "")


def test_a_result_over_another_cut_colours_nothing(edited):
    run = open_run(edited)
    (row,) = readings.trace_rows(run)
    name = colourings.colouring_name("close_attention")
    assert colourings.colouring(run, row.id, name) is not None
    leave_line(edited, row.id, [10.0, 11.0, 12.0], "of another cut")
    assert colourings.colouring(open_run(edited), row.id, name) is None


def test_a_published_sentence_opens_at_its_place(edited, monkeypatch):
    went = []
    monkeypatch.setattr(state, "go", lambda page, **values: went.append(values[state.Key.SENTENCE]))
    for sentence in "0123":
        test = page("anchors", edited, sentence=sentence, metric="counterfactual kl")
        assert test.subheader[0].value == f"Sentence {sentence}"
        for button in test.button:
            if button.label == "Read it in the trace":
                button.click().run()
    assert went == [0, 1, 2], "the one that is left out stands nowhere"


def test_published_traces_of_the_paper_are_shown(real_traces, tmp_path):
    traces = import_thought_anchors(real_traces)
    with TraceStore.create(tmp_path / "store", sites=[]) as store:
        store.append(traces, {})
    trace = next(one for one in traces if "chunks_resampled" in one.meta)
    published_importances(trace).save(result_path(tmp_path / "results", "anchors", trace.id))
    test = page("anchors", tmp_path, trace=trace.id, sentence="11")
    assert not test.exception and len(test.error) == 0
    assert len(test.dataframe[1].value) == 3


def test_a_run_that_is_not_there_names_the_remedy(tmp_path):
    assert "reasonscope record" in page("overview", tmp_path / "none").error[0].value.replace("\\", "")


def test_the_overview_filters_and_says_how_many():
    rows = readings.trace_rows(open_run(EXAMPLE))
    right = sum(row.outcome == "right" for row in rows)
    test = page("overview", EXAMPLE, outcome="right")
    assert f"{right} of {len(rows)} traces" in words(test)
    assert f"0 of {len(rows)} traces" in words(page("overview", EXAMPLE, search="no such words"))


def test_the_address_chooses_trace_colour_and_sentence():
    run = open_run(EXAMPLE)
    id = next(row.id for row in readings.trace_rows(run) if row.outcome == "right")
    test = page("traces", EXAMPLE, trace=id, colour="entropy", sentence="2")
    assert [box.value for box in test.selectbox] == [id, "entropy", None]
    assert "Sentence 2" in words(test) and "entropy of the next token" in words(test)


def test_a_damaged_result_is_named_and_the_rest_is_shown(imported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    (run / "results" / "anchors" / "hostile.safetensors").write_bytes(b"no")
    test = page("anchors", run)
    assert not test.exception
    assert "hostile" in test.warning[0].value
    assert [box.label for box in test.selectbox] == ["Trace", "Metric"]


def test_a_chosen_sentence_shows_its_interval_and_links(imported):
    test = page("anchors", imported, sentence="1", metric="counterfactual kl")
    assert test.subheader[0].value == "Sentence 1"
    assert "chance" in test.dataframe[0].value.columns
    assert any(button.label.startswith("0 ") for button in test.button)


def test_a_result_over_sentences_colours_the_trace(imported):
    run = open_run(imported)
    name = "importance · counterfactual_kl"
    assert name in colourings.colouring_names(run, "plain")
    found = colourings.colouring(run, "plain", name)
    assert found.per == "sentence" and found.null.shape == (2, 3) and "seed 0" in found.about


def test_what_a_controller_decided_colours_the_trace_until_it_decides_again(tmp_path):
    run = tmp_path / "example"
    shutil.copytree(EXAMPLE, run)
    trace = cut_of_first(open_run(run))
    start = trace.tokens.thinking.start
    line = np.full(len(trace.token_ids) - 1, np.nan, dtype=np.float32)
    line[[start + 3, start + 9]] = [0.25, 0.75]
    about = {"name": "exit-probe", "site": "resid_post.4", "unit": "score", "provenance": {"threshold": 0.8}}
    (run / "scores").mkdir(exist_ok=True)
    save_scores(TokenScores(scores={trace.id: line}, about=about), run / "scores" / "control-exit-probe.safetensors")
    opened = open_run(run)
    assert "controller: exit-probe" in colourings.colouring_names(opened, trace.id)
    found = colourings.colouring(opened, trace.id, "controller: exit-probe")
    assert np.isnan(found.values[: start + 3]).all() and (found.values[start + 3 : start + 9] == 0.25).all()
    stop = trace.tokens.thinking.stop
    assert (found.values[start + 9 : stop] == 0.75).all() and np.isnan(found.values[stop:]).all()
    assert "n = 2 decisions; it stops at 0.8" in found.about and "resid_post.4" in found.about


def cut_of_first(run):
    """The first trace of a run."""
    return readings.cut_of(run, readings.trace_rows(run)[0].id).trace


def test_the_blocks_of_the_reader_are_the_whole_text():
    run = open_run(EXAMPLE)
    for row in readings.trace_rows(run)[:8]:
        read = readings.cut_of(run, row.id)
        data = _reader_data(read, colourings.colouring(run, row.id, "entropy"))
        assert data["text"] == read.trace.text and data["ends"][-1] == len(read.trace.text)
        assert len(data["colour"]["values"]) == len(data["ends"]) == len(read.trace.token_ids)
        assert [index for _, index, *_ in data["blocks"] if index is not None] == [s.index for s in read.sentences]
        places = [place for *_, first, count in data["blocks"] for place in range(first, first + count)]
        assert places == list(range(len(read.trace.token_ids)))


def test_hostile_text_reaches_the_page_as_text(imported):
    run = open_run(imported)
    data = _reader_data(readings.cut_of(run, "hostile"), None)
    assert HOSTILE in data["text"]
    said = page("compare", imported, trace="hostile", with_trace="hostile")
    markup = "".join(str(element.proto) for element in said.main if "html" in str(element.type))
    assert "<script>" not in markup
    assert components.as_text("![i](x) <b>") == "\\!\\[i\\]\\(x\\) \\<b\\>"


def test_numbers_show_their_intervals():
    score = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 7}
    earlier = {"value": 0.9, "ci": [0.8, 0.95]}  # as earlier versions wrote it
    numbers = {"score": score, "earlier": earlier, "n": 3, "cells": {"a": {"value": 1.0}}, "list": [1.0, 2.0]}
    assert list(components._flattened(numbers)) == [
        ("score", 0.9, 0.8, 0.95),
        ("score · n", 7, None, None),
        ("earlier", 0.9, 0.8, 0.95),
        ("n", 3, None, None),
        ("cells · a", 1.0, None, None),
        ("list", "1 … 2", None, None),
    ]


def test_what_is_kept_is_read_again(tmp_path):
    where = run_folder(tmp_path)
    save_numbers(where, "mine", {"a": float("nan"), "b": {"value": 1.0}}, command="reasonscope x", seed=3, figures={})
    kept = read_numbers(where.numbers / "mine.json")
    assert (kept["command"], kept["seed"], kept["numbers"]) == ("reasonscope x", 3, {"a": None, "b": {"value": 1.0}})
    (where.numbers / "mine.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="measure again"):
        read_numbers(where.numbers / "mine.json")


@pytest.mark.parametrize("name", ["../outside", "/etc", "link"])
def test_a_run_outside_of_the_root_is_refused(name, tmp_path, empty):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(empty, target_is_directory=True)
    with pytest.raises(InputError, match="outside"):
        runs.confined(root, name)
    assert runs.find_runs(root) == []


def test_runs_below_the_root_are_found(empty, imported, tmp_path):
    shutil.copytree(empty, tmp_path / "a")
    shutil.copytree(imported, tmp_path / "deep" / "b")
    assert runs.find_runs(tmp_path) == ["a", "deep/b"]
    assert open_run(tmp_path / "a").name == "a"
    with pytest.raises(StoreError, match="reasonscope record"):
        open_run(tmp_path / "deep")


def test_the_whole_app_opens_with_the_real_example(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "", str(tmp_path)])
    test = AppTest.from_file(str(Path(main.__file__)), default_timeout=60).run()
    assert not test.exception
    assert test.header[0].value == r"Run example\-gsm8k"
    assert test.selectbox[0].options == list(EXAMPLES)


def test_the_real_example_holds_what_a_study_measured_on_twelve_traces():
    run, steered = (open_run(EXAMPLES[name]) for name in ("GSM8K", "GSM8K, steered"))
    assert run.store.sites == () and run.store.check() == steered.store.check() == []
    assert sum(f.stat().st_size for one in (run, steered) for f in one.path.rglob("*") if f.is_file()) < MOST_BYTES
    for method, n in {
        "mi": 12,
        "heads": 12,
        "suppression": 12,
        "entropy": 12,
        "alternatives": 12,
        "anchors": 5,
    }.items():
        assert len(set(measurements.results(run, method)) - {None}) >= n, method
    assert set(steered.store.ids) <= set(run.store.ids) and steered.store.recipe.exists()
    for one in (run, steered):
        assert (one.path / "LICENSE-problems").read_text(encoding="utf-8").startswith("MIT License")


def test_the_example_holds_no_activations_and_is_small():
    run = open_run(EXAMPLE)
    assert run.store.sites == ()
    assert run.store.check() == []
    assert sum(file.stat().st_size for file in EXAMPLE.rglob("*") if file.is_file()) < 2e6
    assert {one.name for one in measurements.run_measurements(run) if one.there} >= {
        "numbers/length.json",
        "numbers/steering.json",
    }


def analysed() -> str:
    """A trace of the example that was analysed sentence by sentence."""
    return next(iter(measurements.results(open_run(EXAMPLE), "anchors")))


def test_a_sentence_shows_what_else_could_have_stood_there():
    test = page("traces", EXAMPLE, trace=analysed(), sentence="3")
    (table,) = [frame.value for frame in test.dataframe if "likeliest" in frame.value.columns]
    read = readings.cut_of(open_run(EXAMPLE), analysed())
    assert len(table) == len(read.sentences[3].tokens)
    assert table["probability"].between(0, 1).all() and (table["likeliest"].str.count("%") == 5).all()
    found = shown_alternatives(open_run(EXAMPLE), analysed())
    data = _reader_data(read, None, found)["alternatives"]
    assert data["first"] == read.trace.n_prompt_tokens and len(data["ids"]) == 5 * len(data["said"])
    assert data["pieces"][data["ids"][0]] == found.at(data["first"])[0][0]


def test_a_trace_is_coloured_by_every_kind_of_method():
    run, id = open_run(EXAMPLE), analysed()
    names = colourings.colouring_names(run, id)
    wanted = {
        "entropy",
        "surprise",
        "probe: intent",
        "MI · resid_post.5",
        "importance · counterfactual_kl",
        "steered − base",
    }
    assert wanted | {"suppression effect", "attention received"} <= set(names)
    for name in names[1:]:
        found = colourings.colouring(run, id, name)
        n = len(readings.cut_of(run, id).sentences) if found.per == "sentence" else len(run.store.trace(id).token_ids)
        assert found.values.shape == (n,) and np.isfinite(found.values).any() and found.ends[0] < found.ends[1]
    shift = colourings.colouring(run, id, "steered − base")
    assert "vector seal" in shift.about and shift.null is not None


def test_the_base_model_is_shown_with_the_reasoner():
    test = page("mi", EXAMPLE, trace=analysed())
    (table,) = [frame.value for frame in test.dataframe if "reasoner minus base" in frame.value.columns]
    assert table["number"].tolist() == ["mean", "aom", "share peaks"] and table["traces"].min() > 2
    assert "…" in table["95 % interval"][0] and "…" in table["chance"][0]


def test_heads_are_compared_down_to_the_tokens_of_a_block():
    test = page("heads", EXAMPLE, head="4.2", heads="2.3", block="6.2")
    assert not test.exception and len(test.error) == 0
    said = words(test)
    assert "Layer 4, head 2" in said and "Sentence 6 attends to sentence 2" in said
    (scores,) = [frame.value for frame in test.dataframe if "score" in frame.value.columns]
    assert {"4.2", "4.2 rank", "4.2 chance", "2.3"} <= set(scores.columns)
    odd = page("heads", EXAMPLE, head="9.9", heads="x", block="99.0")
    assert not odd.exception and len(odd.error) == 0


def test_two_runs_are_compared_with_their_intervals(tmp_path):
    run = tmp_path / "other"
    shutil.copytree(EXAMPLE, run)
    rows = readings.trace_rows(open_run(run))
    compare_runs = AppTest.from_function(_compare, args=(str(EXAMPLE), str(run)), default_timeout=60).run()
    (table,) = [frame.value for frame in compare_runs.dataframe if "difference" in frame.value.columns]
    assert table["mean"].tolist() == ["right", "refused", "thinking tokens"] and set(table["difference"]) == {"+0"}
    assert table["n"][2].startswith(f"{len(rows)} of ")


def _compare(first: str, second: str) -> None:
    from pathlib import Path

    from reasonscope.analysis.runs.opened_run import open_run
    from reasonscope.app.page_parts import state
    from reasonscope.app.pages import compare

    state.offer_runs({"other": Path(second), "example": Path(first)})
    compare.show(open_run(Path(first)))


def test_what_a_sentence_passes_on_is_a_metric_with_its_chance():
    test = page("anchors", EXAMPLE, trace=analysed(), metric="replacement", sentence="6")
    assert not test.exception and test.selectbox[1].value == "replacement"
    row = test.dataframe[0].value
    result = measurements.results(open_run(EXAMPLE), "replacement")[analysed()]
    later = result.values[:, 6][np.isfinite(result.values[:, 6])]
    assert float(row["value"][0]) == pytest.approx(later.mean(), rel=1e-3) and row["unit"][0] == "nats"
    assert f"n = {len(later)} later sentences" in words(test).replace("\\", "")
    links = [button.label for button in test.button if "chance" in button.label]
    assert links and all(
        components.between(result.null, (7, 6)).split()[0] in label.replace("\\", "") for label in links
    )
    assert "instead" in test.dataframe[1].value.columns  # what the rollouts wrote stands beside it


def test_the_metrics_of_thought_anchors_name_the_closing_tag_and_what_is_missing(imported):
    assert "attention at the end of the thinking" in page("anchors", EXAMPLE, trace=analysed()).selectbox[1].options
    test = page("anchors", imported)
    (missing,) = [one.label for one in test.expander if one.label.startswith("Not measured")]
    assert "replacement" in missing and "attention at the end of the thinking" in missing and "rollouts" not in missing
    lines = {code.value.split(" --run")[0] for code in test.code if "--trace plain" in code.value}
    assert {"reasonscope analyse heads", "reasonscope analyse anchors", "reasonscope analyse suppression"} <= lines


def test_the_heads_page_shows_the_closing_tag_and_recurrence():
    test = page("heads", EXAMPLE, trace=analysed(), head="3.2", layer="3")
    said = words(test)
    assert not test.exception and {
        "What the end of the thinking attends to",
        "What is attended to again after a pause",
    } <= set(said.split("\n"))
    (table,) = [frame.value for frame in test.dataframe if "tokens that come back" in frame.value.columns]
    measured = measurements.results(open_run(EXAMPLE), "recurrence")[analysed()].numbers
    assert table["layer"].tolist() == list("012345")
    assert float(table["tokens that come back"][3]) == pytest.approx(
        measured["by_layer"][3]["recurring"]["value"], rel=1e-3
    )
    assert "…" in table["tokens that come back: 95 % interval"][3]
    chance = table["tokens that come back: chance"]
    assert float(chance[3]) == pytest.approx(measured["by_layer_null"][3]["recurring"], rel=1e-3)


def test_heads_without_these_results_say_which_command_makes_them(imported):
    lines = [code.value for code in page("heads", imported).code if code.language == "bash"]
    assert any("analyse heads" in line for line in lines) and any("analyse attention" in line for line in lines)


def test_a_trace_is_coloured_by_attention_of_the_closing_tag_and_by_pauses():
    run, id = open_run(EXAMPLE), analysed()
    again = colourings.colouring(run, id, "longest pause before a look · layer 4")
    assert (again.per, again.unit) == ("token", "tokens") and again.null is not None
    importance = colourings.colouring(run, id, "importance · counterfactual_kl")
    assert importance.unit == "nats" and importance.interval.shape == importance.null.shape == (
        2,
        len(importance.values),
    )
    for metric in ("counterfactual_accuracy", "counterfactual_kl"):
        name = f"importance · {metric}"
        said = words(page("traces", EXAMPLE, trace=id, sentence="6", colour=name)).replace("\\", "")
        low, high = colourings.colouring(run, id, name).interval[:, 6]
        assert "chance " in said and "nan" not in said.split()
        assert (f"95 % interval {low:.3g} … {high:.3g}, chance " in said) == bool(np.isfinite(low))
    assert "attention at the end of the thinking" in colourings.colouring_names(run, id)


@pytest.mark.parametrize("method", ["recurrence", "confidence", "agreement"])
def test_every_result_of_a_trace_can_be_seen_whole(method):
    test = page("traces", EXAMPLE, trace=analysed(), measured=method)
    assert not test.exception and len(test.error) == 0
    assert f"reasonscope analyse {measurements.command_of(open_run(EXAMPLE), method).split()[2]}" in words(test)
    result = measurements.results(open_run(EXAMPLE), method)[analysed()]
    assert result.quantity in words(test).replace("\\", "")


def test_the_overview_filters_by_length_and_difficulty_and_says_shares_with_their_interval():
    found = readings.trace_rows(open_run(EXAMPLE))
    long = [row for row in found if 300 <= row.thinking_tokens <= 400]
    test = page("overview", EXAMPLE)
    test.slider[0].set_value((300, 400)).run()
    assert f"{len(long)} of {len(found)} traces" in words(test)
    test.slider[1].set_value((5, 5)).run()
    assert f"{sum(row.difficulty == 5 for row in long)} of {len(found)} traces" in words(test)
    right, judged = (sum(row.outcome in of for row in found) for of in (("right",), ("right", "wrong")))
    assert components.share_interval(right, judged) in words(test).replace("\\", "")


def test_every_kind_of_result_names_the_command_that_makes_it():
    run = open_run(EXAMPLE)
    assert all(one.command for one in measurements.run_measurements(run))
    assert measurements.command_of(run, "close_attention").startswith("reasonscope analyse heads")
    assert measurements.command_of(run, "replacement").startswith("reasonscope analyse anchors")


def test_numbers_of_arms_are_named_and_addresses_are_not_links():
    numbers = {"random": [{"name": "random 1", "tokens": {"value": 3.0, "ci": [2.0, 4.0]}}], "above": True}
    assert list(components._flattened(numbers))[1] == ("random · random 1 · tokens", 3.0, 2.0, 4.0)
    assert components._text(True) == "yes"
    shown = components.as_text("see http://evil.example or www.evil.example")
    assert "://" not in shown and "\u2060" in shown


def table_of(test: AppTest) -> dict[str, tuple[object, object]]:
    """The numbers of a page by name: value, and interval if there is one."""
    [frame] = [element for element in test.dataframe if "number" in element.value.columns]
    rows = frame.value.to_dict("records")
    return {row["number"]: (row["value"], row.get("95 % interval")) for row in rows}


def test_the_pages_show_what_the_probe_commands_saved():
    length = table_of(page("probes", EXAMPLE, probe="length"))
    assert length["comparison · score"] == ("0.9233", "0.898 … 0.939")
    assert length["comparison · difference"][0].startswith("-0.02")
    refusal = table_of(page("probes", EXAMPLE, probe="refusal"))
    assert refusal["contrasts · intent · comparison · score"][0].startswith("0.97")
    assert "comparison · score" not in refusal, "the main contrast stands among the contrasts"
    cliffs = table_of(page("refusal", EXAMPLE, contrast="intent"))
    assert cliffs["intent · harmful complied · drop"][1] and cliffs["traces · harmful complied"][0] == "23"


def test_the_cliffs_of_an_earlier_version_are_shown(tmp_path):
    copied = shutil.copytree(EXAMPLE, tmp_path / "run")
    path = copied / "numbers" / "refusal.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    earlier = {name: {"cliffs": found["cliffs"]} for name, found in kept["numbers"]["contrasts"].items()}
    path.write_text(json.dumps({**kept, "numbers": {**earlier, "cells": {"harmful complied": 23}}}), encoding="utf-8")
    cliffs = table_of(page("refusal", copied, contrast="intent"))
    assert cliffs["intent · harmful complied · drop"][1] and cliffs["traces · harmful complied"][0] == "23"
