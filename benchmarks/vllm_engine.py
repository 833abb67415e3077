"""What capture and steering cost inside vLLM: throughput as a share of plain vLLM's, beside `hooks`.

python benchmarks/vllm_engine.py MODEL --vllm ENV/bin/vllm

It serves MODEL twice, as it ships and with vllm-lens, asks for the same greedy completions in every way, in turns, and counts tokens per
second of the clock and per second of the processor time of all processes of the server, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from reasonscope.data.trace import Message, Problem, Sampling
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.branches import Branch, PrefixWriter
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import Prompting, load_prompting
from reasonscope.probes.vllm.writer import VllmWriter, vllm_writer
from reasonscope.steering.engine.in_engine import in_engine
from reasonscope.steering.recipes.recipe import Recipe, RecipePart
from reasonscope.steering.vectors.vector import SteeringVector

PORT = 8029
QUESTIONS = [
    "How many are {n} apples and {m} more?",
    "What is {n} times {m}?",
    "Tell a story with {n} dogs and {m} cats.",
]


class Served:
    """A server of vLLM for the time of a `with` block."""

    def __init__(self, vllm: str, model: str, *options: str, **environment: str) -> None:
        self._command = [
            vllm,
            "serve",
            model,
            "--dtype",
            "float32",
            "--host",
            "127.0.0.1",
            "--port",
            str(PORT),
            *options,
        ]
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **environment}

    def __enter__(self) -> "Served":
        with Path(f"vllm-{PORT}.log").open("a") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).read()
                return self
            except OSError:
                if self.process.poll() is not None:
                    sys.exit("vLLM ended; see its log")
                time.sleep(2)

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)
        time.sleep(3)

    @property
    def processor_seconds(self) -> float:
        top = psutil.Process(self.process.pid)
        return sum(sum(one.cpu_times()[:2]) for one in (top, *top.children(recursive=True)))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def recipe(model: Prompting, seed: int) -> Recipe:
    """A vector at a layer of its own; every other one acts on the thinking alone, and so by a hook."""
    width = int(model.config.get_text_config().hidden_size)
    layer = model.n_layers // 3 + seed % (model.n_layers // 3)
    drawn = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    vector = SteeringVector(directions={Site("resid_post", layer): drawn}, method="random", provenance={})
    return Recipe(
        name=f"r{seed}", parts=(RecipePart(vector=vector, scope={"generation_window": (0, None)} if seed % 2 else {}),)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-hooks", action="store_true")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    model = load_prompting(told.model)
    prompts = [
        model.encode_prompt(Problem(id=str(i), messages=(Message(role="user", content=QUESTIONS[i % 3].format(n=i + 3, m=i + 5)),)))
        for i in range(told.requests)
    ]  # fmt: skip
    greedy, url = Sampling(temperature=0, max_new_tokens=told.tokens), f"http://127.0.0.1:{PORT}"
    options = ["--max-model-len", "1024", "--max-num-seqs", "64"]
    plain = vllm_writer(url, model, workers=told.requests)
    seeds, n = [0] * told.requests, model.n_layers
    found: dict[str, list[tuple[float, float]]] = {}

    def measured(name: str, served: Served | None, work: Callable[[], int]) -> None:
        clock, before = time.perf_counter(), served.processor_seconds if served else time.process_time()
        tokens = work()
        spent = (served.processor_seconds if served else time.process_time()) - before
        found.setdefault(name, []).append((tokens / (time.perf_counter() - clock), tokens / spent))
        say(f"{name}: {found[name][-1][0]:.1f} tokens/s, {found[name][-1][1]:.1f} per processor second")

    def streamed(writer: VllmWriter, layers: list[int], part: slice = slice(None)) -> int:
        sites = [Site("resid_post", layer) for layer in layers]
        return sum(
            len(d.token_ids) - d.n_prompt_tokens for _, d, _ in writer.stream(prompts[part], greedy, seeds[part], sites)
        )

    def eight(one: list[VllmWriter]) -> int:
        from concurrent.futures import ThreadPoolExecutor

        parts = [slice(i, None, len(one)) for i in range(len(one))]
        with ThreadPoolExecutor(len(one)) as threads:
            return sum(threads.map(lambda both: streamed(both[0], [], both[1]), zip(one, parts, strict=True)))

    steered = [
        vllm_writer(url, model, workers=told.requests, steering=in_engine(recipe(model, i), model)) for i in range(8)
    ]
    with Served(told.vllm, told.model, *options, VLLM_LENS_DISABLE="1") as served:
        streamed(plain, [])
        for _ in range(told.rounds):
            measured("plain, as it ships", served, lambda: streamed(plain, []))
    with Served(told.vllm, told.model, *options, "--enforce-eager") as served:
        streamed(plain, [])
        for _ in range(told.rounds):
            measured("plain, eager, no hooks", served, lambda: streamed(plain, []))
        streamed(plain, [0])  # from here on vllm-lens has its hooks on the layers
        eight(steered)
        for _ in range(told.rounds):
            measured("plain, hooks idle", served, lambda: streamed(plain, []))
            measured("capture of 1 layer", served, lambda: streamed(plain, [n // 2]))
            measured("capture of 4 layers", served, lambda: streamed(plain, [0, n // 3, 2 * n // 3, n - 1]))
            measured("capture of all layers", served, lambda: streamed(plain, list(range(n))))
            measured("1 recipe, a vector", served, lambda: streamed(steered[0], []))
            measured("1 recipe, a hook", served, lambda: streamed(steered[1], []))
            measured("8 recipes in a batch", served, lambda: eight(steered))
        branches = [Branch(cut=len(long) - 1, seed=i) for long in [prompts[0] * 8] for i in range(64)]
        warm = Sampling(temperature=0.8, max_new_tokens=24)

        def rollouts(writer: Callable[..., list]) -> int:  # type: ignore[type-arg]
            return sum(len(d.token_ids) - d.n_prompt_tokens for d in writer(prompts[0] * 8, branches, warm))

        many = vllm_writer(url, model, workers=64)
        rollouts(many)  # the prefix is in the cache from here on, as after the first sentence of a trace
        measured("64 rollouts, vLLM", served, lambda: rollouts(many))
    if not told.no_hooks:
        here = load_model(told.model, dtype="float32")
        sites = [Site("resid_post", n // 2)]

        def hooks() -> int:
            done = generate(here, prompts, greedy, seeds=seeds)
            for one in done:
                replay(here, [one.token_ids.tolist()], sites)
            return sum(len(d.token_ids) - d.n_prompt_tokens for d in done)

        measured("hooks, 1 layer", None, hooks)
        measured("64 rollouts, hooks", None, lambda: rollouts(PrefixWriter(here, batch_size=64)))
    table = {name: [median(values) for values in zip(*pairs, strict=True)] for name, pairs in found.items()}
    base, ships = table["plain, eager, no hooks"], table["plain, as it ships"]
    say(
        f"\n| {told.model.rpartition('/')[2]} | tokens/s | per processor second | eager = 1 | as it ships = 1 |\n|---|---|---|---|---|"
    )
    for name, (clock, spent) in table.items():
        say(f"| {name} | {clock:.1f} | {spent:.1f} | {spent / base[1]:.2f} | {spent / ships[1]:.2f} |")
    if told.out:
        told.out.write_text(json.dumps({"median": table, "all": found}, indent=1))


if __name__ == "__main__":
    main()
