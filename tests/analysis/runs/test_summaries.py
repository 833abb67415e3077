"""Each analysis answers its question in a sentence with its control, a small table and text of the traces; or says why it cannot."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reasonscope.analysis.causal.summaries import _sets
from reasonscope.analysis.results import Axis, Band, Result, load_results, undefined
from reasonscope.analysis.runs.questions import QUESTIONS
from reasonscope.analysis.runs.registry import numbers_of
from reasonscope.analysis.runs.runner import AnalysisTask, summarise
from reasonscope.analysis.statistics import null_band
from reasonscope.analysis.wording import in_context, over_traces, short, span, without_columns
from reasonscope.app.demo.bundled import EXAMPLE
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary

ROOT = Path(__file__).parents[3]

N = r"(?:[<>] )?−?[0-9.]+(?: \[[^\]]+\])?"
R = rf"{N}(?: to {N})?"
FINDINGS = {
    "mi": rf"MI peaks are {N} of the tokens, most often at “.+?” and “.+?” \(.+ times as often as chance\); at {N} of the "
    r"tokens the state depends more on the trace's own answer than on other answers \(.+ by chance; mean of 6 traces\)\.",
    "anchors": rf"(?:The answer depends most on sentence|No sentence moves the answer).*by chance {R}\).*\.",
    "receivers": rf"The heads that look at few sentences only are \d\.\d, .*kurtosis of \d\.\d is {N} \(uniform attention: {N}; 30 "
    r"traces\)\.",
    "suppression": rf"\d+ of \d+ pairs of sentences \({N}; 0\.03 by chance\) depend on each other more than on as many random tokens, .*",
    "heads": rf"Head \d\.\d matters most .* change by {N} nats of KL \(mean of 2 traces\); .* random directions changes them by {R}\.",
    "cliff": rf"Without the heads that lower refusal most \(.+\) the model refuses {N} of harmful requests instead of {N}, "
    rf"(?:inside|outside) the range of \d+ sets \(left by chance in 2 of \d+ cases\) of as many other heads \({R}\)\.",
    "mi_compare": rf"The reasoner's mean MI is {N} (?:higher|lower) than its base model's on the same 30 traces, "
    rf"(?:inside|outside) the range of exchanged models \({R}\)\.",
    "trajectory": rf"The hidden state moves (?:less straight|straighter) than a random walk: .* at {N} \(mean of 2 traces\); .* at {N}\.",
    "entropy": rf"The thinking is written at a mean entropy of {N} nats per token and the answer at {N} .*; it forks most at “.+”\.",
    "confidence": rf"Before any thinking a share of {N} of the forced answers is the final one, .* another problem comes up at {N}\.",
    "reflection": rf"After its first answer the thinking goes on for {N} of its length \(mean of 2 traces\).*\.",
    "alternatives": rf"The token that was written is the model's first choice at {N} of places .*; {N} are among the least likely .*",
    "steering_shift": rf"seal × 1 changes the log-probability of the written tokens by {N} nats each .*; 20 random vectors .* by {R}\.",
    "attention_map": rf"Of its attention the mean head spends {N} on the prompt \({N}\), .* spread evenly over all tokens\.",
    "agreement": rf"Sentence \d+ of \S+ matters most by \d+ signals: its mean rank is {N} \(by chance {R}\); .*",
}
# What they quote is text of the traces; MI and entropy quote words of it.
QUOTING = (
    "anchors",
    "receivers",
    "suppression",
    "heads",
    "mi",
    "entropy",
    "reflection",
    "alternatives",
    "steering_shift",
    "agreement",
)


def saved(name):
    """What the example run holds of an analysis, and what is said of it."""
    task = AnalysisTask.of(EXAMPLE, name)
    results = [result for method in QUESTIONS[name].writes for result in load_results(task.where.analyses, method)]
    return task, results, summarise(task, results)


@pytest.mark.parametrize("name", FINDINGS)
def test_the_finding_is_one_sentence_with_its_number_and_control(name):
    _, _, summary = saved(name)
    assert re.fullmatch(FINDINGS[name], summary.finding)
    assert len(re.findall(r"[.;?!] [A-Z]", re.sub(r"“.*?”", "", summary.finding))) == 0  # one sentence


@pytest.mark.parametrize("name", FINDINGS)
def test_the_table_is_small_and_says_where_everything_went(name):
    task, results, summary = saved(name)
    assert 1 <= len(summary.rows) <= 11 and {len(row) for row in summary.rows} == {len(summary.columns)}
    assert "nan" not in str(summary) and "None" not in str(summary) and "e-" not in re.sub(r"\S*/\S*", "", str(summary))
    assert str(task.where.analyses) in summary.files[0] and results[0].method in summary.files[0]
    assert summary.next_command.startswith(f"reasonscope app {EXAMPLE}")


@pytest.mark.parametrize("name", QUOTING)
def test_what_matters_is_quoted_from_the_traces(name):
    _, _, summary = saved(name)
    texts = [" ".join(trace.text.split()) for trace in TraceStore.open(EXAMPLE / "store")]
    assert summary.quotes
    for quote, said in summary.quotes:
        parts = re.findall(r"“(.+?)…?”", quote) or [re.sub("[»«]", "", quote).strip("…")]
        assert all(any(" ".join(part.split()) in text for text in texts) for part in parts), quote
        assert said


def test_one_trace_is_named_in_the_address_and_not_in_the_table():
    id = TraceStore.open(EXAMPLE / "store").ids[0]
    trace = TraceStore.open(EXAMPLE / "store").trace(id)
    result = Result(
        method="trajectory",
        quantity="change",
        unit="1",
        axes=(Axis.of("signal", ["net", "cumulative", "aligned"]), Axis.of("site", ["resid_post.0"])),
        values=np.array([[1.0], [2.0], [0.5]]),
        null=Band.of([[0.0], [0.0], [0.1]], [[9.0], [9.0], [0.4]], (3, 1), "a walk"),
        numbers={
            "mean_net": {"value": 1.0},
            "mean_cumulative": {"value": 2.0, "ci": [1.0, 3.0]},
            "mean_aligned": {"value": 0.5},
            "segments": 4,
            "aligned_of_random_walk": 0.25,
        },
        provenance={"trace": trace.id, "block": 20},
    )
    summary = summarise(AnalysisTask.of(EXAMPLE, "trajectory", traces=[id]), [result])
    assert summary.columns[0] == "segments" and summary.rows == [["4", "1", "2 [1, 3]", "0.50", "0.10 to 0.40"]]
    assert (
        "moves straighter than a random walk" in summary.finding and "1 of 1 traces are straighter" in summary.notes[0]
    )
    assert summary.next_command.endswith(f"/trace?trace={id.replace('/', '%2F')}")


def test_mi_names_the_null_that_it_was_compared_with():
    task, results, _ = saved("mi")
    at = next(i for i, one in enumerate(results) if one.measured and one.axes[0].name == "site")
    few = replace(results[at], null=replace(results[at].null, what="permuted coordinates (a weaker null), 39 draws"))
    for result, named in ((results[at], "other answers"), (few, "permuted coordinates")):
        found = summarise(task, [result])
        assert f"depends more on the trace's own answer than on {named} (" in found.finding
        assert f"above {named}" in found.columns
        assert found.quotes and all(f"({named} " in said for _, said in found.quotes)


@pytest.mark.parametrize(("n", "said"), [(3, "2 of 4"), (39, "2 of 40"), (79, "4 of 80"), (199, "10 of 200")])
def test_a_range_of_random_sets_says_how_often_chance_leaves_it(n, said):
    assert f"{n} sets (left by chance in {said} cases)" in _sets(n)
    draws = np.arange(n, dtype=np.float64)[:, None]
    band = null_band(draws, "sets")
    kept = int(((draws >= band.low) & (draws <= band.high)).sum())
    assert said == f"{n + 1 - (kept - 1)} of {n + 1}"  # a new draw is as likely in each of the n + 1 gaps


def test_an_estimate_of_heads_says_whether_the_text_gains_or_loses_and_what_was_measured():
    ids = TraceStore.open(EXAMPLE / "store").ids
    _, (table, *_), _ = saved("heads")
    trace = table.provenance["trace"]
    assert trace in ids
    values = np.zeros((6, 4))
    values[2, 1] = -0.5
    estimated = Result(
        method="head_attribution",
        quantity="log-probability lost without the head, to first order",
        unit="nats per token",
        axes=(Axis.of("layer", 6), Axis.of("head", 4)),
        values=values,
        null=Band.of(-0.1, 0.1, values.shape, "central 95 % of random directions"),
        interval=Band.of(values - 0.2, values + 0.1, values.shape, "bootstrap over sentences"),
        numbers={"tokens": 9, "checked": [{"head": "2.1", "estimate": -0.5, "exact": -0.4}]},
        provenance={"trace": trace},
    )
    summary = summarise(AnalysisTask.of(EXAMPLE, "heads", traces=[trace]), [table, estimated])
    assert summary.finding.startswith(
        "Head 2.1 works against what is written most: without it a written token gains 0.5 [0.4, 0.7] nats of log-probability"
    )
    assert "random directions as long change it by −0.1 to 0.1" in summary.finding
    assert "2.1 −0.5 and −0.4" in summary.notes[0]


def nothing(name, trace, reason):
    return undefined(method=name, quantity=name, unit="1", reason=reason, provenance={"trace": trace})


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_could_not_be_measured_says_why_in_one_line(name):
    ids = TraceStore.open(EXAMPLE / "store").ids[:2]
    method = next(iter(QUESTIONS[name].writes))
    task = AnalysisTask.of(EXAMPLE, name, traces=ids)
    summary = summarise(task, [nothing(method, id, "the trace has no thinking") for id in ids])
    assert summary.finding == "There is nothing to say: the trace has no thinking." and summary.notes == []
    summary = summarise(task, [nothing(method, id, f"it has {n} tokens") for n, id in enumerate(ids)])
    assert summary.finding.endswith("none of 2 results could be measured.") and summary.rows == ()
    assert summary.notes == [f"Undefined ({method}) for 2 traces: {ids[0]}: it has 0 tokens."]
    summary = summarise(task, [nothing(method, ids[0], "it is short"), nothing(method, ids[1], "it is long")])
    assert summary.notes[1] == f"Undefined ({method}) for {ids[1]}: it is long."


def test_a_trace_without_a_result_is_named_beside_those_with_one():
    task, results, _ = saved("reflection")
    summary = summarise(task, [*results, nothing("reflection", "other", "no sentence states an answer")])
    assert "Undefined (reflection) for other: no sentence states an answer." in summary.notes


def test_json_has_the_values_by_label_and_no_mean_of_different_quantities():
    _, results, _ = saved("cliff")
    writes, ablated = (numbers_of(result) for result in results)
    assert ablated["values"]["ablated"]["accuracy"].keys() == {"value", "interval", "null"}
    assert "mean" not in ablated and ablated["heads"] and ablated["state"] == "measured"
    assert len(writes["values"]) == len(results[0].axes[0])
    _, (words, *_), _ = saved("mi")
    assert numbers_of(words)["null"]
    many = Result(
        method="m",
        quantity="q",
        unit="1",
        axes=(Axis.of("token", 5000),),
        values=np.zeros(5000),
        null_missing="none",
    )
    assert numbers_of(many)["values"] == {"shape": {"token": 5000}}


def test_a_column_that_holds_nothing_is_left_out():
    table = Summary(finding="It is.", columns=("trace", "effect", "chance"), rows=[("a", "1", "–"), ("a", "–", "–")])
    assert without_columns(table, set()).columns == ["trace", "effect"]
    assert without_columns(table, {"trace"}).rows == [["1"], ["–"]]


def test_numbers_are_worded_alike():
    assert short(0.00012) == "< 0.001" and short(-0.00012) == "> −0.001" and short(0.0) == "0" and short(-1.5) == "−1.5"
    assert span(-0.5, 0.25) == "−0.5 to 0.25" and span(1.0, 1.0) == "1" and span(float("nan"), 1.0) == "–"
    assert (
        np.isnan(over_traces([0.5], ["a"]).low) and over_traces([-1.0, 2.0, 2.0], "abc", shares=False, least=0).low == 0
    )


def test_a_token_is_shown_in_its_context():
    trace = TraceStore.open(EXAMPLE / "store").trace(TraceStore.open(EXAMPLE / "store").ids[0])
    shown = in_context(trace, trace.n_prompt_tokens + 10)
    before, token, after = re.fullmatch("…(.*)»(.+)«(.*)…", shown).groups()
    assert token == trace.text[slice(*trace.offsets[trace.n_prompt_tokens + 10])].strip()
    assert before + token + after in trace.text.replace("\n", " ")


def test_what_users_read_speaks_of_the_end_of_the_thinking_which_every_run_has():
    """Reasoning in the open has no closing tag, so pages, summaries, questions and reports of runs do not speak of one."""
    places = [*(ROOT / "app" / "pages").glob("*.py"), *(ROOT / "app" / "page_parts").glob("*.py")]
    places += [*(ROOT / "analysis").rglob("summaries.py"), *(ROOT / "analysis" / "runs").glob("*.py")]
    places += [*(ROOT / "probes" / "properties").glob("*.py")]
    said = [
        f"{place.name}:{node.lineno}"
        for place in places
        for node in ast.walk(ast.parse(place.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "closing tag" in node.value
        if "\n" not in node.value and not node.value[0].isupper()  # not a docstring
    ]
    assert said == []
