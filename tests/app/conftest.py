"""The app as it is served, and a page of it in Chromium whose console stays clean and which asks nobody but the app."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from reasonscope.analysis.anchors.published import published_importances
from reasonscope.analysis.results import result_path
from reasonscope.app.server.serving import serving
from reasonscope.data.exchange.importers import import_jsonl, import_thought_anchors
from reasonscope.data.storage.store import TraceStore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
WAIT = 60_000  # ms; two busy cores can be slow


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A published problem with importances, effects, labelled dependencies and what was resampled, imported and read."""
    folder = tmp_path_factory.mktemp("published")
    texts = ["I have to add $3 + 4$.", "So it is 7.", "Wait, is it 7?", "So the answer is \\boxed{7}."]
    chunks = [
        {
            "chunk": text, "chunk_idx": i, "function_tags": ["active_computation"], "depends_on": [str(i - 1)] if i else [],
            "accuracy": 0.5 + i / 10, "resampling_importance_accuracy": 0.1, "resampling_importance_kl": 0.1 * i,
            "counterfactual_importance_kl": 0.2 * i,
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    steps = [
        {"source_chunk_idx": 0, "target_impacts": [{"target_chunk_idx": 2, "importance_score": 0.4}]},
        {"source_chunk_idx": 1, "target_impacts": [{"target_chunk_idx": 3, "importance_score": -0.2}]},
    ]
    thinking = "\n".join(texts)
    files = {
        "base_solution.json": {"prompt": "3 + 4?\n<think>\n", "solution": f"{thinking}\n</think>\n\n7", "is_correct": True},
        "problem.json": {"problem": "3 + 4?", "gt_answer": "7"},
        "chunks_labeled.json": chunks,
        "step_importance.json": steps,
        "chunks_resampled.json": {"1": ["So it is 8.", "So it is 8.", "So it is 7."]},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    run = folder / "run"
    traces = import_thought_anchors(folder)
    with TraceStore.create(run / "store", sites=[]) as store:
        store.append(traces, {})
    for trace in traces:
        published_importances(trace).save(result_path(run / "results", "anchors", trace.id))
    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory, published) -> Path:
    """A folder with a long trace of 10,000 tokens and more, one of hostile text, and a published one."""
    root = tmp_path_factory.mktemp("runs")
    thinking = "\n\n".join(
        f"First I add {i} and {i + 1}. So it is {2 * i + 1}. Wait, let me check {i}." for i in range(500)
    )
    lines = [
        {"id": "long", "prompt": "Add.", "completion": f"<think>\n{thinking}\n</think>\n\nDone."},
        {"id": "hostile", "prompt": HOSTILE, "completion": f"<think>\n{HOSTILE} So.\n</think>\n\n{HOSTILE}"},
    ]
    (root / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with TraceStore.create(root / "imported", sites=[]) as store:
        store.append(import_jsonl(root / "lines.jsonl"), {})
    shutil.copytree(published, root / "published")
    return root


@pytest.fixture(scope="session")
def address(runs) -> Iterator[str]:
    with serving(runs) as found:
        yield found


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install 'reasonscope[test]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    """A page whose console stays clean and which asks nobody but the app."""
    context = chromium.new_context(
        viewport={"width": 1280, "height": 900}, base_url=address, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(WAIT)
    wrong: list[str] = []
    # Of a file that is not there the console says too little; the answer says which. Streamlit looks for its own below a deep address.
    missing = "Failed to load resource"
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and missing not in m.text else None)
    page.on("response", lambda r: wrong.append(r.url) if r.status >= 400 and "/_stcore/" not in r.url else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    own = (address, address.replace("http", "ws"), "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    yield page
    context.close()
    assert wrong == []
