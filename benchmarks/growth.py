"""How cost grows: processor seconds of capturing after every block while one size grows, with the fitted exponent.

A random Qwen3 of 4 layers × 256 reads one sequence of 256 tokens; tokens, layers and width are doubled one at a time. The organism records
traces to disk, 48 tokens each. The exponent is the slope of a straight line through the logarithms of the three largest sizes, since fixed
costs per pass bend the curve at its small end. The dotted line is an exponent of 1.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch

from reasonscope.analysis.figures.theme import GREY, SYMBOLS, Figure, colours_of, styled
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import Model, load_model

sys.path.insert(0, str(Path(__file__).parent))
from rollouts import random_model

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TOKENS, LAYERS, WIDTH = 256, 4, 256


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Seconds at each size of one quantity."""

    quantity: str
    seconds: Mapping[int, float]

    @property
    def exponent(self) -> float:
        sizes, seconds = np.log(list(self.seconds)[-3:]), np.log(list(self.seconds.values())[-3:])
        return float(np.polyfit(sizes, seconds, 1)[0])


def fastest(run: Callable[[], object], times: int, *, warm: bool = True) -> float:
    """Processor seconds of the fastest of so many runs, after one that is not timed unless `warm` is False."""
    if warm:
        run()
    seconds = []
    for _ in range(times):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return min(seconds)


def captured(model: Model, tokens: int, times: int) -> float:
    ids = np.random.default_rng(0).integers(5, 700, size=tokens).tolist()
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    return fastest(lambda: run_with_cache(model, ids, sites), times)


def recorded(organism: Model, n: int) -> float:
    problems = load_problems("ledger", n=n)
    sampling = Sampling(temperature=0.7, max_new_tokens=48)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        record(organism, problems, Path(folder) / "run", sites=["resid_post.3"], sampling=sampling)
        return time.process_time() - started


def measure(doublings: int, times: int) -> list[Growth]:
    organism = load_model("organism")
    recorded(organism, 4)
    steps = [2**i for i in range(doublings)]
    plain = random_model(LAYERS, WIDTH)
    return [
        Growth(quantity="tokens", seconds={TOKENS * s: captured(plain, TOKENS * s, times) for s in steps}),
        Growth(
            quantity="layers",
            seconds={LAYERS * s: captured(random_model(LAYERS * s, WIDTH), TOKENS, times) for s in steps},
        ),
        Growth(
            quantity="width",
            seconds={WIDTH * s: captured(random_model(LAYERS, WIDTH * s), TOKENS, times) for s in steps},
        ),
        Growth(quantity="traces", seconds={16 * s: recorded(organism, 16 * s) for s in steps}),
    ]


def drawn(found: list[Growth]) -> Figure:
    """The lines over sizes relative to the smallest, on logarithmic axes."""
    figure = go.Figure()
    steps = np.array([1.0, max(max(growth.seconds) / min(growth.seconds) for growth in found)])
    figure.add_scatter(x=steps, y=steps, name="exponent 1", mode="lines", line={"dash": "dot", "color": GREY})
    for growth, colour, symbol in zip(found, colours_of(len(found)), SYMBOLS, strict=False):
        sizes, seconds = np.array(list(growth.seconds)), np.array(list(growth.seconds.values()))
        figure.add_scatter(
            x=sizes / sizes[0],
            y=seconds / seconds[0],
            name=f"{growth.quantity}: {growth.exponent:.2f}",
            mode="lines+markers",
            line={"color": colour},
            marker={"symbol": symbol, "size": 9},
        )
    styled(figure, "How cost grows, with the fitted exponents", "size, smallest = 1", "processor seconds, smallest = 1")
    powers = [2**i for i in range(int(np.log2(steps[-1])) + 1)]
    figure.update_xaxes(type="log", tickvals=powers)
    return figure.update_yaxes(type="log", tickvals=[4**i for i in range(-1, 6)])


def save_image(figure: Figure, path: Path) -> None:
    """As the figures of the pages are drawn; without chromium the image stays as it was."""
    if shutil.which("chromium") is None:
        sys.stderr.write(f"no chromium, so that {path.name} is not drawn\n")
        return
    sys.path.append(str(IMAGES))
    from draw import blank_page, save

    with blank_page() as page:
        save(page, figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="three sizes each, once")
    parser.add_argument("--doublings", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(3, 1) if given.small else measure(given.doublings, 3)
    if not given.small:
        save_image(drawn(found), IMAGES / "growth.png")
    lines = [
        "## How cost grows",
        "",
        __doc__.split("\n\n", 1)[1].strip(),
        "",
        f"![Processor seconds over {', '.join(growth.quantity for growth in found)}](images/growth.png)",
        "",
        "| | processor seconds | exponent |",
        "|---|---|---|",
    ]
    for growth in found:
        seconds = ", ".join(f"{size:,}: {spent:.3f}" for size, spent in growth.seconds.items())
        lines.append(f"| {growth.quantity} | {seconds} | {growth.exponent:.2f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
