"""Writes the tables of docs/scale.md: sizes that follow from architectures, and measurements on this machine.

    python docs/sizing.py            (minutes; needs 2 GiB of disk)

Sizes are exact. Rates of the large models are bounds: decoding cannot be faster than reading the weights and the cache once per step, a
replay not faster than its multiplications. How much of such a bound is reached is measured only on a random 0.1 B model.
"""

import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model

PAGE = Path(__file__).with_name("scale.md")
TOKENS, TRACES = 8_000, 1_000
BANDWIDTH, FLOPS = 3.35e12, 0.99e15  # bytes/s and bfloat16 operations/s of an H100 SXM, from its data sheet


@dataclass(frozen=True, kw_only=True)
class Size:
    """An architecture: a token uses `active` parameters; the cache has `cached` numbers per token and layer; a weight has `width` bytes."""

    name: str
    layers: int
    d_model: int
    parameters: float
    active: float
    cached: int
    width: int = 2
    accelerators: int = 1

    @property
    def site(self) -> int:
        """Bytes per token at one site of the residual stream, bfloat16."""
        return 2 * self.d_model

    @property
    def cache(self) -> int:
        """Bytes of keys and values per token."""
        return 2 * self.cached * self.layers

    @property
    def weights(self) -> float:
        return self.parameters * self.width

    def decoding(self, batch: int) -> float:
        """Tokens per second, at most: each step reads the weights that it needs and, on average, half of the finished cache."""
        read = min(self.weights, self.active * self.width * batch) + batch * self.cache * TOKENS / 2
        return batch * self.accelerators * BANDWIDTH / read

    def replay(self) -> float:
        """Tokens per second, at most."""
        return self.accelerators * FLOPS / (2 * self.active)


SIZES = (
    Size(name="1.5 B (Qwen2.5 shape)", layers=28, d_model=1_536, parameters=1.54e9, active=1.54e9, cached=2 * 2 * 128),
    Size(name="7 B (Qwen2.5 shape)", layers=28, d_model=3_584, parameters=7.6e9, active=7.6e9, cached=2 * 4 * 128),
    Size(name="32 B (Qwen2.5 shape)", layers=64, d_model=5_120, parameters=32.8e9, active=32.8e9, cached=2 * 8 * 128, accelerators=2),
    Size(
        name="671 B, 37 B active (DeepSeek-V3 shape, 8-bit)", layers=61, d_model=7_168, parameters=671e9, active=37e9,
        cached=576, width=1, accelerators=16,
    ),
)  # fmt: skip


def sizes() -> str:
    rows = [
        f"| {s.name} | {s.weights / 1e9:,.0f} GB | {s.cache / 1024:,.0f} KiB | {s.site / 1024:.1f} KiB "
        f"| {s.site * s.layers / 1024:,.0f} KiB | {s.site * TOKENS * TRACES / 1e9:,.0f} GB "
        f"| {s.site * s.layers * TOKENS * TRACES / 1e12:.2f} TB |"
        for s in SIZES
    ]
    return "\n".join(
        [
            "| model | weights | keys and values per token | per token, one site | per token, `resid_post.*` "
            f"| {TRACES:,} traces of {TOKENS:,} tokens, one site | the same, `resid_post.*` |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def rates(share_decoding: float) -> str:
    rows = []
    for s in SIZES:
        batch = 32
        decoding, replay = s.decoding(batch), s.replay()
        hour = 3_600 / (TOKENS / decoding + TOKENS / replay)
        rows.append(
            f"| {s.name} | {s.accelerators} | {decoding:,.0f} | {replay:,.0f} | {hour:,.0f} | "
            f"{s.site * s.layers * TOKENS * hour / 3_600 / 1e6:,.0f} MB/s |"
        )
    return "\n".join(
        [
            "| model | accelerators | decoding, tokens/s at most | replay, tokens/s at most | traces/hour at most "
            "| to disk, `resid_post.*` |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "COMPUTED, not measured: batches of 32, H100 SXM according to its data sheet "
            f"({BANDWIDTH / 1e12} TB/s, {FLOPS / 1e12:.0f} TFLOP/s). "
            f"On one core of this machine the decoding of a random 0.1 B model reached {share_decoding:.0%} of the bound that its memory "
            "bandwidth sets.",
        ]
    )


def measured() -> tuple[str, float]:
    """Constants of this machine as a table; the share of the bound that decoding reaches."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        model, problems = load_model("organism"), load_problems("ledger", n=32)
        how = {"sampling": Sampling(temperature=0.7, max_new_tokens=400)}
        started = time.process_time()
        record(model, problems, folder / "text", **how)
        generating = time.process_time() - started
        started = time.process_time()
        store = record(model, problems, folder / "sites", sites=[f"resid_post.{i}" for i in range(6)], **how)
        both = time.process_time() - started
        tokens = sum(len(trace.token_ids) for trace in store)
        payload = sum(len(trace.token_ids) - 1 for trace in store) * 6 * 128 * 4
        on_disk = sum(path.stat().st_size for path in (folder / "sites").rglob("*") if path.is_file())
        of_text = sum(path.stat().st_size for path in (folder / "text").rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    bandwidth, decoding = memory_bandwidth(), small_decoding()
    rows = (
        ("generating, organism, batches of 16, one core", f"{tokens / generating:,.0f} tokens/s"),
        ("generating and capturing `resid_post.*`", f"{tokens / both:,.0f} tokens/s"),
        ("bytes on disk over bytes of activations", f"{on_disk / payload:.4f}"),
        ("a token of text only (ids, offsets, log-probabilities, entropies, text)", f"{of_text / tokens:.0f} bytes"),
        ("bandwidth of the memory, one core", f"{bandwidth / 1e9:.1f} GB/s"),
        ("decoding, random 0.1 B, float32, one sequence, one core", f"{decoding[0]:.1f} tokens/s"),
    )
    table = ["| measured | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(table), decoding[0] * decoding[1] / bandwidth


def memory_bandwidth() -> float:
    """Bytes a second of a sum over 1 GiB: what reading weights once comes to."""
    array = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        array.sum()
        seconds.append(time.process_time() - started)
    return array.nbytes / min(seconds)


def small_decoding() -> tuple[float, float]:
    """Tokens a second of a random model, and the bytes of its weights that each needs."""
    config = Qwen3Config(
        vocab_size=32_000, hidden_size=768, intermediate_size=3_072, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        head_dim=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    hf = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(32_000, size=(1, 16)))
    best = float("inf")
    with torch.no_grad():
        for _ in range(3):
            started = time.process_time()
            hf.generate(ids, max_new_tokens=32, do_sample=False)
            best = min(best, time.process_time() - started)
    read = sum(p.nbytes for name, p in hf.named_parameters() if "embed" not in name)
    return 32 / best, float(read)


def main() -> None:
    constants, share = measured()
    page = PAGE.read_text(encoding="utf-8")
    for name, text in (("sizes", sizes()), ("rates", rates(share)), ("measured", constants)):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        page = re.sub(f"{begin}.*?{end}", lambda _, b=begin, t=text, e=end: f"{b}\n{t}\n{e}", page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
