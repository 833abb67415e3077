"""The app in a real browser: read, click, follow, compare, export, steer; no console error, and no request to anybody else."""

import json
import os
from pathlib import Path

import pytest

from reasonscope.analysis.runs.opened_run import open_run
from reasonscope.app.demo.bundled import EXAMPLE
from reasonscope.app.demo.real_example import EXAMPLES
from reasonscope.app.page_parts.measurements import results
from reasonscope.app.page_parts.readings import trace_rows
from reasonscope.app.server.serving import serving

pytestmark = pytest.mark.slow

WAIT = 60_000  # ms
HOSTILE = "<img src=x onerror"
# Of a point of a Plotly figure, where it stands on the page: curve and number, or the values of an axis.
_PLACE = """([key, curve, point]) => {
  const figure = document.querySelector(`.st-key-${key} .js-plotly-plot`);
  const drawn = figure._fullData[curve], { xaxis, yaxis } = figure._fullLayout, box = figure.getBoundingClientRect();
  const at = (axis, value) => axis._offset + axis.d2p(value);
  return [box.left + at(xaxis, drawn.x[point]), box.top + at(yaxis, drawn.y[point])];
}"""
_CURVE = """([key, name]) => document.querySelector(`.st-key-${key} .js-plotly-plot`)?._fullData?.findIndex((c) => c.name === name)"""

# Of each example that ships, the pages that it has something for.
SIGHTS = {
    "organism": {
        "": "",
        "trace": "trace={trace}&colour=MI · resid_post.5&sentence=6",
        "mi-peaks": "trace={trace}",
        "anchors": "trace={trace}&sentence=6&truth=true",
        "heads": "head=4.2&heads=2.3&block=6.4",
        "probes": "",
        "refusal": "contrast=intent",
        "steering": "",
        "compare": "trace={trace}",
    },
    "GSM8K": {
        "": "run=GSM8K",
        "trace": "run=GSM8K&trace={trace}&colour=MI · resid_post.22&sentence=4",
        "mi-peaks": "run=GSM8K&trace={trace}",
        "anchors": "run=GSM8K&trace={trace}",
        "heads": "run=GSM8K&head=18.3&heads=18.3",
        "probes": "run=GSM8K",
        "steering": "run=GSM8K",
        "compare": "run=GSM8K&with=GSM8K, steered",
    },
}


def analysed(example: Path = EXAMPLE) -> str:
    """A trace of the example that was analysed sentence by sentence."""
    return next(iter(results(open_run(example), "anchors")))


def open_page(page, view: str, query: str = ""):
    page.goto(f"/{view}?{query}")
    page.wait_for_selector("h2")
    return page


def read(page, query: str):
    page.goto(f"/trace?{query}")
    page.wait_for_selector(".card[data-index]")
    return page


def settle(page) -> None:
    """Wait until the page is whole: the server has said all, and nothing of it is still a grey place."""
    page.wait_for_timeout(1500)
    page.wait_for_function(
        "() => !document.querySelector('[data-testid=stSkeleton], [data-testid=stStatusWidget]')", timeout=WAIT
    )
    page.wait_for_timeout(1500)


def click_point(page, key: str, curve: int, point: int) -> None:
    """Click a mark of the figure with this key."""
    page.wait_for_selector(f".st-key-{key} .js-plotly-plot .main-svg")
    settle(page)
    page.locator(f".st-key-{key}").scroll_into_view_if_needed()
    x, y = page.evaluate(_PLACE, [key, curve, point])
    page.mouse.move(x, y)
    page.wait_for_timeout(300)
    page.mouse.click(x, y)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("example", "view"), [(name, view) for name, views in SIGHTS.items() for view in views])
