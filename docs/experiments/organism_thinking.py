"""What thinking words do on the organism (MI-Peaks, arXiv 2506.02867): forbidden, recycled, and added where the thinking would close.

Each has its control: tokens of the same frequency, as many random steps, and words that are not thinking words. Printed are JSON
lines; `--out` gets the figures. docs/methods/mi-peaks.md has the numbers.
"""

import argparse
import json
import sys
from pathlib import Path

from reasonscope.analysis.figures import points, write_figure
from reasonscope.analysis.tokens.recycling import Recycling, recycling_study
from reasonscope.analysis.tokens.thinking_tokens import time_scaling, token_ids_of, token_suppression
from reasonscope.data import Sampling, load_problems
from reasonscope.probes import load_model, rollouts

WORDS = ("Wait", "Let", "So")  # of those that MI-Peaks names or likes, what the organism has as tokens
DECODING_METHODS = ("The", "and", "is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/thinking"))
    parser.add_argument("--n", type=int, default=40, help="ledgers, of 3 to 8 steps")
    parser.add_argument("--layer", type=int, default=3, help="the block whose output is fed again")
    parser.add_argument("--only", nargs="*", help="any of token-suppression, recycling, time-scaling")
    given = parser.parse_args()
    model = load_model("organism")
    drawn = load_problems("ledger", n=2 * given.n, seed=5)
    problems = [problem for problem in drawn if (problem.difficulty or 0) >= 3][: given.n]
    sampling = Sampling(temperature=0.7, max_new_tokens=700, seed=0)
    recycled = Recycling(layer=given.layer, tokens=tuple(token_ids_of(model, WORDS)))
    studies = {
        "token-suppression": lambda: token_suppression(model, problems, sampling, words=WORDS, batch_size=64),
        "recycling": lambda: recycling_study(model, problems, sampling, recycled, batch_size=64),
        "time-scaling": lambda: time_scaling(
            model,
            [trace for trace in rollouts(model, problems, sampling, batch_size=64) if trace.state == "closed"],
            sampling,
            words=WORDS,
            controls=DECODING_METHODS,
        ),
    }
    (given.out / "figures").mkdir(parents=True, exist_ok=True)
    for name, study in studies.items():
        if given.only and name not in given.only:
            continue
        found = study()
        write_figure(points(found), given.out / "figures" / f"{name}.json")
        assert found.interval is not None and found.null is not None
        rows = zip(found.axes[0].labels, found.values, found.interval.low, found.interval.high, strict=True)
        shown = {
            row: [values.round(3).tolist(), low.round(3).tolist(), high.round(3).tolist()]
            for row, values, low, high in rows
        }
        null = {"low": found.null.low[0].tolist(), "high": found.null.high[0].tolist(), "what": found.null.what}
        sys.stdout.write(json.dumps({name: shown, "null": null, "numbers": found.numbers}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
