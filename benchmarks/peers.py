"""Capturing and steering compared with other tools: processor seconds as ratios to transformers alone, and memory.

Each tool runs in its own process, those with older requirements in their own environment under build/peers (made here, by pip). Before
anything is timed, a tool's tokens and the last row that it captured are compared with hand-written hooks; if transformers alone writes
other tokens than they do, the vector changes what is written. Then the tools take turns, in a rotating order. A ratio is of two runs of one
turn, and the table gives its median and quartiles over the turns. Seconds are processor seconds; memory is the peak of a run above what the
process held before it (the best run). What a tool adds per token is in microseconds (the median over turns); any hook costs as much as
hooks by hand. The first among the tools is the one with the lowest median ratio, apart from transformers alone and hooks by hand.

W1 reads the residual stream after every block in one pass; W2 while generating; W4 adds a vector after the middle block at every token,
W5 only at generated tokens; W6 is W2 on 32 prompts of different lengths.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config

from reasonscope.probes.models.loading import locate

sys.path.insert(0, str(Path(__file__).parent))
from goals import quartiles, verdict

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "peers"
SERVE = Path(__file__).parent / "tools" / "serve.py"
REFERENCE, BARE, OURS = "raw_hooks", "bare", "reasonscope_"
NO_TOOLS = (BARE, "bare_eager", REFERENCE)
# Requirements of the tools that do not go together with ours.
ENVIRONMENTS = {
    "steering-vectors": ("steering-vectors==0.12.2", "torch==2.13.0"),
    # Newer ones ask the wrapped layer for its kind of attention, which repeng's wrapper does not pass on.
    "repeng": ("repeng==0.4.0", "transformers==4.51.3", "torch==2.13.0"),
    "interp-engine": ("interp-engine==1.14.0", "torch==2.13.0"),
}


@dataclass(frozen=True, kw_only=True)
class Tool:
    module: str
    label: str
    environment: str | None = None


TOOLS = (
    Tool(module=BARE, label="transformers alone"),
    Tool(module="bare_eager", label="transformers alone, eager attention"),
    Tool(module=REFERENCE, label="hooks by hand"),
    Tool(module=OURS, label="**reasonscope**"),
    Tool(module="transformer_lens_", label="TransformerLens (eager)"),
    Tool(module="nnsight_", label="nnsight"),
    Tool(module="interp_engine_", label="interp-engine (eager)", environment="interp-engine"),
    Tool(module="steering_vectors_", label="steering-vectors", environment="steering-vectors"),
    Tool(module="repeng_", label="repeng", environment="repeng"),
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`lengths` of the prompts in tokens, `new` tokens to generate after each, the `goal` for the ratio, `times` of a run."""

    name: str
    label: str
    lengths: tuple[int, ...]
    new: int
    goal: float
    times: int = 1

    @property
    def fed(self) -> int:
        """Tokens that the model reads in one run; the last that it writes is not among them."""
        return sum(self.lengths) + len(self.lengths) * max(0, self.new - 1)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Tokens of W1 and how often it is run at a time, tokens that W2, W4 and W5 write, and W6 for each prompt; turns of all of them."""

    prefill: int
    times: int
    new: int
    batch_new: int
    turns: int


def workloads(size: Size) -> tuple[Workload, ...]:
    prefill, new, batch_new = size.prefill, size.new, size.batch_new
    ragged = tuple(int(n) for n in np.random.default_rng(1).integers(8, 64, size=32))
    return (
        Workload(name="W1", label=f"all resid_post of {prefill} tokens", lengths=(prefill,), new=0, goal=1.03, times=size.times),
        Workload(name="W2", label=f"the same while writing {new} tokens", lengths=(32,), new=new, goal=1.03),
        Workload(name="W4", label=f"steer one layer, {new} tokens", lengths=(32,), new=new, goal=1.02),
        Workload(name="W5", label=f"steer generated tokens alone, {new}", lengths=(32,), new=new, goal=1.02),
        Workload(name="W6", label=f"32 ragged prompts, {batch_new} tokens, all resid_post", lengths=ragged, new=batch_new, goal=1.05),
    )  # fmt: skip


class Child:
    """A tool in its process."""

    def __init__(self, tool: Tool, folder: Path, threads: int, strength: float) -> None:
        self.tool, self._strength = tool, strength
        command = [python(tool.environment), str(SERVE), tool.module, str(folder), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "NNSIGHT_DEBUG": "0"}
        if tool.environment:
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.about = self._answer()

    def run(self, workload: Workload, keep: Path | None = None, **more: int) -> dict[str, Any]:
        asked = {"workload": workload.name, "lengths": workload.lengths, "new": workload.new, "times": workload.times}
        asked |= {"keep": keep and str(keep), "strength": self._strength, **more}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.tool.module}: {self._process.communicate()[1][-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def python(environment: str | None) -> str:
    """The interpreter of an environment, which is made if it does not exist."""
    if environment is None:
        return sys.executable
    folder = BUILD / environment
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *ENVIRONMENTS[environment]], check=True)
        (folder / "made").touch()
    return str(folder / "bin" / "python")


def organism_folder() -> Path:
    """The organism, told to know no stop token, so that every tool writes as many tokens."""
    folder = BUILD / "organism"
    hf = AutoModelForCausalLM.from_pretrained(locate("organism"))
    return _without_stop(hf, folder)


def random_folder(layers: int = 12, width: int = 768) -> Path:
    """A random Qwen3 of 0.1 B with the organism's tokenizer, float32."""
    folder = BUILD / f"qwen3-{layers}x{width}"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=width // 64, num_key_value_heads=width // 192, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return _without_stop(AutoModelForCausalLM.from_config(config), folder)


