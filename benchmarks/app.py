"""The browser app on a trace of 10,000 tokens: time until its first sentences are painted, and until an interaction
shows.

Needs Chromium. Every repetition opens a page, in a context without a cache; the first repetition fills the server's
cache and is not counted. "First paint" runs from the request to the frame after the one in which a card of the reader
has text, including Streamlit's start-up; an interaction runs from the event to the frame after the change.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from playwright.sync_api import Page, sync_playwright
from tokenizers import Tokenizer

import reasonscope.data
from reasonscope.app.server.serving import serving
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem

sys.path.insert(0, str(Path(__file__).parent))
from goals import verdict

GOALS = {"first paint": 2000, "interaction": 500}


def long_trace(root: Path, tokens: int) -> str:
    """A run below `root` with one trace of `tokens` tokens and entropies; its id."""
    tokenizer = Tokenizer.from_file(
        str(Path(reasonscope.data.__file__).parent / "organism" / "organism" / "tokenizer.json")
    )
    lines: list[str] = []
    ids: list[int] = []
    while len(ids) < tokens:
        i = len(lines)
        lines.append(f"First I add {i} and {i + 1}. So it is {2 * i + 1}. Wait, let me check {i}.")
        if i % 50 == 49 or len(ids) > tokens - 200:
            ids = tokenizer.encode("Add them. <think>\n" + "\n\n".join(lines) + "\n</think>\n\nDone.").ids
    trace = build_trace(id="long", problem=Problem(id="long", prompt="Add them."), token_ids=ids, n_prompt_tokens=3, tokenizer=tokenizer,
        entropies=np.random.default_rng(0).gamma(0.3, size=len(ids) - 3).astype(np.float32))  # fmt: skip
    with TraceStore.create(root / "long", sites=[]) as store:
        store.append([trace], {})
    return f"{len(ids):,} tokens, {len(lines) * 3:,} sentences"


_READER = "[...document.querySelectorAll('*')].map((e) => e.shadowRoot?.querySelector('.reader')).find(Boolean)"
# Does something, and resolves in the frame after the expected change: what a frame calls runs before it is painted.
_TIMED = """async ([act, found]) => {
  const reader = () => READER;
  const frame = () => new Promise(requestAnimationFrame);
  const began = performance.now();
  eval(act)(reader());
  while (!eval(found)(reader())) await frame();
  await frame();
  return [began, performance.now()];
}""".replace("READER", _READER)
_TEXT = "(r) => [...(r?.querySelectorAll('.card .words') ?? [])].some((w) => w.textContent.trim())"

# What is done to the reader `r`, and how the page shows it; in this order.
_KEY = "() => document.dispatchEvent(new KeyboardEvent('keydown', {key: 'j'}))"
_STRIP = """(r) => {
  const strip = r.querySelector('canvas'), box = strip.getBoundingClientRect();
  strip.dispatchEvent(new MouseEvent('click', {clientX: box.left + 0.7 * box.width, clientY: box.top + 20}));
}"""
_SEARCH = """(r) => {
  const field = r.querySelector('.find');
  field.value = 'check 77';
  field.dispatchEvent(new Event('input'));
}"""
_ENTROPY = (
    "() => [...document.querySelectorAll('[role=option]')].find((o) => o.textContent.includes('entropy')).click()"
)
_INTERACTIONS = {
    "next sentence (j)": (_KEY, "(r) => r.querySelector('[aria-current]')?.dataset.index === '0'"),
    "a sentence far away (strip)": (_STRIP, "(r) => Number(r.querySelector('[aria-current]')?.dataset.index) > 500"),
    "search": (_SEARCH, "(r) => r.querySelector('.count').textContent.includes('found')"),
    "fold all": ("(r) => r.querySelector('.fold-all').click()", "(r) => r.querySelector('.step.shut')"),
}


def first_paint(page: Page, address: str) -> float:
    """Milliseconds from the request until a card has text."""
    page.goto(f"{address}/trace?run=long&trace=long", wait_until="commit")
    return float(page.evaluate(_TIMED, ["() => null", _TEXT])[1])


def interactions(page: Page) -> dict[str, float]:
    """Milliseconds of each interaction with the page that is open."""
    found = {name: _between(page.evaluate(_TIMED, list(done))) for name, done in _INTERACTIONS.items()}
    page.wait_for_timeout(1500)  # the server hears of the chosen sentence, and its answer would close the list
    page.get_by_role("combobox", name="Colour by").click()
    page.get_by_role("option", name="entropy").wait_for()
    shown = "(r) => r.querySelector('.legend').textContent.includes('nats')"
    found["another colour (by the server)"] = _between(page.evaluate(_TIMED, [_ENTROPY, shown]))
    return found


def _between(ends: list[float]) -> float:
    return ends[1] - ends[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="two repetitions")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    repetitions = 2 if arguments.small else 5
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_path is None:
        sys.exit("no Chromium here: apt-get install chromium")
    rows: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        what = long_trace(Path(folder), 10_000)
        with serving(Path(folder), "long") as address:
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
            for repetition in range(repetitions + 1):
                measured: dict[str, float] = {}
                context = browser.new_context(viewport={"width": 1280, "height": 900})
                page = context.new_page()
                measured["first paint"] = first_paint(page, address)
                measured |= interactions(page)
                context.close()
                if repetition:  # the first fills the server's caches
                    for name, value in measured.items():
                        rows.setdefault(name, []).append(value)
            browser.close()
    if arguments.json:
        print(json.dumps(rows))  # noqa: T201
        return
    print(f"## The app on a trace of {what}\n\n| | median, ms | slowest, ms | goal, ms | |\n|---|---|---|---|---|")  # noqa: T201
    for name, values in rows.items():
        goal = GOALS.get(name, GOALS["interaction"])
        times = f"{statistics.median(values):,.0f} | {max(values):,.0f} | ≤ {goal:,}"
        print(f"| {name} | {times} | {verdict(values, at_most=goal)} |")  # noqa: T201


if __name__ == "__main__":
    main()
