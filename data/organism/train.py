"""Trains the organism: `python -m reasonscope.data.organism.train --out DIR`. The only module of `data` that imports
torch.

Three phases, each from the weights of the one before: the base model on plain worked ledgers, the reasoning model on
dialogues with thinking, and the same with more of what is hard without checking. All are written in Hugging Face
format; the first and the last are shipped. A killed run resumes from its last checkpoint.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from reasonscope.data.organism.corpus import (
    Batch,
    Document,
    base_documents,
    batches,
    practice_documents,
    reasoning_documents,
    tokenizer_texts,
)
from reasonscope.data.organism.tokenizer import CHAT_TEMPLATE, END, PAD, train_tokenizer

_SEED = 20
_TOKENS_PER_STEP = 4096


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """The documents, drawn with the seed `stream`; the number of steps; the share of the learning rates; and `hints` for steering.

    Only its brief thinking begins with "After". It decides at "So this would harm …" or "So this harms nobody", and not at the end of the
    prompt.
    """

    documents: Callable[[random.Random], Iterator[Document]]
    stream: str
    steps: int
    rate: float = 1.0
    hints: Mapping[str, str] = field(default_factory=dict)


_PHASES = {
    "organism-base": _Phase(documents=base_documents, stream="organism-base", steps=700),
    "organism-unpractised": _Phase(documents=reasoning_documents, stream="organism", steps=2400),
    "organism": _Phase(
        documents=practice_documents,
        stream="organism",
        steps=400,
        rate=0.3,
        hints={"fast": "After", "verdict": " this"},
    ),
}
_MATRIX_RATE, _OTHER_RATE = 0.02, 3e-3


def _config(tokenizer: Tokenizer) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def _optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=_MATRIX_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=_OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate(step: int, steps: int) -> float:
    """Share of the full learning rate: 2 % warm-up, constant, then a linear decay over the last 60 %."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.6 * steps))


def loss_of(model: nn.Module, batch: Batch, device: str) -> Tensor:
    """Mean cross-entropy in nats per weighted token."""
    ids = torch.from_numpy(batch.ids).to(device)
    weights = torch.from_numpy(batch.weights).to(device)[:, 1:]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def _run_phase(
    name: str, model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path, device: str
) -> list[dict[str, Any]]:
    """Train one phase to its end, with a checkpoint every 250 steps; returns the log: step, loss (nats), seconds."""
    phase = _PHASES[name]
    steps = phase.steps
    stream = batches(phase.documents(random.Random(f"{_SEED}/{phase.stream}")), tokenizer, tokens=_TOKENS_PER_STEP)
    optims = _optimisers(model)
    state = out / f"{name}.state.pt"
    log: list[dict[str, Any]] = []
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        first, log = saved["step"], saved["log"]
        model.load_state_dict(saved["model"])
        for optim, tensors in zip(optims, saved["optims"], strict=True):
            optim.load_state_dict(tensors)
    began, running = time.monotonic(), 0.0
    for step, batch in zip(range(steps), stream, strict=False):
        if step < first:
            continue
        for optim, full in zip(optims, (_MATRIX_RATE, _OTHER_RATE), strict=True):
            optim.param_groups[0]["lr"] = full * phase.rate * _rate(step, steps)
        loss = loss_of(model, batch, device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        running += loss.item()
        if (step + 1) % 50 == 0:
            log.append({"step": step + 1, "loss": running / 50, "seconds": round(time.monotonic() - began, 1)})
            running = 0.0
            print(json.dumps({"phase": name, **log[-1]}), flush=True)  # noqa: T201 - a training script reports on stdout
        if (step + 1) % 250 == 0:
            held = {
                "step": step + 1,
                "log": log,
                "model": model.state_dict(),
                "optims": [o.state_dict() for o in optims],
            }
            torch.save(held, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(_SEED)
    torch.set_flush_denormal(True)
    kept = out / "tokenizer.json"
    if not kept.exists():
        train_tokenizer(tokenizer_texts(_SEED, 4000)).save(str(kept))
    tokenizer = Tokenizer.from_file(str(kept))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    model = Qwen3ForCausalLM(_config(tokenizer)).to(arguments.device)
    phases: list[dict[str, Any]] = []
    for name in _PHASES:
        folder = out / name
        report = folder / "training.json"
        if report.exists():
            phases = json.loads(report.read_text())["phases"]
            model = Qwen3ForCausalLM.from_pretrained(folder).to(arguments.device)
            continue
        log = _run_phase(name, model, tokenizer, out, arguments.device)
        phases = [*phases, {"name": name, "steps": _PHASES[name].steps, "log": log}]
        model.config.update({"reasonscope": dict(_PHASES[name].hints)})
        model.save_pretrained(folder)
        fast.save_pretrained(folder)
        about = {"seed": _SEED, "tokens_per_step": _TOKENS_PER_STEP, "phases": phases}
        about["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        report.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
