"""Receiver scores without the matrices, and suppression after a shared prefix, each compared with the plain way: one table of ratios.

Each side of the receiver table runs in its own process, one at a time, so that peak memory is its own: `output_attentions=True` keeps every
layer's token × token matrix, block by block keeps one block. The model has as many of 12 layers as fit with all matrices. "Extra" is the
peak minus the loaded model. Seconds are processor seconds, so that a busy machine changes no ratio.

Suppression: what follows a source depends on it and has to run again for each source; what comes before is shared, and so are the
distributions of the untouched pass. The ratio of tokens that have to run roughly bounds what sharing the prefix alone can gain.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from reasonscope.analysis.attention.sentence_attention import sentence_attention
from reasonscope.analysis.attention.vertical import kurtosis, vertical_scores
from reasonscope.analysis.causal.suppression import suppression_effect
from reasonscope.data.trace import Span
from reasonscope.probes.models.model import Model, load_model
from reasonscope.probes.models.unembedding import Unembedding, kl_from_hidden

sys.path.insert(0, str(Path(__file__).parent))
from goals import quartiles, verdict

TURNS = 3  # of suppression
LAYERS, WIDTH = 12, 768  # with a vocabulary of 32,000: 0.1 B parameters
Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def random_qwen3(layers: int, width: int, vocabulary: int = 32_000) -> Model:
    """A random Qwen3 of `layers` × `width`, heads of 64 that share keys three by three."""
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 192, head_dim=64, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
    )
    return load_model(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer)


def sequence(tokens: int, sentence: int, vocabulary: int) -> tuple[list[int], list[Span]]:
    """Random token ids, and sentences of `sentence` tokens after a prompt of an eighth of them."""
    ids = np.random.default_rng(0).integers(vocabulary, size=tokens).tolist()
    starts = range(tokens // 8, tokens - sentence + 1, sentence)
    return ids, [Span(start, start + sentence) for start in starts]


def by_matrices(model: Model, ids: Sequence[int], spans: Sequence[Span]) -> Values:
    """Sentence means from the matrices that `output_attentions=True` returns."""
    model.hf.set_attn_implementation("eager")
    members = torch.zeros(len(spans), len(ids))
    for index, span in enumerate(spans):
        members[index, span.slice] = 1 / len(span)
    with torch.no_grad():
        output = model.hf(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False, logits_to_keep=1)
        means = torch.stack([members @ attention[0] @ members.T for attention in output.attentions])
    return np.asarray(means.double().numpy())


def receiver(side: str, tokens: int, layers: int) -> None:
    """One side in this process: seconds, extra peak memory in bytes, and a file of the kurtosis of every head."""
    model = random_qwen3(layers, WIDTH)
    ids, spans = sequence(tokens, 25, model.vocabulary)
    sentence_attention(model, ids[:64], [Span(0, 64)])  # warm: the first pass of a process allocates
    before, start = _peak(), time.process_time()
    matrix = sentence_attention(model, ids, spans).matrix if side == "blocks" else by_matrices(model, ids, spans)
    seconds, extra = time.process_time() - start, _peak() - before
    vertical = vertical_scores(matrix, depth_control=False)
    peaked = kurtosis(vertical)
    sys.stdout.write(
        json.dumps(
            {
                "seconds": seconds,
                "extra": extra,
                "vertical": np.nan_to_num(vertical).tolist(),
                "kurtosis": peaked.tolist(),
            }
        )
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fitting_layers(tokens: int) -> int:
    """As many of the 12 layers as leave a third of the free memory to others when the plain way keeps all its matrices."""
    one = WIDTH // 64 * tokens**2 * 4
    return max(1, min(LAYERS, int(psutil.virtual_memory().available * 2 / 3 / one) - 2))  # two more while one is made


def child(side: str, tokens: int, layers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--receiver", side, "--tokens", str(tokens), "--layers", str(layers)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def full_passes(model: Model, ids: Sequence[int], spans: Sequence[Span]) -> Values:
    """Mean divergence (target, source), one whole pass under a 4-D mask for each source."""
    unembedding, fed, n = Unembedding.of(model), torch.tensor([ids]), len(ids)
    causal = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
    found = np.full((len(spans), len(spans)), np.nan)
    with torch.no_grad():
        plain = model.hf.base_model(input_ids=fed, use_cache=False).last_hidden_state[0]
        for j, source in enumerate(spans):
            mask = causal.clone()
            mask[:, source.slice] = torch.finfo(torch.float32).min
            states = {"full_attention": mask[None, None]}
            changed = model.hf.base_model(input_ids=fed, attention_mask=states, use_cache=False).last_hidden_state[0]
            kl = kl_from_hidden(unembedding, plain, changed, temperature=0.6)
            for i in range(j + 1, len(spans)):
                found[i, j] = kl[spans[i].start - 1 : spans[i].stop - 1].mean()
    return found


def timed(run: Callable[[], Values]) -> tuple[float, Values]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def beside(tokens: int, layers: int) -> list[str]:
    """W8 as rows of the table."""
    ours, theirs = (child(side, tokens, layers) for side in ("blocks", "matrices"))
    size = f"{tokens:,} tokens, {layers} of {LAYERS} layers"
    time_share, memory_share = ours["seconds"] / theirs["seconds"], ours["extra"] / theirs["extra"]
    return [
        f"| W8 processor seconds, {size} | {theirs['seconds']:.1f} | {ours['seconds']:.1f} "
        f"| {time_share:.2f} | ≤ 0.5 | {verdict(time_share, at_most=0.5)} |",
        f"| W8 extra peak memory, {size} | {theirs['extra'] / 2**20:,.0f} MiB | {ours['extra'] / 2**20:,.0f} MiB "
        f"| {memory_share:.3f} | ≤ 0.1 | {verdict(memory_share, at_most=0.1)} |",
    ]


def _doc(part: int) -> str:
    """A paragraph of what this file says of itself, after its first line."""
    return (__doc__ or "").split("\n\n")[1 + part].strip()


def receiver_report(sizes: Sequence[int], layers: int | None) -> list[str]:
    few = [child(side, 512, layers or LAYERS) for side in ("blocks", "matrices")]
    gap = np.abs(np.subtract(few[0]["vertical"], few[1]["vertical"])).max()
    return [
        "## Attention without matrices",
        "",
        _doc(0),
        "",
        f"Random Qwen3 of width {WIDTH} (0.1 B with {LAYERS} layers), sentences of 25; {torch.get_num_threads()} thread(s).",
        "",
        "| | output_attentions=True | block by block | share | goal | |",
        "|---|---|---|---|---|---|",
        *(row for tokens in sizes for row in beside(tokens, layers or fitting_layers(tokens))),
        "",
        f"Largest difference of a vertical score at 512 tokens: {gap:.1e}.",
        "",
    ]


def suppression_report() -> list[str]:
    model = random_qwen3(6, 384, vocabulary=8_000)
    ids, spans = sequence(600, 20, model.vocabulary)
    few, some = sequence(100, 20, model.vocabulary)
    suppression_effect(model, few, some), full_passes(model, few, some)  # warm: the first pass of a process allocates
    seconds, gaps = [], []
    for _ in range(TURNS):
        behind, shared = timed(lambda: suppression_effect(model, ids, spans).kl)
        whole, dense = timed(lambda: full_passes(model, ids, spans))
        seconds.append((whole, behind))
        gaps.append(np.nanmax(np.abs(shared - dense)))
    ratios = [whole / behind for whole, behind in seconds]
    whole, behind = np.median(seconds, axis=0)
    return [
        "## Suppression after a shared prefix",
        "",
        _doc(1),
        "",
        f"{len(spans)} sentences in {len(ids)} tokens (6 layers × 384), processor seconds; {torch.get_num_threads()} thread(s); medians of "
        f"{TURNS} turns.",
        "",
        "| | whole passes | after a shared prefix | times faster (quartiles) | goal | | times fewer tokens run | largest difference |",
        "|---|---|---|---|---|---|---|---|",
        f"| suppression | {whole:.1f} | {behind:.1f} | {quartiles(ratios)} | ≥ 2.5 | {verdict(ratios, at_least=2.5)} "
        f"| {fewer_tokens(len(ids), spans):.1f} | {max(gaps):.1e} nats |",
    ]


def fewer_tokens(n_tokens: int, spans: Sequence[Span]) -> float:
    """Tokens of whole passes over those that have to run after a shared prefix: of a source its last token, which predicts the first of the
    next sentence. The last sentence has no later target."""
    behind = sum(n_tokens - source.stop + 1 for source in spans[:-1])
    return (len(spans) + 1) * n_tokens / (n_tokens + behind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="1,024 tokens, 4 layers")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 4096])
    parser.add_argument("--layers", type=int, help=f"of the model, {LAYERS} or what fits by default")
    parser.add_argument("--part", choices=("receivers", "suppression"), help="both by default")
    parser.add_argument("--receiver", choices=("blocks", "matrices"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receiver:
        receiver(arguments.receiver, arguments.tokens[0], arguments.layers or LAYERS)
        return
    sizes, layers = ([1024], 4) if arguments.small else (arguments.tokens, arguments.layers)
    lines = receiver_report(sizes, layers) if arguments.part != "suppression" else []
    lines += suppression_report() if arguments.part != "receivers" else []
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
