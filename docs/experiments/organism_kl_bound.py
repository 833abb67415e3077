"""How far the KL bound of ASC (arXiv 2507.04742, section 3) is from the KL that steering the organism causes.

γ* is calibrated on states of the split `train` and judged on held-out ones of `test`, each the last token of thinking
that was cut at a random place; the control is random directions of the same length. It prints JSON lines; `--run` gets
the figure, in which the strength goes up to values that change the model. docs/steering.md has the numbers.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from reasonscope.analysis.figures import along, write_figure
from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.data import Problem, Sampling, Trace, load_problems
from reasonscope.data.intervals import mean_estimate
from reasonscope.probes import Model, Site, load_model, record, rollouts
from reasonscope.steering import SteeringVector
from reasonscope.steering.methods.asc import calibrate, extract_asc, last_token_kl
from reasonscope.steering.methods.seal import extract_seal

SITE = Site("resid_post", 4)
MULTIPLES = (1, 3, 10, 30, 100, 300, 1000)  # of γ*
DIRECTIONS = 5  # random ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/kl-bound"))
    parser.add_argument("--n", type=int, default=60, help="held-out states, of as many ledgers")
    given = parser.parse_args()
    model, rng = load_model("organism"), np.random.default_rng(0)
    sampling = Sampling(temperature=0.7, max_new_tokens=450, seed=0)
    learn = [*ledgers("train", 40), *ledgers("train", 40, ":brief")]
    store = record(model, learn, given.run / "store", sites=[SITE], sampling=sampling, batch_size=64)
    plain = [trace for trace in store if trace.problem.meta["mode"] == "default"]
    ids = [trace.id for trace in plain]
    vectors = {
        "SEAL, reflection alone": extract_seal(store, SITE, ids=ids, away_from=("reflection",)),
        "ASC, read at separators": extract_asc(store, [SITE], read="separators", verbose="default"),
    }
    states = [cut(trace, rng) for trace in plain[:20]]
    held_out = [cut(trace, rng) for trace in rollouts(model, ledgers("test", given.n), sampling, batch_size=64)]
    (given.run / "figures").mkdir(exist_ok=True)
    for name, vector in vectors.items():
        found = calibrate(model, vector, states, held_out)
        bound = found.bound
        largest = {"measured": found.measured.max(), "random direction": found.random.max()}
        shown = {"a": bound.a, "L": bound.lipschitz, "γ*": bound.gamma_star, "multiplier": found.multiplier}
        shown |= {"norm": vector.norms[SITE], "within": found.within, "held out": len(held_out), "largest KL": largest}
        sys.stdout.write(json.dumps({name: shown}) + "\n")
        result, allowed = (
            beyond(model, vector, bound.gamma_star, held_out),
            [bound.bound(m * bound.gamma_star) for m in MULTIPLES],
        )
        sys.stdout.write(json.dumps({name: result.values[0].tolist(), "bound": allowed}) + "\n")
        figure = along(result, beside={"the bound": np.array(allowed)}).update_yaxes(type="log", exponentformat="power")
        write_figure(figure, given.run / "figures" / f"kl-bound-{vector.method}.json")


def ledgers(split: str, n: int, mode: str = "") -> list[Problem]:
    drawn = load_problems(f"ledger{mode}", split=split, n=2 * n)
    return [problem for problem in drawn if (problem.difficulty or 0) <= 4][:n]


def cut(trace: Trace, rng: np.random.Generator) -> list[int]:
    thinking = trace.tokens.thinking
    return trace.token_ids[: int(rng.integers(thinking.start + 1, thinking.stop))].tolist()


def beyond(model: Model, vector: SteeringVector, gamma: float, contexts: Sequence[Sequence[int]]) -> Result:
    """Mean KL (nats) of the next token by strength, in multiples of γ*; the null is the range of random directions of the same length."""

    def means(one: SteeringVector) -> list[np.ndarray]:
        unit = torch.from_numpy(one.normalised().directions[SITE])
        return [last_token_kl(model, SITE, unit * gamma * multiple, contexts) for multiple in MULTIPLES]

    measured = [mean_estimate(values, shares=False) for values in means(vector)]
    random = np.array([[values.mean() for values in means(vector.random_like(seed))] for seed in range(DIRECTIONS)])
    shape, name = (1, len(MULTIPLES)), f"KL of the next token, {vector.method} at {SITE}"
    return Result(
        method="kl_bound",
        quantity=name,
        unit="nats",
        axes=(Axis.of("vector", [name]), Axis.of("strength", [f"{multiple} γ*" for multiple in MULTIPLES])),
        values=np.array([[one.value for one in measured]]),
        null=Band.of(random.min(axis=0), random.max(axis=0), shape, f"range of {DIRECTIONS} random directions"),
        interval=Band.of([one.low for one in measured], [one.high for one in measured], shape, "95 % over states"),
    )


if __name__ == "__main__":
    main()