def test_every_page_fits_and_says_no_error(page, example, view, width):
    """Screenshots are of the real example, and of the organism for the pages that the other has nothing for."""
    page.set_viewport_size({"width": width, "height": 1000 if width > 1000 else 844})
    open_page(page, view, SIGHTS[example][view].format(trace=analysed(EXAMPLES.get(example, EXAMPLE))))
    settle(page)
    assert page.locator('[data-testid="stException"], [data-testid="stAlertContentError"]').count() == 0
    main = page.locator('[data-testid="stMain"]')
    assert main.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    folder = os.environ.get("REASONSCOPE_SCREENSHOTS")
    if folder and (example == "GSM8K" or view not in SIGHTS["GSM8K"]):
        page.screenshot(path=Path(folder) / f"app-{view or 'overview'}-{width}.png")


def test_keys_move_fold_and_search(page):
    read(page, f"trace={analysed()}")
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
    read(page, f"trace={analysed()}&colour=entropy")
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
    read(page, f"trace={analysed()}&colour=entropy")
    strip = page.locator("canvas")
    box = strip.bounding_box()
    strip.click(position={"x": box["width"] * 0.6, "y": box["height"] / 2})
    page.wait_for_selector(".card[aria-current]")
    page.locator(".card[aria-current] .t").first.hover()
    assert "nats" in page.locator(".tip").inner_text()


def test_a_token_that_is_clicked_keeps_its_alternatives_in_sight(page):
    read(page, f"trace={analysed()}")
    token = page.locator('.card[data-index="2"] .t').nth(3)
    token.click()
    page.wait_for_selector(".t.pinned")
    page.mouse.move(5, 5)
    said = page.locator(".tip").inner_text()
    assert "likeliest here" in said and said.count("%") == 6
    page.keyboard.press("Escape")
    assert page.locator(".tip").is_hidden()


def test_a_click_on_a_peak_lands_on_its_sentence(page):
    id = analysed()
    open_page(page, "mi-peaks", f"trace={id}")
    page.wait_for_selector(".st-key-mi-curve .js-plotly-plot .main-svg")
    measured = results(open_run(EXAMPLE), "mi")[id]
    place = int(measured.values[-1].argmax())
    click_point(page, "mi-curve", page.evaluate(_CURVE, ["mi-curve", "measured"]), place)
    page.wait_for_url("**/trace?**sentence=**")
    card = page.locator(".card[aria-current]")
    card.wait_for()
    first = int(card.locator(".t").first.get_attribute("data-t"))
    tokens = card.locator(".t").count()
    assert first <= int(measured.axes[-1].labels[place]) < first + tokens
    assert "MI" in page.locator(".legend").inner_text()


def test_a_node_and_its_links_choose_sentences_and_the_metric_can_be_switched(page):
    id = analysed()
    open_page(page, "anchors", f"trace={id}")
    page.wait_for_selector(".st-key-anchors-graph .js-plotly-plot .main-svg")
    curve = page.evaluate(
        "() => document.querySelector('.st-key-anchors-graph .js-plotly-plot')._fullData.findIndex((c) => c.customdata)"
    )
    click_point(page, "anchors-graph", curve, 0)
    page.get_by_role("heading", name="Sentence").wait_for()
    page.wait_for_url("**sentence=**")
    chosen = page.get_by_role("heading", name="Sentence").inner_text()
    page.get_by_role("button", name="Next").click()
    page.wait_for_function(
        "(old) => [...document.querySelectorAll('h3')].every((h) => h.innerText !== old)", arg=chosen
    )
    settle(page)  # what the server still has to say would close the list
    page.get_by_role("combobox", name="Metric").click()
    page.keyboard.type("suppression")  # of a long list only the part in sight is there
    page.get_by_role("option", name="suppression").click()
    page.wait_for_url("**metric=suppression**")
    settle(page)
    link = page.locator('[class*="st-key-link-"] button').first
    link.wait_for()
    number = link.inner_text().split()[0]
    link.click()
    page.get_by_role("heading", name=f"Sentence {number}", exact=True).wait_for()
    page.reload()
    page.get_by_role("heading", name=f"Sentence {number}", exact=True).wait_for()
    page.get_by_role("button", name="Read it in the trace").click()
    page.wait_for_selector(f'.card[aria-current][data-index="{number}"]')


