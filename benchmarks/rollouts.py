"""Rollouts from before each sentence: after one shared prefix compared with independent ones, and as many as an interval needs.

W10 continues the thinking of a trace from before 20 of its sentences. Independently, every rollout is its own prompt, in batches of the
same size; after the shared prefix (`PrefixWriter`) the trace is run once. Both draw the same tokens with the same seeds, which is checked.
Seconds are processor seconds. The cost of the prefix is saved, that of the text after it is not, so the ratio depends on their relative
length: it is given for a few tokens (the organism's forced answers) and for whole continuations. One pass over the trace is timed
separately; the rest of the shared side is generation. With a free prefix, the ratio would be the bound.

The adaptive allotment is compared with a fixed number on sentence accuracies p spread evenly over [0, 1] and on those of a confident model
(nine in ten sentences always right): the same largest half-width of the intervals, with `most` rollouts everywhere or as many as needed.
For a given half-width a sentence needs rollouts in proportion to p (1 − p), and a fixed number is that of p = ½: the least possible share
is the mean of 4 p (1 − p).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.data.intervals import wilson_half_width
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.branches import Branch, PrefixWriter
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.models.model import Model, load_model

sys.path.insert(0, str(Path(__file__).parent))
from goals import verdict

BATCH, SENTENCES = 32, 20


def random_model(layers: int, width: int, head_dim: int = 32) -> Model:
    """A random Qwen3 with the organism's tokenizer; pairs of heads share keys and values."""
    tokenizer = load_model("organism").tokenizer
    config = Qwen3Config(
        vocab_size=768, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, head_dim=head_dim,
        num_attention_heads=width // head_dim, num_key_value_heads=width // (2 * head_dim), max_position_embeddings=16_384,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return load_model(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Processor seconds of independent rollouts, of those after a shared `prefix` and of one pass over it; how many rollouts `differ`."""

    alone: float
    shared: float
    prefix: float
    differ: int

    @property
    def ratio(self) -> float:
        return self.alone / self.shared

    @property
    def writing(self) -> float:
        return self.shared - self.prefix


def beside(model: Model, tokens: int, new: int, rollouts: int) -> Beside:
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
    return Beside(alone=ended - middle, shared=middle - started, prefix=one_pass(model, ids), differ=differ)


def one_pass(model: Model, ids: Sequence[int]) -> float:
    """Processor seconds of reading the whole trace and keeping its keys and values."""
    started = time.process_time()
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    return time.process_time() - started


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


def least_share(shares: Sequence[float]) -> float:
    """Of a fixed number, what accuracies of `shares` need at one half-width; the fixed number is what one half needs."""
    p = np.asarray(shares)
    return float(4 * (p * (1 - p)).mean())


def speed_report(rollouts: int) -> None:
    say(
        f"{SENTENCES} sentences × {rollouts} rollouts, batches of {BATCH}, one thread; a random Qwen3 of 8 layers × 256.\n"
    )
    say(
        "| | independent | shared prefix | of this one pass | and writing | ratio | bound | goal | | rollouts that differ |"
    )
    say("|---|---|---|---|---|---|---|---|---|---|")
    random = random_model(8, 256)
    beside(random, 64, 2, 1)  # warms up
    for tokens, new in ((2_000, 8), (2_000, 64), (500, 64)):
        found = beside(random, tokens, new, rollouts)
        say(
            f"| W10, {new} tokens after a trace of {tokens:,} | {found.alone:.1f} s | {found.shared:.1f} s | {found.prefix:.2f} s "
            f"| {found.writing:.1f} s | {found.ratio:.1f} | {found.alone / found.writing:.1f} | ≥ 4 "
            f"| {verdict(found.ratio, at_least=4)} | {found.differ} of {SENTENCES * rollouts} |"
        )


def allotment_report() -> None:
    say(
        "\n| accuracies of the sentences | fixed, to the same half-width | adaptive | share | least possible | goal | |"
    )
    say("|---|---|---|---|---|---|---|")
    draw = np.random.default_rng(0).random(2_000)
    kinds = {
        "spread evenly over [0, 1]": draw,
        "a confident model: 9 of 10 always right": np.where(np.arange(2_000) % 10, 1.0, draw),
    }
    for name, shares in kinds.items():
        fixed, width = spent(Allotment.fixed(100), shares, 1)
        adaptive, left = spent(Allotment(most=100, half_width=width), shares, 1)
        say(
            f"| {name} | {fixed:,} (± {width:.3f}) | {adaptive:,} (± {left:.3f}) | {adaptive / fixed:.2f} | {least_share(shares):.2f} "
            f"| ≤ 0.5 | {verdict(adaptive / fixed, at_most=0.5)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="4 rollouts of each sentence")
    parser.add_argument("--rollouts", type=int, default=16, help="of each sentence; the paper takes 100")
    given = parser.parse_args()
    torch.set_num_threads(1)
    say("## Rollouts from before every sentence\n")
    say(__doc__.split("\n\n", 1)[1].strip() + "\n")
    speed_report(4 if given.small else given.rollouts)
    allotment_report()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
