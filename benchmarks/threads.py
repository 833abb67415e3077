"""What a second thread is worth: forward passes and probe fits with one thread and with all, idle and beside one busy process.

Passes of the organism, of random models between it and a real one, and of a 0.5 B model if its folder is given: steps of decoding
(one token per row after a cache of `PAST`) and passes of 256 tokens without a cache. Fits: the sweep that the length and correctness
probes make, one fit of it, and a baseline's. The two thread counts take turns of about `TURN` seconds.

Idle milliseconds are the fastest tenth of the turns, which other work on the machine disturbs least. Beside busy processes they are
medians. In brackets: milliseconds of the processor, all threads together.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from reasonscope.probes.fitting.baseline_fits import baseline_predictions
from reasonscope.probes.fitting.linear_probes import LogisticProbe, RidgeProbe
from reasonscope.probes.fitting.sweep import sweep
from reasonscope.probes.models.model import load_model

TURN = 0.03  # seconds
PAST = 200
BUSY = [sys.executable, "-c", "while True: pass"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to time. `work`: multiplications in its largest matrix product, as the rule counts them."""

    name: str
    work: float
    run: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Milliseconds of one run, by the clock and of the processor."""

    clock: float
    processor: float


def one_turn(run: Callable[[], object], times: int) -> Turn:
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(times):
        run()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return Turn(clock=1e3 * clock / times, processor=1e3 * processor / times)


def with_threads(count: int, run: Callable[[], object], times: int) -> Turn:
    os.environ["OMP_NUM_THREADS"] = str(count)  # else our own functions would choose
    torch.set_num_threads(count)
    with threadpool_limits(count, user_api="blas"):
        return one_turn(run, times)


def alternating(case: Case, counts: tuple[int, int], turns: int, patience: float) -> dict[int, list[Turn]]:
    """`turns` for each of `counts`, or as many as `patience` seconds allow, but three at least."""
    kept: dict[int, list[Turn]] = {count: [] for count in counts}
    fastest = min(with_threads(counts[0], case.run, 1).clock for _ in range(3))
    times = max(1, int(1e3 * TURN / fastest))
    until = time.monotonic() + patience
    while len(kept[counts[0]]) < 3 or (len(kept[counts[0]]) < turns and time.monotonic() < until):
        for count in counts:
            with_threads(count, case.run, 1)  # threads that slept are awake now
            kept[count].append(with_threads(count, case.run, times))
        counts = counts[::-1]
    return kept


def random_model(d_model: int) -> PreTrainedModel:
    heads = d_model // 64
    config = Qwen3Config(
        hidden_size=d_model,
        intermediate_size=3 * d_model,
        num_hidden_layers=6,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        vocab_size=1000,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def pass_cases(name: str, hf: PreTrainedModel, shapes: list[tuple[int, int]]) -> Iterator[Case]:
    """Passes of (batch, token) each: of one token after a cache, of more without any."""
    d_model = int(hf.config.hidden_size)
    for batch, tokens in shapes:
        past = PAST if tokens == 1 else 0
        ids = torch.randint(3, 700, (batch, tokens))
        cache = DynamicCache(config=hf.config) if past else None
        if past:
            hf(input_ids=torch.randint(3, 700, (batch, past)), past_key_values=cache, use_cache=True, logits_to_keep=1)

        def run(ids: torch.Tensor = ids, cache: DynamicCache | None = cache) -> None:
            hf(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
            if cache is not None:
                cache.crop(-1)

        label = f"one token for each of {batch}" if past else f"{batch} × {tokens} tokens"
        yield Case(name=f"{name}: {label}", work=batch * tokens * d_model**2, run=run)


def fit_cases(rows: int, d_model: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, 6, 1, d_model)).astype(np.float32)
    direction = rng.normal(size=d_model)
    target = features[:, 2, 0] @ direction / d_model**0.5 + rng.normal(size=rows)
    groups = [str(row) for row in range(rows)]
    labels = (target > 0).astype(np.float64)
    work = min(rows, d_model) ** 2 * max(rows, d_model)
    name = f"{rows} rows × {d_model}"
    states = features[:, 2, 0]
    yield Case(name=f"ridge, {name}", work=work, run=lambda: RidgeProbe(10.0, standardise=True).fit(states, target))
    yield Case(
        name=f"logistic, {name}", work=work, run=lambda: LogisticProbe(0.1, standardise=True).fit(states, labels)
    )
    yield Case(
        name=f"baseline, {name}",
        work=work,
        run=lambda: baseline_predictions(states, labels, groups, task="binary"),
    )
    yield Case(
        name=f"ridge sweep of 6 layers, {name}",
        work=work,
        run=lambda: sweep(features, target, groups, task="regression"),
    )
    yield Case(
        name=f"logistic sweep of 6 layers, {name}",
        work=work,
        run=lambda: sweep(features, labels, groups, task="binary"),
    )


def cases(what: str, folder: str) -> Iterator[Case]:
    if what == "organism":
        shapes = [(1, 1), (16, 1), (64, 1), (256, 1), (1, 256), (16, 256)]
        yield from pass_cases("organism", load_model("organism").hf, shapes)
    elif what == "folder":
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        yield from pass_cases(Path(folder).name, hf, [(1, 1), (16, 1), (1, 256)])
    elif what.startswith("fits"):
        yield from fit_cases(*(int(part) for part in what.removeprefix("fits").split("x")))
    else:
        yield from pass_cases(f"d_model {what}", random_model(int(what)), [(1, 1), (16, 1), (64, 1), (1, 256)])


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen(BUSY)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def line(case: Case, kept: dict[int, list[Turn]], level: float) -> str:
    clocks = [np.quantile([turn.clock for turn in turns], level) for turns in kept.values()]
    processor = [np.quantile([turn.processor for turn in turns], level) for turns in kept.values()]
    few, many = (f"{clock:.2f} ({used:.2f})" for clock, used in zip(clocks, processor, strict=True))
    return f"| {case.name} | {case.work / 1e6:,.2f} | {few} | {many} | {clocks[1] / clocks[0]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="organism,256,384,512,768,fits64x128,fits240x128,fits240x896")
    parser.add_argument("--folder", default="", help="a 0.5 B model; then `folder` is among the cases, too")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--patience", type=float, default=10, help="seconds for one case")
    parser.add_argument("--beside", type=int, default=0, help="busy processes to run meanwhile")
    given = parser.parse_args()
    counts = (1, torch.get_num_threads())
    names = given.cases.split(",") + (["folder"] if given.folder and "folder" not in given.cases else [])
    sys.stdout.write(
        f"| | million products | 1 thread, ms | {counts[1]} threads, ms | ratio |\n|---|---|---|---|---|\n"
    )
    with busy_processes(given.beside), torch.no_grad():
        for what in names:
            for case in cases(what, given.folder):
                kept = alternating(case, counts, given.turns, given.patience)
                sys.stdout.write(line(case, kept, 0.5 if given.beside else 0.1) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