def test_a_head_opens_its_sentences_and_a_cell_its_tokens(page):
    open_page(page, "heads")
    click_point(page, "heads-grid", 1, 5)
    page.get_by_role("heading", name="Layer 1, head 1").wait_for()
    page.wait_for_url("**head=1.1**")
    click_point(page, "head-1-1", 1, 2)
    page.get_by_role("heading", name="attends to sentence").wait_for()
    page.wait_for_selector(".st-key-head-tokens-1-1 .js-plotly-plot .main-svg")
    page.wait_for_url("**block=**")


def test_hostile_text_does_nothing(page):
    read(page, "run=imported&trace=hostile")
    page.wait_for_timeout(500)
    assert page.title() != "hacked"
    assert HOSTILE in page.locator(".text").inner_text()


def test_a_published_run_is_read_and_its_labelled_dependencies_shown(page):
    read(page, "run=published")
    assert "published sentence labels" in page.locator('[data-testid="stMain"]').inner_text()
    open_page(page, "anchors", "run=published&sentence=1&truth=true")
    page.get_by_text("What rollouts wrote instead").wait_for()
    page.get_by_text("Labelled dependencies").wait_for()


def test_a_long_trace_stays_responsive(page):
    read(page, "run=imported&trace=long")
    cards = page.locator(".card[data-index]").count()
    assert cards > 1000
    moved = page.evaluate(
        """() => { const began = performance.now();
        document.dispatchEvent(new KeyboardEvent('keydown', { key: 'j' })); return performance.now() - began; }"""
    )
    assert moved < 500


def test_a_figure_exports_its_data_its_page_and_its_image(page):
    open_page(page, "mi-peaks")
    figure = page.locator(".st-key-mi-curve .js-plotly-plot")
    figure.wait_for()
    page.get_by_role("button", name="Export").first.click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Data (CSV)").click()
    lines = Path(waiting.value.path()).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("curve,x,y") and len(lines) > 20
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Page (HTML)").click()
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert "Plotly" in text and "<script src" not in text and len(text) > 10**6
    page.get_by_text("SVG", exact=True).click()
    page.keyboard.press("Escape")
    for name, begins in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        if name == "PNG":
            page.get_by_role("button", name="Export").first.click()
            page.get_by_text("PNG", exact=True).click()
            page.keyboard.press("Escape")
        page.wait_for_timeout(1500)  # the figure is drawn anew with the other camera
        figure.hover()
        with page.expect_download() as waiting:
            page.locator('.st-key-mi-curve [data-title^="Download plot"]').click()
        assert Path(waiting.value.path()).read_bytes()[:200].lstrip().startswith(begins)


def test_the_organism_is_steered_side_by_side(page):
    open_page(page, "steering", "longest=60")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("Same seed;").wait_for()
    assert page.get_by_text("Steered").count() > 0
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


def test_a_link_with_the_token_opens_the_app_from_another_site_too(chromium, runs):
    with serving(runs, token="right") as address:
        context = chromium.new_context()
        page = context.new_page()
        refused: list[str] = []
        page.on("response", lambda answer: refused.append(answer.url) if answer.status == 403 else None)
        page.set_content(f"<a href='{address}/trace?token=right&trace=long&run=imported'>open</a>")
        page.get_by_role("link").click()
        page.get_by_role("heading", name="Trace").wait_for(timeout=60_000)
        page.wait_for_selector(".card[data-index]", timeout=60_000)
        page.reload()
        page.wait_for_selector(".card[data-index]", timeout=60_000)
        assert page.url == f"{address}/trace?run=imported"  # whose first trace is the long one
        context.clear_cookies()
        page.goto(f"{address}/")
        assert "link with the token" in page.inner_text("body")
        assert refused == [f"{address}/"]
        context.close()


def test_the_table_of_traces_leads_to_one(page):
    wanted = trace_rows(open_run(EXAMPLE))[5].id  # the first is what the page shows anyway
    open_page(page, "", f"search={wanted}")
    page.get_by_text("1 of ").wait_for()
    grid = page.locator('[data-testid="stDataFrame"]').first
    grid.wait_for()
    grid.click(position={"x": 18, "y": 52})
    page.wait_for_selector(".card[data-index]")
    assert wanted.split("/")[0] in page.url
