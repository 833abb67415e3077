"""A hundred rollouts from before each sentence: behind one shared prefix beside independent ones, and as many as an interval needs.

W10 continues the thinking of a trace from before 20 of its sentences. Independently, every rollout is a prompt of its own, in batches as
large; behind the shared prefix (`PrefixWriter`) the trace is run once. Both draw the same tokens with the same seeds, which is checked.
Seconds are of the processor. Whatever the prefix costs is saved; what is written behind it is not, so that the ratio hangs on how long
the one is beside the other: it is given for a few tokens (the organism's forced answers) and for whole continuations.

The adaptive allotment is compared with a fixed number on accuracies p of sentences spread evenly over [0, 1] and on those of a sure model
(nine in ten sentences always right): the same largest half-width of the intervals, `most` rollouts everywhere or as many as needed.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from reasonscope.analysis.anchors.allotment import Allotment, wilson_half_width
from reasonscope.data.trace import Sampling
from reasonscope.probes.branches import Branch, PrefixWriter
from reasonscope.probes.decoding import generate
from reasonscope.probes.model import Model, load_model

BATCH, SENTENCES = 32, 20


def random_model(layers: int, width: int) -> Model:
    """A random Qwen3 with the organism's tokenizer."""
    tokenizer = load_model("organism").tokenizer
    config = Qwen3Config(
        vocab_size=768, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, head_dim=32,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, max_position_embeddings=16_384,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return load_model(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)


def beside(model: Model, tokens: int, new: int, rollouts: int) -> tuple[float, float, int]:
    """Processor seconds of independent prefixes and of the shared one; how many of the rollouts differ."""
    ids = np.random.default_rng(0).integers(5, 700, size=tokens).tolist()
    cuts = np.linspace(tokens // 10, tokens, SENTENCES, dtype=int).tolist()
    branches = [Branch(cut=cut, seed=1_000 * cut + k) for cut in cuts for k in range(rollouts)]
    sampling = Sampling(temperature=0.8, max_new_tokens=new)
    started = time.process_time()
    shared = PrefixWriter(model, batch_size=BATCH)(ids, branches, sampling)
    middle = time.process_time()
    alone = []
    for start in range(0, len(branches), BATCH):
        batch = branches[start : start + BATCH]
        alone += generate(model, [ids[: b.cut] for b in batch], sampling, seeds=[b.seed for b in batch])
    ended = time.process_time()
    differ = sum(not np.array_equal(a.token_ids, b.token_ids) for a, b in zip(shared, alone, strict=True))
    return ended - middle, middle - started, differ


def spent(plan: Allotment, shares: Sequence[float], seed: int) -> tuple[int, float]:
    """Rollouts that `plan` spends on sentences of these accuracies, and the widest half-width that is left."""
    rng = np.random.default_rng(seed)
    total, widest = 0, 0.0
    for share in shares:
        hits = n = 0
        while more := plan.wanted(hits, n):
            hits, n = hits + int(rng.binomial(more, share)), n + more
        total, widest = total + n, max(widest, wilson_half_width(hits, n))
    return total, widest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="4 rollouts instead of 100")
    parser.add_argument("--rollouts", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rollouts = 4 if given.small else given.rollouts
    say("## Rollouts from before every sentence\n")
    say(__doc__.split("\n\n", 1)[1].strip() + "\n")
    say(f"{SENTENCES} sentences × {rollouts} rollouts, batches of {BATCH}, one thread.\n")
    say(
        "| model | tokens of the trace | new tokens | independent | shared prefix | ratio (goal ≥ 4) | rollouts that differ |"
    )
    say("|---|---|---|---|---|---|---|")
    random = random_model(8, 256)
    beside(random, 64, 2, 1)  # warms up
    for tokens, new in ((2_000, 8), (2_000, 64), (500, 64)):
        alone, shared, differ = beside(random, tokens, new, rollouts)
        say(
            f"| random, 8 × 256 | {tokens:,} | {new} | {alone:.1f} s | {shared:.1f} s | {alone / shared:.1f} "
            f"| {differ} of {SENTENCES * rollouts} |"
        )
    say(
        "\n| accuracies of the sentences | fixed, to the same half-width | adaptive | share (goal ≤ .5) |\n|---|---|---|---|"
    )
    draw = np.random.default_rng(0).random(2_000)
    kinds = {
        "spread evenly over [0, 1]": draw,
        "a sure model: 9 of 10 always right": np.where(np.arange(2_000) % 10, 1.0, draw),
    }
    for name, shares in kinds.items():
        fixed, width = spent(Allotment.fixed(100), shares, 1)
        adaptive, left = spent(Allotment(most=100, half_width=width), shares, 1)
        say(f"| {name} | {fixed:,} (± {width:.3f}) | {adaptive:,} (± {left:.3f}) | {adaptive / fixed:.2f} |")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
