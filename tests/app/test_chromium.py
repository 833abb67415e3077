"""The app in a real browser: read, search, fold, colour, copy a link, steer; no console error, and no request to anybody else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from reasonscope.app.bundled import EXAMPLE
from reasonscope.app.readings import rows
from reasonscope.app.runs import open_run
from reasonscope.app.serving import serving
from reasonscope.data.importers import import_jsonl
from reasonscope.data.store import TraceStore

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install 'reasonscope[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
WAIT = 60_000  # ms; two busy cores can be slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a long trace of 10,000 tokens and more, and one of hostile text."""
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
    return root


@pytest.fixture(scope="module")
def address(runs) -> Iterator[str]:
    with serving(runs) as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
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


def right_trace() -> str:
    return next(row.id for row in rows(open_run(EXAMPLE)) if row.outcome == "right" and row.thinking_tokens > 150)


def read(page, query: str):
    page.goto(f"/trace?{query}")
    page.wait_for_selector(".card[data-index]")
    return page


@pytest.mark.parametrize(
    "address_of",
    ["", "trace", "mi-peaks", "anchors", "heads", "probes", "refusal", "steering", "compare"],
)
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_and_says_no_error(page, address_of, width):
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(f"/{address_of}")
    page.wait_for_selector("h2")
    page.wait_for_timeout(1500)
    assert page.locator('[data-testid="stException"]').count() == 0
    main = page.locator('[data-testid="stMain"]')
    assert main.evaluate("e => e.scrollWidth <= e.clientWidth + 1")


def test_keys_move_fold_and_search(page):
    read(page, f"trace={right_trace()}")
    page.locator(".text").hover()
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.wait_for_selector('.card[aria-current][data-index="1"]')
    page.keyboard.press("k")
    page.wait_for_selector('.card[aria-current][data-index="0"]')
    page.wait_for_url("**sentence=0**")
    page.keyboard.press("/")
    page.keyboard.type("so")
    page.wait_for_selector(".card.found")
    page.keyboard.press("Enter")
    assert "so" in page.locator(".card.found").first.inner_text().lower()
    page.wait_for_url("**q=so**")


def test_a_copied_link_finds_the_same_state(page):
    read(page, f"trace={right_trace()}&colour=entropy")
    page.locator('.card[data-index="3"]').click()
    page.wait_for_url("**sentence=3**")
    page.get_by_role("button", name="Copy link").click()
    page.get_by_role("button", name="Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert "sentence=3" in link and "colour=entropy" in link
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector('.card[aria-current][data-index="3"]')
    assert "entropy" in page.locator(".legend").inner_text()


def test_the_strip_leads_to_a_sentence_and_values_show_on_hover(page):
    read(page, f"trace={right_trace()}&colour=entropy")
    strip = page.locator("canvas")
    box = strip.bounding_box()
    strip.click(position={"x": box["width"] * 0.6, "y": box["height"] / 2})
    page.wait_for_selector(".card[aria-current]")
    page.locator(".card[aria-current] .t").first.hover()
    assert "nats" in page.locator(".tip").inner_text()


def test_hostile_text_does_nothing(page):
    read(page, "run=imported&trace=hostile")
    page.wait_for_timeout(500)
    assert page.title() != "hacked"
    assert HOSTILE in page.locator(".text").inner_text()


def test_a_long_trace_stays_responsive(page):
    read(page, "run=imported&trace=long")
    cards = page.locator(".card[data-index]").count()
    assert cards > 1000
    moved = page.evaluate(
        """() => { const began = performance.now();
        document.dispatchEvent(new KeyboardEvent('keydown', { key: 'j' })); return performance.now() - began; }"""
    )
    assert moved < 500


def test_a_figure_exports_its_data(page):
    page.goto("/")
    page.get_by_role("button", name="Export").first.click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Data (CSV)").click()
    lines = Path(waiting.value.path()).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("curve,x,y") and len(lines) > 20


def test_the_organism_is_steered_side_by_side(page):
    page.goto("/steering?longest=60")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("Same seed;").wait_for()
    assert page.get_by_text("Steered ·").count() + page.get_by_text("Steered").count() > 0
    assert "nats a token" in page.get_by_text("Same seed;").inner_text()


def test_an_upload_becomes_a_run(page, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        json.dumps({"id": "u", "prompt": "a?", "completion": "<think>\nOne. Two.\n</think>\n\n2"}) + "\n",
        encoding="utf-8",
    )
    page.goto("/")
    page.get_by_text("Open a file of completions").click()
    page.locator('input[type="file"]').set_input_files(str(file))
    page.get_by_role("heading", name="Run uploaded").wait_for()
