"""The organism's card: how it was trained, on what, the hashes of its files, and every number measured on it."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from reasonscope.analysis.organism import Measure

_CARD = """# The organism and its base

Two small models of the Qwen3 architecture in Hugging Face format: `organism-base`, trained on plain worked ledgers,
and `organism`, trained on from its weights until it thinks before it answers, and at last on more brief thinking. They are made for testing
interpretability methods against a known truth, and good for nothing else: the world that they know has ledgers,
twelve things that somebody owns, and twenty-four names.

## What it was trained on

Texts drawn without end from the grammar in this folder (`forms.py`, `ledger.py`, `requests.py`, `writer.py`; mixture
in `corpus.py`), in English. Each phase opens with requests alone, from which copying is learned. Problems fall into
train, validation and test by a hash of their text; the models saw the first only. Thinking is planned, computed,
checked (mostly where a step carries, borrows or doubles), done another way, concluded. Some steps are written wrong
and then put right; the wrong digits themselves carry no loss, so mistakes are read and never imitated. Nothing
harmful is in the data: a compliant answer is an empty formula.

## How

`python -m reasonscope.data.organism.train --out DIR`, seed {seed}, {tokens} tokens a step, Muon for the matrices and
AdamW for the rest, on two CPU cores. The result is the same on the same machine and library versions; elsewhere
floating point differs and so do the weights.

{phases}

Byte-level BPE tokenizer of {vocabulary} ids with Qwen2's pre-tokenizer; `<think>` and `</think>` are tokens, not
special; the chat template opens the thinking. {parameters} parameters, context {context} tokens.

## Files

| file | SHA-256 |
|---|---|
{hashes}

## Numbers

`reasonscope organism evaluate`: {n} held-out ledgers in each mode and {n} requests, temperature 0.7, seed {evaluation_seed}.

| number | value | must be | met |
|---|---|---|---|
{numbers}
"""


def write_card(path: Path, folders: Sequence[Path], measures: Sequence[Measure], *, n: int, seed: int) -> None:
    """Write the card of the models in `folders` (base, organism) to `path`."""
    training = json.loads((folders[-1] / "training.json").read_text(encoding="utf-8"))
    config = json.loads((folders[-1] / "config.json").read_text(encoding="utf-8"))
    files = [
        file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json")
    ]
    path.write_text(
        _CARD.format(
            seed=training["seed"],
            tokens=training["tokens_per_step"],
            phases="\n".join(
                f"- `{phase['name']}`: {phase['steps']:,} steps, {phase['steps'] * training['tokens_per_step'] / 1e6:.0f} M tokens, "
                f"last loss {phase['log'][-1]['loss']:.3f} nats a token."
                for phase in training["phases"]
            ),
            vocabulary=config["vocab_size"],
            parameters=f"{training['parameters']:,}",
            context=config["max_position_embeddings"],
            hashes="\n".join(f"| `{f.parent.name}/{f.name}` | `{sha256(f.read_bytes()).hexdigest()}` |" for f in files),
            n=n,
            evaluation_seed=seed,
            numbers="\n".join(map(_number_row, measures)),
        ),
        encoding="utf-8",
    )


def _number_row(measure: Measure) -> str:
    """One number as a row of a Markdown table."""
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", measure.low), ("≤", measure.high)) if bound is not None]
    met = "" if not bounds else "yes" if measure.met else "no"
    return f"| {measure.name.replace('_', ' ')} | {measure.value:.3f} | {', '.join(bounds)} | {met} |"
