"""Draw the figures of the pages from the example run that ships (`make figures`); chromium turns them into PNG files.

Given folders, it draws the figures that are in them instead: those that the scripts docs/experiments/organism_*.py wrote.

tests/app/pages/test_chromium.py makes the screenshots of the app, benchmarks/growth.py makes growth.png, and demo.png is a screenshot of
the figures in the demo's report.
"""

import base64
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from shrink import shrunk

from reasonscope.analysis import figures
from reasonscope.analysis.figures import AnchorGraph, Figure, read_figure, to_html
from reasonscope.analysis.results import Result, load_results
from reasonscope.analysis.runs.registry import ANALYSES
from reasonscope.analysis.runs.runner import AnalysisTask
from reasonscope.app.demo.bundled import EXAMPLE
from reasonscope.app.page_parts.reader import KINDS
from reasonscope.data import TraceStore

HERE = Path(__file__).parent
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
KEPT = ("length_scores", "intent_trajectories", "intent_cliffs", "correctness_scores")
TO_PNG = (
    "([width, height]) => Plotly.toImage(document.querySelector('.js-plotly-plot'), {format: 'png', width, height})"
)


def drawn() -> Iterator[tuple[str, Figure]]:
    """Every figure with the name of its file."""
    for name in KEPT:
        yield name, read_figure(EXAMPLE / "figures" / f"{name}.json")
    anchors = result("anchors")
    yield "anchor-graph", anchor_graph(anchors)
    trace = anchors.provenance["trace"]
    for name, method in {"mi-trace": "mi", "entropy": "entropy"}.items():
        yield name, figures.along(result(method, trace))
    yield "suppression", figures.value_maps(result("suppression", trace))
    for name, method in {"receiver-heads": "receivers", "probe-write": "probe_write"}.items():
        yield name, figures.value_maps(result(method, None))
    yield "heads", figures.value_maps(result("heads", trace))
    ids = [trace, *TraceStore.open(EXAMPLE / "store").ids[:3]]
    for name in ("confidence", "misalignment"):
        study = AnalysisTask.of(EXAMPLE, name, traces=ids).study()
        yield name, figures.along(next(iter(ANALYSES[name](study))))


def drawn_from(folders: Iterable[Path]) -> Iterator[tuple[str, Figure]]:
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        yield path.stem, read_figure(path)


def result(method: str, trace: object = ...) -> Result:
    """Of a trace, of all of them (None), or the first that there is."""
    kept = load_results(EXAMPLE / "results", method)
    return next(found for found in kept if trace is ... or found.provenance.get("trace") == trace)


def anchor_graph(found: Result) -> Figure:
    metrics = [label.replace("_", " ") for label in found.axes[0].labels]
    metric = "counterfactual kl"
    graph = AnchorGraph(
        importance=found.values[metrics.index(metric)],
        effects=found.arrays["effects"],
        tags=found.numbers["tags"],
        texts=found.numbers["texts"],
    )
    return figures.anchor_graph(graph, KINDS, title=f"{metric}, {len(graph.tags)} sentences", measure=metric)


def save(page: Page, figure: Figure, path: Path) -> None:
    if figure.layout.title.text:  # broken for a phone
        figure.update_layout(title_text=figure.layout.title.text.replace("<br>", " "))
    page.set_content(to_html(figure, with_library=True))
    page.wait_for_selector(".js-plotly-plot .main-svg")
    height = int(figure.layout.height or 450)
    png = page.evaluate(TO_PNG, [860, height])
    path.write_bytes(shrunk(base64.b64decode(png.partition(",")[2])))


@contextmanager
def blank_page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 1400})
        page.set_default_timeout(
            200_000
        )  # Plotly's library is read again with each figure, which takes long on a busy machine
        yield page
        browser.close()


def main() -> None:
    with blank_page() as page:
        for name, figure in drawn_from(map(Path, sys.argv[1:])) if sys.argv[1:] else drawn():
            path = HERE / f"{name.replace('_', '-')}.png"
            save(page, figure, path)
            sys.stdout.write(f"{path.name}: {path.stat().st_size // 1000} kB\n")


if __name__ == "__main__":
    main()
