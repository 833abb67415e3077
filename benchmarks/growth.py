"""How cost grows: processor seconds of capturing behind every block as one size grows and the others stay, with the fitted exponent.

A random Qwen3 of 4 layers × 256 reads one sequence of 256 tokens; of tokens, layers and width one is doubled at a time. Traces are
recorded by the organism to disk, 48 tokens each. The exponent is the slope of a straight line through the logarithms of the three
largest sizes: what is fixed for each pass bends the curve at its small end. The lines are drawn in build/growth.html.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from rollouts import random_model

from reasonscope.data.problems import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.capture import run_with_cache
from reasonscope.probes.model import Model, load_model
from reasonscope.probes.record import record
from reasonscope.probes.sites import Site

PAGE = Path(__file__).parents[1] / "build" / "growth.html"
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


def fastest(run: Callable[[], object], times: int) -> float:
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
        record(organism, problems, Path(folder) / "run", sites=["resid_post.3"], sampling=sampling, progress=False)
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


def draw(found: list[Growth]) -> str:
    """The lines over sizes relative to the smallest, on logarithmic axes."""
    figure = go.Figure()
    for growth in found:
        sizes, seconds = np.array(list(growth.seconds)), np.array(list(growth.seconds.values()))
        name = f"{growth.quantity}: exponent {growth.exponent:.2f}"
        figure.add_scatter(x=sizes / sizes[0], y=seconds / seconds[0], name=name, mode="lines+markers")
    figure.update_layout(xaxis_title="size, smallest = 1", yaxis_title="processor seconds, smallest = 1")
    figure.update_xaxes(type="log", dtick=np.log10(2))
    figure.update_yaxes(type="log")
    page: str = figure.to_html(include_plotlyjs=True)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="three sizes each, once")
    parser.add_argument("--doublings", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(3, 1) if given.small else measure(given.doublings, 3)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(draw(found), encoding="utf-8")
    lines = [
        "## How cost grows",
        "",
        __doc__.split("\n\n", 1)[1].strip(),
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
