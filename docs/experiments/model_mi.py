"""MI peaks of a real model at every layer, for three representations of the answer and both definitions of a peak.

Each trace's own answer is compared with the answers of the other problems, and so is each of those in its place: shifting all answers by
k problems gives as many true nulls as there are other problems.

    python docs/experiments/model_mi.py runs/mine --model MODEL
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

import reasonscope as rs
from reasonscope.analysis.statistics import chance_above, null_band
from reasonscope.analysis.tokens.mi import emitting_rows, find_peaks, gold_text, representations, top_k
from reasonscope.analysis.tokens.nocco import mutual_information
from reasonscope.data import Trace
from reasonscope.data.arrays import Values
from reasonscope.data.progress import say, tracked
from reasonscope.probes import Site, replay
from reasonscope.probes.models.model import Model

ANSWERS = {
    "reference solution": lambda trace: gold_text(trace),
    "reference answer": lambda trace: trace.problem.answer,
    "own answer": lambda trace: trace.answer_text.strip(),
}


def read(model: Model, traces: Sequence[Trace], sites: Sequence[Site]) -> list[dict[Site, Values]]:
    """The states that emit the tokens of each thinking, (token, d_model) by site."""
    found = []
    for trace in tracked(traces, "reading", "traces"):
        (seen,) = replay(model, [trace.token_ids.tolist()], sites)
        rows = emitting_rows(trace)
        found.append({site: seen[site][rows].float().numpy() for site in sites})
    return found


def shares(states: Values, answers: Values) -> Values:
    """By answer (answer, 3): the share of tokens above the band of the other answers, of all, of the peaks and of the top 20."""
    found = mutual_information(states.astype(np.float64), answers)
    rows = []
    for k, line in enumerate(found.T):
        above = line > null_band(np.delete(found, k, axis=1).T, "others").high
        peaks = find_peaks(line)
        rows.append([above.mean(), above[peaks].mean() if peaks.any() else np.nan, above[top_k(line, 20)].mean()])
    return np.array(rows)


def _cell(shifts: Values) -> str:
    """The share, its mean over shifts, and p; nothing if some shift has no peak at all."""
    if np.isnan(shifts).any():
        return "– | – | –"
    return f"{shifts[0]:.3f} | {shifts[1:].mean():.3f} | {(shifts >= shifts[0]).mean():.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--model", required=True)
    parser.add_argument("--least", type=int, default=20, help="least number of thinking tokens of a trace")
    given = parser.parse_args()
    store = rs.open_run(given.run).store
    model = rs.load_model(given.model, dtype="float32")
    traces = [trace for trace in store if trace.n_thinking_tokens >= given.least]
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    states = dict(zip((trace.id for trace in traces), read(model, traces, sites), strict=True))
    sys.stdout.write(
        "| answer | site | traces | all tokens | shifted | p | peaks | shifted | p | top 20 | shifted | p |" + "\n"
    )
    for name, text in ANSWERS.items():
        known = [trace for trace in traces if text(trace)]
        golds = representations(model, [text(trace) for trace in known], sites)
        n = len(known)
        say(f"{name}: {n} traces; chance {chance_above(n - 1):.3f}")
        for site in sites:
            answers = np.stack([gold[site] for gold in golds])
            found = np.stack([shares(states[trace.id][site], answers) for trace in known])  # (trace, answer, 3)
            shifts = np.array([np.nanmean([found[i, (i + k) % n] for i in range(n)], axis=0) for k in range(n)])
            cells = [_cell(shifts[:, j]) for j in range(3)]
            sys.stdout.write(f"| {name} | {site} | {n} | {' | '.join(cells)} |" + "\n")


if __name__ == "__main__":
    main()
