"""Heads and suppression on a real model: seconds and peak memory for one trace of a model that is on this machine.

The estimate takes every head at once from one backward pass, and checks the exact ablation of three heads; the exact form needs a pass for
each head. Suppression runs what follows each sentence, several sentences to a pass. The trace repeats a text to the asked length, in
sentences of about 25 tokens. Seconds are processor seconds. Without the folder of a model in REASONSCOPE_REAL_MODEL nothing is measured.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from reasonscope.analysis.causal.attribution_patching import head_attribution
from reasonscope.analysis.causal.suppression import suppression_effect
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem, Span
from reasonscope.probes.models.model import Model, load_model

sys.path.insert(0, str(Path(__file__).parent))
from tools.serve import forget_peak, peak

TEXT = "First I add the two numbers that the question gives me. Then I check whether the sum is larger than the limit. "
SENTENCE = 25  # tokens


def timed(run: Callable[[], object]) -> str:
    """Seconds and extra MiB of a run, as two cells."""
    forget_peak()
    before, started = peak(), time.process_time()
    run()
    return f"{time.process_time() - started:.1f} s | {(peak() - before) / 2**20:,.0f} MiB"


def rows(model: Model, tokens: int) -> list[str]:
    ids = model.encode_text(TEXT * tokens)[:tokens]
    prompt = tokens // 8
    trace = build_trace(
        id="any",
        problem=Problem(id="any", prompt="?"),
        token_ids=ids,
        n_prompt_tokens=prompt,
        tokenizer=model.tokenizer_backend,
    )
    spans = [Span(start, start + SENTENCE) for start in range(prompt, tokens - SENTENCE + 1, SENTENCE)]
    n_heads = len(model.layers_with_heads) * model.n_heads
    return [
        f"| {n_heads} heads, estimated, {tokens} tokens | {timed(lambda: head_attribution(model, trace))} |",
        f"| suppression of {len(spans)} sentences, {tokens} tokens | {timed(lambda: suppression_effect(model, ids, spans))} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="128 tokens")
    parser.add_argument("--tokens", type=int, default=715)
    given = parser.parse_args()
    lines = ["## Heads and suppression on a real model", "", __doc__.split("\n\n", 1)[1].strip(), ""]
    if folder := os.environ.get("REASONSCOPE_REAL_MODEL"):
        model = load_model(folder, dtype="float32")
        said = f"{Path(folder).name}, {model.hf.num_parameters() / 1e9:.2f} B parameters, {model.n_layers} layers × {model.d_model}"
        lines += [
            f"{said}, float32, {torch.get_num_threads()} thread(s).",
            "",
            "| | processor seconds | extra memory |",
            "|---|---|---|",
        ]
        lines += rows(model, 128 if given.small else given.tokens)
    else:
        lines.append("No model was given.")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
