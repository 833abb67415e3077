"""Two runs are paired by trace: the numbers of hand-made traces, and a plain run beside a steered one with a probe."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.analysis.results import Axis, Result, result_path
from reasonscope.analysis.traces.steered_pairs import compare_runs
from reasonscope.app import cli
from reasonscope.data.errors import InputError
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Problem
from reasonscope.probes.architecture.sites import Site
from reasonscope.steering import Scope, SteeringVector, VectorUse
from reasonscope.steering.recipes.recipe import Recipe

WORDS = {"plain": ["one two three four", "a b c d e f"], "steered": ["one two now", "a b c d e f"]}
ANSWERS = {"plain": ["7", "8"], "steered": ["7", "9"]}


@pytest.fixture
def runs(tmp_path, tokenizer):
    """Two problems in two runs; the second trace is written alike up to its answer."""
    for run, words in WORDS.items():
        traces = [
            trace_from_text(
                id=f"p{i}/0",
                problem=Problem(id=f"p{i}", prompt=f"q{i}", answer="78"[i]),
                prompt="q<think>\n",
                completion=f"{text}\n</think>\n\n\\boxed{{{ANSWERS[run][i]}}}",
                tokenizer=tokenizer,
            )
            for i, text in enumerate(words)
        ]
        meta = {"steered": {"name": "seal", "hash": "0123456789ab"}} if run == "steered" else {}
        with TraceStore.create(tmp_path / run / "store", meta=meta) as store:
            store.append(traces, {})
        for i, trace in enumerate(traces):
            n = trace.n_thinking_tokens
            values = np.full((1, n), 1.0 + i - 0.5 * (run == "steered"))
            axes = (Axis.of("site", ["resid_post.1"]), Axis.of("token", [str(t) for t in range(n)]))
            found = Result(method="mi", quantity="mi", unit="1", axes=axes, values=values, null_missing="made by hand")
            found.save(result_path(tmp_path / run / "results", "mi", trace.id))
    return tmp_path


def opened(runs):
    return [TraceStore.open(runs / name / "store") for name in ("plain", "steered")]


def test_pairs_part_where_their_tokens_first_differ_and_differences_are_paired(runs):
    plain, steered = opened(runs)
    found = compare_runs(plain, steered, results=(runs / "plain" / "results", runs / "steered" / "results"))
    first, second = found.partings
    ours, theirs = (store.trace("p0/0").token_ids[store.trace("p0/0").n_prompt_tokens :] for store in (plain, steered))
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    assert first.token == at and first.before.endswith("one two")
    assert first.plain.startswith("three") and first.steered.startswith("now")
    assert second.plain.startswith("8") and second.steered.startswith("9")
    lengths = [[store.trace(id).n_thinking_tokens for store in (plain, steered)] for id in plain.ids]
    tokens = found.measures["thinking tokens"]
    assert tokens.difference == np.mean([b - a for a, b in lengths]) < 0 and (tokens.n, tokens.n_groups) == (2, 2)
    accuracy = found.measures["accuracy"]
    assert (accuracy.theirs, accuracy.ours, accuracy.difference) == (1.0, 0.5, -0.5)
    assert accuracy.interval[0] < -0.5 < accuracy.interval[1]
    mi = found.measures["mean MI"]
    assert (mi.theirs, mi.ours, mi.difference) == (1.5, 1.0, -0.5)
    summary = found.summary()
    assert "by seal (0123456789ab)" in summary.finding and "2 of 2 traces part" in summary.finding
    assert summary.quotes[0][0].endswith(f"⟨{first.plain} | {first.steered}⟩")


def test_the_table_names_its_columns_and_says_how_many_traces_both_runs_have(runs):
    summary = compare_runs(*opened(runs), results=(runs, runs)).summary()
    assert summary.columns == ("measure", "plain", "steered", "difference", "by chance", "n")
    assert not any("In both runs" in note or "Cut off" in note for note in summary.notes)


def test_traces_that_are_alike_do_not_part_and_one_may_end_before_the_other(tmp_path, tokenizer):
    texts = {"plain": ["a b", "same"], "steered": ["a b c d", "same", "more"]}
    for run, completions in texts.items():
        traces = [
            trace_from_text(
                id=f"p{i}/0",
                problem=Problem(id=f"p{i}", prompt="q"),
                prompt="q<think>\n",
                completion=text,
                tokenizer=tokenizer,
                finish_reason="stop" if run == "plain" or i else "length",
            )
            for i, text in enumerate(completions)
        ]
        with TraceStore.create(tmp_path / run / "store") as store:
            store.append(traces, {})
    found = compare_runs(*opened(tmp_path), results=(tmp_path, tmp_path))
    shorter, alike = found.partings
    assert alike.token is None and alike.id == "p1/0" and shorter.plain == "(ends)" and shorter.steered.startswith("c")
    assert found.summary().finding.startswith("From plain to steered the tokens of the thinking change by")
    assert "1 of 2 traces part" in found.summary().finding
    assert "In both runs: 2 traces (of 2 and 3)." in found.notes
    assert any(
        note.startswith("Cut off at the token limit: 0 of 2 plain traces and 1 steered;") for note in found.notes
    )


def test_without_thinking_the_tokens_of_the_completions_are_compared(tmp_path, tokenizer):
    for run, text in (("plain", "a b c d"), ("steered", "a b")):
        trace = trace_from_text(
            id="p/0", problem=Problem(id="p", prompt="q"), prompt="q", completion=text, tokenizer=tokenizer
        )
        with TraceStore.create(tmp_path / run / "store") as store:
            store.append([trace], {})
    assert (
        "tokens of the completions change by −"
        in compare_runs(*opened(tmp_path), results=(tmp_path, tmp_path)).summary().finding
    )


def test_what_cannot_be_compared_is_said(runs, tokenizer):
    plain, steered = opened(runs)
    nowhere = runs / "nowhere"
    found = compare_runs(steered, plain, results=(nowhere, nowhere))
    assert found.missing == {"mean MI": "run `reasonscope analyse mi` on both runs first"}
    assert any("plain names no recipe" in note for note in found.notes)
    other = trace_from_text(
        id="p0/0", problem=Problem(id="p0", prompt="other"), prompt="q<think>\n", completion="x", tokenizer=tokenizer
    )
    for id, said in (("p0/0", "asks different problems"), ("p9/0", "share no trace")):
        folder = runs / id.replace("/", "-")
        with TraceStore.create(folder) as store:
            store.append([other if id == "p0/0" else other.__class__(**{**vars(other), "id": id})], {})
        with pytest.raises(InputError, match=said):
            compare_runs(plain, store, results=(nowhere, nowhere))


def steered_by(groups):
    """A recipe of one vector that was learned from these groups; from unknown ones if None."""
    about = {} if groups is None else {"groups": groups}
    vector = SteeringVector(
        directions={Site("resid_post", 1): np.ones(4, dtype=np.float32)}, method="seal", provenance=about
    )
    return Recipe.of([VectorUse(vector=vector, scope=Scope())], name="seal")


def test_problems_that_the_recipe_or_the_probe_learned_from_are_not_judged(runs):
    plain, steered = opened(runs)
    folders = (runs / "plain" / "results", runs / "steered" / "results")

    def compared(groups):
        steered_by(groups).save(steered.recipe)
        return compare_runs(plain, steered, results=folders)

    found = compared(["p0", "elsewhere"])
    assert {one.n for one in found.measures.values()} == {1} and len(found.partings) == len(found.lengths) == 2
    assert found.measures["accuracy"].difference == -1.0 and found.measures["mean MI"].theirs == 2.0
    assert "The recipe learned from 1 of these problems; the differences are of the others." in found.notes
    with pytest.raises(InputError, match="learned from all 2 problems of both runs"):
        compared(["p0", "p1"])
    assert all("learned from" not in note for note in compared(["elsewhere"]).notes)
    unknown = compared(None)
    assert unknown.measures["accuracy"].n == 2
    assert "The recipe does not say which problems it learned from: these may be among them." in unknown.notes


def test_the_command_says_it_draws_it_and_keeps_the_numbers(runs):
    args = ["analyse", "compare", str(runs / "plain"), str(runs / "steered")]
    said = CliRunner().invoke(cli.app, args, catch_exceptions=False)
    assert said.exit_code == 0 and "Steering by seal" in said.stdout and "by chance" in said.stdout
    shown = json.loads(CliRunner().invoke(cli.app, [*args, "--json"], catch_exceptions=False).stdout)
    kept = json.loads((runs / "steered" / "numbers" / "compare.json").read_text(encoding="utf-8"))
    assert kept["numbers"] == shown and shown["n_pairs"] == 2
    assert (runs / "steered" / "figures" / "compare.html").exists()