def _without_stop(hf: Any, folder: Path) -> Path:
    hf.config.eos_token_id = None
    hf.generation_config = GenerationConfig(pad_token_id=0)
    hf.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(locate("organism"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def children(folder: Path, threads: int, strength: float, tools: Sequence[Tool] = TOOLS) -> Iterator[list[Child]]:
    with ExitStack() as stack:
        started = []
        for tool in tools:
            child = Child(tool, folder, threads, strength)
            stack.callback(child.close)
            started.append(child)
        yield started


@dataclass(frozen=True, kw_only=True)
class Row:
    """`ratios` to transformers alone, one a turn; `above` it microseconds a token fed; `extra` bytes; `same`: whether tokens and
    activations are those of hooks by hand."""

    tool: Tool
    cpu: float
    ratios: Sequence[float]
    above: float
    extra: int
    same: str


def compare(workload: Workload, tools: Sequence[Child], turns: int) -> tuple[list[Row], dict[str, str]]:
    """The rows of the tools that can do it, and what the others said when they tried."""
    kept = {child.tool.module: BUILD / f"{child.tool.module}.npz" for child in tools}
    able, failed = [], {}
    for child in tools:
        if workload.name in child.about["workloads"]:
            first = child.run(workload, kept[child.tool.module])  # warms it up too
            if "error" in first:
                failed[child.tool.label] = first["error"]
            else:
                able.append(child)
    spent: dict[str, list[dict[str, float]]] = {child.tool.module: [] for child in able}
    for turn in range(turns):
        for child in able[turn % len(able) :] + able[: turn % len(able)]:
            spent[child.tool.module].append(child.run(workload))
    rows = [
        row(
            child.tool,
            workload,
            spent[child.tool.module],
            spent[BARE],
            sameness(kept[child.tool.module], kept[REFERENCE]),
        )
        for child in able
    ]
    return rows, failed


def row(
    tool: Tool,
    workload: Workload,
    spent: Sequence[Mapping[str, float]],
    alone: Sequence[Mapping[str, float]],
    same: str,
) -> Row:
    """From what each turn of a tool and of transformers alone took."""
    cpu, bare = (np.array([one["cpu"] for one in turns]) for turns in (spent, alone))
    return Row(
        tool=tool,
        cpu=float(np.median(cpu)),
        ratios=(cpu / bare).tolist(),
        above=float(np.median(cpu - bare)) / workload.fed * 1e6,
        extra=int(min(one["extra"] for one in spent)),
        same=same,
    )


def sameness(found: Path, reference: Path) -> str:
    with np.load(found) as one, np.load(reference) as other:
        if "tokens" in one and "tokens" in other and not np.array_equal(one["tokens"], other["tokens"]):
            return "other tokens"
        if "last" not in one or "last" not in other:
            return "tokens" if "tokens" in one else "–"
        gap = float(np.abs(one["last"] - other["last"]).max() / np.abs(other["last"]).max())
        return f"{gap:.0e}" if gap else "0"


def table(workload: Workload, model: str, rows: Sequence[Row], failed: Mapping[str, str]) -> str:
    lines = [
        f"### {workload.name} on {model}: {workload.label}",
        "",
        f"| | processor s | ratio, median (quartiles) | goal ≤ {workload.goal} | µs per token above transformers alone | extra memory "
        "| difference from hooks by hand |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = verdict(row.ratios, at_most=workload.goal) if row.tool.module == OURS else ""
        lines.append(
            f"| {row.tool.label} | {row.cpu:.3f} | {quartiles(row.ratios)} | {said} | {row.above:,.0f} "
            f"| {row.extra / 2**20:.0f} MiB | {row.same} |"
        )
    lines += [f"| {label} | failed: {reason} | | | | | |" for label, reason in failed.items()]
    if workload.name in ("W1", "W2"):
        lines.append(first(rows))
    return "\n".join([*lines, ""])


def first(rows: Sequence[Row]) -> str:
    """The tool of the least median ratio, as a row; the goal is that it is ours."""
    tools = [row for row in rows if row.tool.module not in NO_TOOLS]
    best = min(tools, key=lambda row: float(np.median(row.ratios)))
    said = verdict(best.tool.module == OURS, at_least=True)
    return f"| first among the {len(tools)} tools | | {best.tool.label} | {said} | | | |"


def versions(tools: Sequence[Child]) -> str:
    found: dict[str, set[str]] = {}
    for child in tools:
        for name, version in child.about["versions"].items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(each))}" for name, each in sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="three turns, few tokens")
    parser.add_argument("--turns", type=int, help="by default 9 on the organism and 5 on 0.1 B")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="workloads, with commas")
    parser.add_argument("--model", choices=("organism", "random"), help="both by default")
    given = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    for i, (label, folder, strength, size) in enumerate(models(given.small, given.model)):
        name = label.split(" (")[0]
        say(f"## Capture and steering compared with other tools, on {name}\n")
        if not i:
            say(__doc__.split("\n\n", 1)[1].strip() + "\n")
        size = replace(size, turns=given.turns or size.turns)
        with children(folder, given.threads, strength) as tools:
            say(f"{given.threads} thread(s), load {os.getloadavg()[0]:.1f}. {versions(tools)}.\n")
            say(f"{size.turns} turns on {label}:\n")
            for workload in workloads(size):
                if not given.only or workload.name in given.only.split(","):
                    say(table(workload, name, *compare(workload, tools, size.turns)))


def models(small: bool, only: str | None = None) -> Iterator[tuple[str, Path, float, Size]]:
    """A label, the folder, the strength of steering and how much is run."""
    sizes = (
        Size(prefill=512, times=10, new=512, batch_new=64, turns=9),
        Size(prefill=128, times=3, new=32, batch_new=2, turns=5),
    )
    if small:
        sizes = (
            Size(prefill=128, times=10, new=64, batch_new=8, turns=3),
            Size(prefill=128, times=1, new=4, batch_new=2, turns=1),
        )
    if only != "random":
        label = "the organism (6 layers × 128: a pass costs little, so the tool's own work shows)"
        yield label, organism_folder(), 30.0, sizes[0]
    if only != "organism":
        yield "0.1 B (a random Qwen3 of 12 layers × 768: a pass costs much)", random_folder(), 1.0, sizes[1]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
