"""A run in which every name and text is markup or script, in a real browser: all of it is shown, and nothing runs or is asked for."""

import json
from urllib.parse import quote

import numpy as np
import pytest

from reasonscope.analysis.results import Axis, Band, Result, result_path
from reasonscope.data.exchange.importers import import_jsonl
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.storage.store import TraceStore

pytestmark = pytest.mark.slow

NAME = "<img src=x onerror=window.hacked=1>"  # as much as the name of a folder may hold
MARKUP = (
    f"{NAME}<script>window.hacked=1</script><svg onload=window.hacked=1></svg>![i](http://evil.example/i.png)"
    "[more](javascript:window.hacked=1)<a href='http://evil.example/'>more</a>"
    "$\\href{javascript:window.hacked=1}{x}$ $\\includegraphics{http://evil.example/f.png}$"
)
VIEWS = ("", "trace", "mi-peaks", "anchors", "heads", "probes", "refusal", "steering", "ablations", "compare")
# What would have come of a text that was taken for markup.
_MADE = """() => [...document.querySelectorAll('*')].flatMap((e) => [e, ...(e.shadowRoot?.querySelectorAll('*') ?? [])])
  .filter((e) => e.hasAttribute('onerror') || e.hasAttribute('onload') || (e.tagName === 'IMG' && !e.src.startsWith('data:'))
    || /evil|javascript:/.test(e.getAttribute('href') ?? e.getAttribute('xlink:href') ?? ''))
  .map((e) => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def hostile(runs):
    """A run below the root of the app whose name, ids, texts, labels, results, numbers, figures and files are hostile; its trace."""
    run = runs / NAME
    id = f"{NAME}/0"  # as much as the name of a file may hold
    line = {
        "id": id, "prompt": MARKUP, "answer": MARKUP,
        "completion": f"<think>\n{MARKUP} So. Wait, {MARKUP}.\n</think>\n\n{MARKUP}",
    }  # fmt: skip
    file = run.parent / "hostile.jsonl"
    file.write_text(json.dumps(line), encoding="utf-8")
    with TraceStore.create(run / "store", meta={"note": MARKUP, "model": {"name": MARKUP}}, sites=[]) as store:
        store.append(import_jsonl(file), {})
    (trace,) = TraceStore.open(run / "store")
    leave_results(run, trace)
    kept = {"command": MARKUP, "seed": MARKUP, "figures": [f"{NAME}_cliffs", "with_image"], "numbers": {MARKUP: MARKUP}}
    curve = {"type": "scatter", "x": [0, 1], "y": [0, 1], "name": MARKUP, "text": [MARKUP] * 2, "mode": "text+lines"}
    figure = {"data": [curve], "layout": {"title": {"text": MARKUP}, "xaxis": {"title": {"text": MARKUP}}}}
    image = {"data": [], "layout": {"images": [{"source": "http://evil.example/x.png", "x": 0, "y": 1}]}}
    for folder in ("numbers", "figures", "steering"):
        (run / folder).mkdir()
    for name in ("length", "refusal", "correctness", "sweep", "steering"):
        (run / "numbers" / f"{name}.json").write_text(json.dumps(kept), encoding="utf-8")
    (run / "figures" / f"{NAME}_cliffs.json").write_text(json.dumps(figure), encoding="utf-8")
    (run / "figures" / "with_image.json").write_text(json.dumps(image), encoding="utf-8")
    (run / "steering" / f"{NAME}.safetensors").write_bytes(b"")
    return trace.id


def leave_results(run, trace) -> None:
    """Results of the app's pages whose labels, texts, units and provenance are hostile; one cannot be read."""
    n, id, cut = 3, trace.id, cut_trace(trace).cut_hash
    values = np.tril(np.ones((n, n)), -1)
    common = {
        "quantity": MARKUP, "unit": MARKUP, "null": Band.of(0.0, 0.5, (n, n), MARKUP),
        "provenance": {"trace": id, "by": MARKUP, "cut": cut},
        "numbers": {"texts": [MARKUP] * n, "tags": [MARKUP] * n, MARKUP: 1.0},
    }  # fmt: skip
    pairs = axes("target", n), axes("source", n)
    found = [Result(method=name, axes=pairs, values=values, **common) for name in ("suppression", "replacement")]
    metrics = Axis(name="metric", labels=(MARKUP, "b", "c")), axes("sentence", n)
    found += [Result(method="anchors", axes=metrics, values=values, arrays={"effects": values}, **common)]
    sites = Axis(name="site", labels=(MARKUP, "b", "c")), axes("token", n)
    found += [Result(method="mi", axes=sites, values=values, **common)]
    found += [
        Result(method=name, axes=(axes("layer", n), axes("head", n)), values=values, **common)
        for name in (NAME, "probe_write")
    ]
    for result in found:
        result.save(result_path(run / "results", result.method, id))
    (run / "results" / "suppression" / f"{quote(NAME, safe=' ')}.safetensors").write_bytes(b"no")


def axes(name: str, n: int) -> Axis:
    return Axis.of(name, n)


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_in_a_hostile_run_runs_or_is_asked_for(page, hostile, view):
    page.on("dialog", lambda dialog: pytest.fail(f"{view}: {dialog.message}"))
    address = f"run={quote(NAME)}&trace={quote(hostile)}&sentence=1&head=0.0&measured=suppression&colour={quote(MARKUP)}&metric=replacement"
    page.goto(f"/{view}?{address}")
    page.wait_for_selector("h2")
    settle(page)
    for figure in page.locator(".js-plotly-plot").all()[:2]:
        figure.hover()
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate(_MADE) == []
    if view not in ("mi-peaks", "steering"):
        assert "onerror" in page.locator('[data-testid="stMain"]').inner_text() or view == "heads"


def settle(page) -> None:
    page.wait_for_timeout(1500)
    page.wait_for_function("() => !document.querySelector('[data-testid=stSkeleton], [data-testid=stStatusWidget]')")
    page.wait_for_timeout(1500)
