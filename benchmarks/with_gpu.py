"""The rows that need an accelerator: a random model of the shape of Qwen2.5-7B in bfloat16. Without one they stay open.

W1 reads the residual stream after every block in one pass of 2,048 tokens; W4 adds a vector after the middle block while 128 tokens are
generated; both are ratios to transformers alone, in wall-clock time, turn by turn. W8 takes the means of attention between sentences of 25
tokens at 32,768 tokens: no allocation may reach the size of a token × token matrix of one head in bfloat16.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from reasonscope.analysis.attention.sentence_attention import sentence_attention
from reasonscope.data.trace import Sampling, Span
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import run_with_cache
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import Model, load_model
from reasonscope.steering.vectors.intervention import Steering
from reasonscope.steering.vectors.scope import Scope
from reasonscope.steering.vectors.vector import SteeringVector

sys.path.insert(0, str(Path(__file__).parent))
from goals import quartiles, verdict

ROWS = (
    ("W1 all resid_post of a prefill, 7 B, bfloat16", 1.03, "transformers alone"),
    ("W4 steer one layer, 7 B, bfloat16", 1.01, "transformers alone"),
    ("W8 sentence attention at 32,768 tokens, largest allocation", 0.99, "token × token of one head"),
)


def random_qwen(layers: int, width: int, device: str) -> Model:
    """The shape of Qwen2.5-7B at 28 layers × 3,584; no stop token, so that every side writes as many tokens."""
    config = Qwen2Config(
        vocab_size=152_064, hidden_size=width, intermediate_size=width * 18_944 // 3_584, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=max(1, width // 896), max_position_embeddings=32_768,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return load_model(hf, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"))


def ratios(ours: Callable[[], Any], theirs: Callable[[], Any], device: str, turns: int) -> list[float]:
    """Of the clock, one a turn, after two turns that warm up."""
    found = []
    for turn in range(turns + 2):
        seconds = {}
        for side in (ours, theirs) if turn % 2 else (theirs, ours):
            synchronise(device)
            started = time.perf_counter()
            side()
            synchronise(device)
            seconds[side] = time.perf_counter() - started
        found.append(seconds[ours] / seconds[theirs])
    return found[2:]


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def prefill(model: Model, tokens: int, turns: int, device: str) -> list[float]:
    """W1."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(1_000, size=(1, tokens))).to(device)
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]

    def alone() -> None:
        with torch.no_grad():
            model.hf(ids, use_cache=False)

    return ratios(lambda: run_with_cache(model, ids, sites), alone, device, turns)


def steered(model: Model, new: int, turns: int, device: str) -> list[float]:
    """W4."""
    ids = np.random.default_rng(0).integers(1_000, size=32).tolist()
    direction = np.random.default_rng(1).standard_normal(model.d_model).astype(np.float32)
    vector = SteeringVector(
        directions={Site("resid_post", model.n_layers // 2): direction}, method="bench", provenance={}
    )
    fed = torch.tensor([ids], device=device)

    def ours() -> None:
        steering = Steering(vector, 1.0, Scope())
        how = {"write": steering.edits, "on_step": steering.on_step}
        generate(model, [ids], Sampling(temperature=0, max_new_tokens=new), seeds=[0], **how)  # type: ignore[arg-type]

    def alone() -> None:
        with torch.no_grad():
            model.hf.generate(fed, attention_mask=torch.ones_like(fed), max_new_tokens=new, do_sample=False)

    return ratios(ours, alone, device, turns)


def attention(model: Model, tokens: int) -> list[float]:
    """W8; the largest block that the allocator of torch was asked for, in matrices of one head."""
    ids = np.random.default_rng(0).integers(1_000, size=tokens).tolist()
    spans = [Span(start, start + 25) for start in range(0, tokens - 25, 25)]
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    sentence_attention(model, ids, spans)
    history = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(enabled=None)
    largest = max(entry["size"] for trace in history for entry in trace if entry["action"] == "alloc")
    return [largest / (2 * tokens**2)]


def measured(device: str, layers: int, width: int, tokens: int, new: int, turns: int) -> list[list[float]]:
    """The values of each row; none of W8 on the CPU, which keeps no such record."""
    model = random_qwen(layers, width, device)
    found = [prefill(model, tokens, turns, device), steered(model, new, turns, device)]
    return [*found, attention(model, 16 * tokens) if device != "cpu" else []]


def line(row: str, goal: float, unit: str, values: Sequence[float]) -> str:
    said = f"{quartiles(values)} | {verdict(values, at_most=goal)}" if values else "not measured | open"
    return f"| {row} | ≤ {goal} × {unit} | {said} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu tries the code, with few layers")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=3_584)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--turns", type=int, default=9)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        found, on = [[] for _ in ROWS], "none here"
    else:
        found = measured(given.device, given.layers, given.width, given.tokens, given.new, given.turns)
        on = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    lines = ["## On an accelerator", "", __doc__.split("\n\n", 1)[1].strip(), "", f"Accelerator: {on}.", ""]
    lines += ["| | goal | measured | |", "|---|---|---|---|"]
    lines += [line(*row, values) for row, values in zip(ROWS, found, strict=True)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
