"""How the analyses grow: seconds and peak memory of MI, heads, suppression and a sweep of probes while one size grows.

The model has the blocks of Qwen2.5 0.5 B (896 wide, heads of 64 that share two keys, MLPs of 4,864) with random weights, four of them, and
a vocabulary of 8,192; its trace has 128 tokens in sentences of 25. Widths other than 896 keep the proportions. MI takes normal activations
(128 tokens, four sites) and 20 other answers; the sweep takes normal activations of 200 traces (four layers, one position, nested folds,
nine ridge penalties), for which longer traces change nothing. Heads are the estimate for every head and the exact ablation of three.
Tokens, layers, width and traces are doubled one at a time. Seconds are processor seconds, the least of a few runs if they are short; memory
is the peak above what the process held before. An exponent is the slope of a straight line through the logarithms of the three largest
sizes; fixed costs bend a curve at its small end.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from transformers import AutoModelForCausalLM, Qwen2Config

from reasonscope.analysis.causal.attribution_patching import head_attribution
from reasonscope.analysis.causal.suppression import suppression_effect
from reasonscope.analysis.figures.theme import SYMBOLS, Figure, colours_of, styled
from reasonscope.analysis.tokens.nocco import mutual_information
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem, Span, Trace
from reasonscope.probes.fitting.sweep import sweep
from reasonscope.probes.models.model import Model, load_model

sys.path.insert(0, str(Path(__file__).parent))
from growth import IMAGES, fastest, save_image
from tools.serve import forget_peak, peak

TOKENS, LAYERS, WIDTH, TRACES, ROWS, OTHERS, SENTENCE = 128, 4, 896, 1, 200, 20, 25
QUANTITIES = ("tokens", "layers", "width", "traces")


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of everything; `traces` counts rows in a sweep of probes."""

    tokens: int = TOKENS
    layers: int = LAYERS
    width: int = WIDTH
    traces: int = TRACES


@dataclass(frozen=True, kw_only=True)
class Line:
    """Seconds and bytes of one analysis at each size of one quantity."""

    analysis: str
    quantity: str
    seconds: Mapping[int, float]
    extra: Mapping[int, int]

    def exponent(self, values: Mapping[int, float]) -> float:
        """Of the three largest sizes."""
        sizes, measured = list(values)[-3:], [max(value, 1e-9) for value in list(values.values())[-3:]]
        return float(np.polyfit(np.log(sizes), np.log(measured), 1)[0])


