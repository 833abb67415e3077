"""What attention-based signals find on the organism, whose truth is known: docs/methods/heads.md has the numbers.

WAAD should find the starts of sentences, FAI the tokens of sentences that a later one uses, and the close window's
attention the sentences on which the last one depends, as should the attention chain of an answer (UQAC). Each is
compared with chance (the signal shifted along its trace; as many random tokens), with a baseline without attention,
and, for WAAD and FAI, with as many random heads. `--out` gets the figures.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from reasonscope.analysis.attention.close_attention import close_attention
from reasonscope.analysis.attention.head_profiles import head_rhythm, local_and_global, over
from reasonscope.analysis.attention.recurrence import recurrence
from reasonscope.analysis.attention.uqac import attention_chain, reduced_attention
from reasonscope.analysis.figures import points, write_figure
from reasonscope.analysis.results import Result
from reasonscope.analysis.statistics import result_of_estimates
from reasonscope.data import Sampling, Span, Trace, load_problems
from reasonscope.data.arrays import Values
from reasonscope.data.intervals import mean_estimate
from reasonscope.data.organism.truth import true_sentences
from reasonscope.data.ranks import auroc
from reasonscope.probes import Model, load_model, rollouts
from reasonscope.probes.architecture.heads import Head

DRAWS = 20
Scores = Mapping[str, float]  # "measured", "null" (mean over draws) and baselines, of one trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/attention"))
    parser.add_argument("--n", type=int, default=40, help="ledgers of 2 to 4 steps")
    given = parser.parse_args()
    model = load_model("organism")
    drawn = load_problems("ledger", n=4 * given.n, seed=3)
    problems = [problem for problem in drawn if 2 <= (problem.difficulty or 0) <= 4][: given.n]
    sampling = Sampling(temperature=0.7, max_new_tokens=700, seed=0)
    traces = [trace for trace in rollouts(model, problems, sampling, batch_size=64) if trace.state == "closed"]
    (given.out / "figures").mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Scores]] = {}
    for trace in traces:
        for name, scores in of_trace(model, trace).items():
            found.setdefault(name, []).append(scores)
    for name in ("signals", "uqac"):
        rows = {label: rows for label, rows in found.items() if (label in CHAINS) == (name == "uqac")}
        write_figure(points(table(rows, TITLES[name], NULLS[name])), given.out / "figures" / f"attention-{name}.json")
    for label, rows in found.items():
        shown = {key: short([row[key] for row in rows]) for key in rows[0]}
        sys.stdout.write(json.dumps({label: shown, "traces": len(rows)}) + "\n")
    sys.stdout.write(json.dumps({"recurrence": again(model, traces)}) + "\n")


CHAINS = ("on what the answer depends on", "on digits")
NULLS = {
    "signals": "the signal shifted along its trace, or shuffled, 95 %",
    "uqac": "random tokens of the thinking, 95 %",
}
TITLES = {
    "signals": "AUROC of attention signals against the truth",
    "uqac": "share of the chain of an answer (UQAC)",
}


def of_trace(model: Model, trace: Trace) -> dict[str, Scores]:
    sentences, depends_on = true_sentences(trace)
    thinking = trace.tokens.thinking
    begins, used_later, hangs_on = (np.zeros(len(thinking)) for _ in range(3))
    used, hung = used_by_later(depends_on), hung_on(depends_on)
    for i, sentence in enumerate(sentences):
        inside = slice(sentence.tokens.start - thinking.start, sentence.tokens.stop - thinking.start)
        begins[inside.start] = 1.0
        used_later[inside], hangs_on[inside] = used[i], hung[i]
    rhythm = head_rhythm(model, trace.token_ids[: thinking.stop].tolist(), thinking)
    local, wide = local_and_global(rhythm.span.mean(axis=-1))
    place = np.arange(len(thinking), dtype=np.float64)
    found = {
        "WAAD: a sentence begins": signal(begins, rhythm.waad, local, place),
        "FAI: a later sentence uses it": signal(used_later, rhythm.fai, wide, -place),
    }
    looked = close_attention(model, trace).values
    if len(looked) == len(hung) and 0 < hung[:-1].sum() < len(hung) - 1:
        rng, near = np.random.default_rng(0), np.arange(len(hung) - 1, dtype=np.float64)
        chance = [auroc(hung[:-1], rng.permutation(looked[:-1])) for _ in range(DRAWS)]
        found["close window: the answer depends on it"] = {
            "measured": auroc(hung[:-1], looked[:-1]),
            "null": float(np.mean(chance)),
            "place alone": auroc(hung[:-1], near),
        }
    return found | chain(model, trace, hangs_on)


def used_by_later(depends_on: Sequence[Sequence[int]]) -> Values:
    used = np.zeros(len(depends_on))
    used[[source for sources in depends_on for source in sources]] = 1.0
    return used


def hung_on(depends_on: Sequence[Sequence[int]]) -> Values:
    """For each sentence, whether the last one depends on it, directly or through others (itself included)."""
    hung = np.zeros(len(depends_on))
    hung[-1] = 1.0
    for target in range(len(depends_on) - 1, -1, -1):
        if hung[target]:
            hung[list(depends_on[target])] = 1.0
    return hung


def signal(truth: Values, by_head: Values, heads: Sequence[Head], place: Values) -> Scores:
    """AUROC of a signal (token,) over its heads; shifted along the trace; of as many random heads; of the place alone."""
    rng = np.random.default_rng(0)
    measured, grid = over(by_head, heads), by_head.shape[:2]
    shifts = rng.integers(1, len(truth), size=DRAWS)
    draws = [rng.choice(grid[0] * grid[1], size=len(heads), replace=False) for _ in range(DRAWS)]
    random = [over(by_head, [Head(layer=int(i) // grid[1], index=int(i) % grid[1]) for i in draw]) for draw in draws]
    return {
        "measured": auroc(truth, measured),
        "null": float(np.mean([auroc(truth, np.roll(measured, shift)) for shift in shifts])),
        "random heads": float(np.mean([auroc(truth, one) for one in random])),
        "place alone": auroc(truth, place),
    }


def chain(model: Model, trace: Trace, hangs_on: Values) -> dict[str, Scores]:
    """Of the tokens of the answer's attention chain within the thinking, how many are in sentences on which the answer depends,
    and how many are digits; the same for random tokens of the thinking that could have been taken, and for its last ones."""
    start, thinking = trace.n_prompt_tokens, trace.tokens.thinking
    texts = [model.tokenizer_backend.decode([i], skip_special_tokens=False) for i in trace.token_ids[start:].tolist()]
    barred = [not any(letter.isalnum() for letter in text) for text in texts]
    answer = [i for i in range(trace.tokens.answer.start - start, len(texts)) if any(c.isdigit() for c in texts[i])]
    response = Span(start, len(trace.token_ids))
    links = attention_chain(reduced_attention(model, trace.token_ids.tolist(), response), answer, barred)
    shift = thinking.start - start
    digits = np.array(
        [any(c.isdigit() for c in text) for text in texts[shift : shift + len(thinking)]], dtype=np.float64
    )
    free = np.array([i for i in range(len(thinking)) if not barred[i + shift]])
    taken = [place for link in links if link.score > 0 and 0 <= (place := link.index + 1 - shift) < len(thinking)]
    if not taken:
        return {}
    shares = {"on what the answer depends on": hangs_on, "on digits": digits}
    return {
        name: {
            "measured": float(of[taken].mean()),
            "null": float(of[free].mean()),
            "the last tokens": float(of[free[-len(taken) :]].mean()),
            **({"links": float(len(taken))} if name == "on digits" else {}),
        }
        for name, of in shares.items()
    }


def again(model: Model, traces: Sequence[Trace]) -> list[dict[str, object]]:
    """By layer the share of the thinking's tokens that are looked at again after a pause, and of the null."""
    numbers = [recurrence(model, trace).numbers for trace in traces]
    return [
        {
            "layer": layer,
            "share": short([one["by_layer"][layer]["recurring"]["value"] for one in numbers]),
            "null": short([one["by_layer_null"][layer]["recurring"] for one in numbers]),
        }
        for layer in range(model.n_layers)
    ]


def table(rows: Mapping[str, Sequence[Scores]], quantity: str, null: str) -> Result:
    """Every number beside its null: measured and baselines as rows, the null's interval as the band."""
    found, chance = {}, {}
    for label, scores in rows.items():
        by_chance = mean_estimate([one["null"] for one in scores])
        for key in scores[0]:
            if key in ("null", "links"):
                continue
            name = label if key == "measured" else f"{label} ({key})"
            found[name] = {quantity: mean_estimate([one[key] for one in scores])}
            chance[name] = {quantity: by_chance.interval}
    return result_of_estimates(found, chance, method="attention", quantity=quantity, null=null)


def short(values: Sequence[float]) -> list[float]:
    found = mean_estimate(values)
    return [round(end, 3) for end in (found.value, found.low, found.high)]


if __name__ == "__main__":
    main()