def model_of(size: Size) -> Model:
    """Random blocks in the proportions of Qwen2.5 0.5 B, with the organism's tokenizer."""
    config = Qwen2Config(
        vocab_size=8_192, hidden_size=size.width, intermediate_size=size.width * 4_864 // 896, num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64, num_key_value_heads=2, max_position_embeddings=8_192,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return load_model(AutoModelForCausalLM.from_config(config), tokenizer=load_model("organism").tokenizer)


def ids_of(tokens: int) -> list[int]:
    return np.random.default_rng(0).integers(5, 700, size=tokens).tolist()


def trace_of(model: Model, tokens: int) -> Trace:
    """Random tokens, an eighth of them prompt."""
    return build_trace(
        id="any",
        problem=Problem(id="any", prompt="?"),
        token_ids=ids_of(tokens),
        n_prompt_tokens=tokens // 8,
        tokenizer=model.tokenizer_backend,
    )


def mi(size: Size) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((size.tokens, size.width)), rng.standard_normal((1 + OTHERS, size.width))
    return lambda: [mutual_information(x, y) for _ in range(size.layers * size.traces)]


def heads(size: Size) -> Callable[[], object]:
    model = model_of(size)
    trace = trace_of(model, size.tokens)
    return lambda: [head_attribution(model, trace) for _ in range(size.traces)]


def suppression(size: Size) -> Callable[[], object]:
    model, ids = model_of(size), ids_of(size.tokens)
    starts = range(size.tokens // 8, size.tokens - SENTENCE + 1, SENTENCE)
    spans = [Span(start, start + SENTENCE) for start in starts]
    return lambda: [suppression_effect(model, ids, spans) for _ in range(size.traces)]


def probes(size: Size) -> Callable[[], object]:
    rng, rows = np.random.default_rng(0), ROWS * size.traces
    features = rng.standard_normal((rows, size.layers, 1, size.width)).astype(np.float32)
    targets, groups = features[:, 0, 0, 0] + rng.standard_normal(rows), [str(i) for i in range(rows)]
    return lambda: sweep(features, targets, groups, task="regression")


ANALYSES: Mapping[str, Callable[[Size], Callable[[], object]]] = {
    "MI": mi, "heads": heads, "suppression": suppression, "probes": probes,
}  # fmt: skip


def one(analysis: str, size: Size, most: float) -> tuple[float, int]:
    """Seconds and bytes of one analysis at one size."""
    run = ANALYSES[analysis](size)
    forget_peak()
    before = peak()
    first = fastest(run, 1, warm=False)
    extra = peak() - before
    return first if first > most else min(first, fastest(run, 2, warm=False)), extra


def measured(before: Line, sizes: Sequence[int], most: float) -> Iterator[Line]:
    """A line with each further size of its quantity. A run of more than `most` seconds is not repeated; after four times as many the next
    size is left out."""
    seconds, extra = dict(before.seconds), dict(before.extra)
    base = getattr(Size(), before.quantity)
    unit = ROWS if (before.analysis, before.quantity) == ("probes", "traces") else 1
    for times in sizes[len(seconds) :]:
        if seconds and list(seconds.values())[-1] > 4 * most:
            break
        with get_context("fork").Pool(1) as pool:  # a process of its own, with memory that nothing else has used before
            spent, held = pool.apply(one, (before.analysis, Size(**{before.quantity: base * times}), most))
        name = base * times * unit
        seconds[name], extra[name] = spent, held
        sys.stderr.write(f"{before.analysis}, {name} {before.quantity}: {spent:.2f} s, {held / 2**20:.0f} MiB\n")
        yield replace(before, seconds=dict(seconds), extra=dict(extra))


def drawn(lines: Sequence[Line]) -> Figure:
    """Seconds above and memory below, by analysis, over sizes relative to the smallest; both axes logarithmic."""
    names = list(dict.fromkeys(line.analysis for line in lines))
    figure = make_subplots(
        rows=2,
        cols=len(names),
        shared_xaxes=True,
        shared_yaxes="rows",
        column_titles=names,
        vertical_spacing=0.08,
        horizontal_spacing=0.02,
    )
    looks = dict(zip(QUANTITIES, zip(colours_of(len(QUANTITIES)), SYMBOLS, strict=False), strict=True))
    shown: set[str] = set()
    for line in lines:
        colour, symbol = looks[line.quantity]
        for row, values in ((1, line.seconds), (2, {size: held / 2**20 for size, held in line.extra.items()})):
            figure.add_trace(
                go.Scatter(
                    x=np.array(list(values)) / next(iter(values)),
                    y=[max(value, 0.5) if row == 2 else value for value in values.values()],
                    name=line.quantity,
                    legendgroup=line.quantity,
                    showlegend=line.quantity not in shown,
                    mode="lines+markers",
                    line={"color": colour},
                    marker={"symbol": symbol, "size": 8},
                ),
                row=row,
                col=1 + names.index(line.analysis),
            )
            shown.add(line.quantity)
    styled(figure, "How the analyses grow as one size is doubled", "", "")
    figure.update_xaxes(type="log", tickvals=[1, 2, 4, 8, 16], ticktext=["1", "2", "4", "8", "16"])
    figure.update_xaxes(title_text="size, smallest = 1", row=2)
    figure.update_yaxes(type="log", dtick=1)
    figure.update_yaxes(title_text="processor seconds", row=1, col=1)
    figure.update_yaxes(title_text="extra MiB at the peak", row=2, col=1)
    return figure.update_layout(height=560, width=980)


def table(lines: Sequence[Line]) -> list[str]:
    rows = [
        "| | grows | processor seconds | exponent | extra MiB at the peak | exponent |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        seconds = ", ".join(f"{size:,}: {spent:.2f}" for size, spent in line.seconds.items())
        extra = ", ".join(f"{held / 2**20:,.0f}" for held in line.extra.values())
        memory = {size: float(held) for size, held in line.extra.items()}
        told = f"{line.exponent(memory):.2f}" if min(memory.values()) > 2**23 else "–"
        rows.append(
            f"| {line.analysis} | {line.quantity} | {seconds} | {line.exponent(line.seconds):.2f} | {extra} | {told} |"
        )
    return rows


# A probe reads one token of a trace, so longer traces change nothing.
WANTED = [
    (analysis, quantity)
    for analysis in ANALYSES
    for quantity in QUANTITIES
    if (analysis, quantity) != ("probes", "tokens")
]


def saved(path: Path | None) -> list[Line]:
    """The lines of an earlier, interrupted run."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    return [
        Line(**one | {name: {int(size): value for size, value in one[name].items()} for name in ("seconds", "extra")})
        for one in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two sizes each, once")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(ANALYSES),
        default=list(ANALYSES),
        help="the figure is drawn once all are there",
    )
    parser.add_argument(
        "--kept", type=Path, help="a JSON file to which lines are added; those in it are not measured again"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes, most = ([1, 2], 0.0) if given.small else ([1, 2, 4, 8], 2.0)
    lines = {(line.analysis, line.quantity): line for line in saved(given.kept)}
    for analysis, quantity in WANTED:
        if analysis in given.only:
            begun = lines.get((analysis, quantity), Line(analysis=analysis, quantity=quantity, seconds={}, extra={}))
            for line in measured(begun, sizes, most):
                lines[analysis, quantity] = line
                if given.kept:
                    given.kept.write_text(json.dumps([asdict(line) for line in lines.values()]))
    found = [lines[one] for one in WANTED if one in lines]
    if not given.small and len(found) == len(WANTED):
        save_image(drawn(found), IMAGES / "analyses-growth.png")
    text = ["## How the analyses grow", "", __doc__.split("\n\n", 1)[1].strip(), ""]
    text += [
        "![Processor seconds and peak memory of MI, heads, suppression and probes](images/analyses-growth.png)",
        "",
    ]
    sys.stdout.write("\n".join([*text, *table(found)]) + "\n")


if __name__ == "__main__":
    main()
