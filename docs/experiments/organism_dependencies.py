"""What the anchors find on the organism, whose dependencies are known: one table, each number with its null and with
nearness.

The three methods (counterfactual, receiver heads, attention suppression) are judged by the true dependencies: AUROC and
precision at k. Counterfactual effects come in five forms: as published, by resampling; only by the rollouts whose first
sentence differs; by rollouts after a sentence with a wrong number; and, with the following text read and not rewritten,
with a resampled sentence or a wrong number instead. Confidence: whether it rises along right traces. MI: whether the
sentence that states the answer is above its null. Allotment: rollouts spent, compared with as many everywhere as the
neediest sentence gets.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.analysis.anchors.importance import sentence_effects
from reasonscope.analysis.anchors.replacement import replaced_rollouts, replacement_effects, resampled_alternatives
from reasonscope.analysis.anchors.rollouts import Continuation, resample
from reasonscope.analysis.causal.attention_agreement import attention_agreement
from reasonscope.analysis.organism import wrong_statements
from reasonscope.analysis.statistics import agreement_numbers, dependency_agreement
from reasonscope.analysis.tokens.confidence import confidence_of_trace
from reasonscope.analysis.tokens.mi import gold_text, mi_of_trace, representations
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.intervals import mean_estimate
from reasonscope.data.organism.truth import true_sentences
from reasonscope.data.trace import Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.branches import PrefixWriter
from reasonscope.probes.generation.forced_answers import closing_stub
from reasonscope.probes.generation.recording import as_numpy
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import Model, load_model

Continued = Mapping[int, Sequence[Continuation]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=8, help="traces that are resampled")
    parser.add_argument("--read", type=int, default=24, help="traces that the other methods read, those among them")
    parser.add_argument("--most", type=int, default=60, help="rollouts of a sentence, at most")
    parser.add_argument("--half-width", type=float, default=0.125, help="of a sentence's accuracy")
    parser.add_argument("--steps", type=int, default=5, help="the longest problem, in steps")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.7], help="of the counterfactual rollouts")
    parser.add_argument("--skip", nargs="*", default=[], help=f"any of {', '.join(READ)}")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    model = load_model("organism", device=given.device)
    problems = load_problems("ledger", n=8 * given.read, seed=3)
    chosen = [p for p in problems if 2 <= (p.difficulty or 0) <= given.steps][: given.read]
    sampling = Sampling(temperature=0.7, max_new_tokens=700, seed=0)
    traces = [t for t in rollouts(model, chosen, sampling, batch_size=64) if t.state == "closed"]
    plan = Allotment(most=given.most, half_width=given.half_width)
    runs = {name: partial(run, model, traces) for name, run in READ.items() if name not in given.skip}
    for temperature in given.temperatures:
        how = replace(sampling, temperature=temperature)
        name = f"counterfactual, temperature {temperature}"
        runs[name] = partial(counterfactual, model, traces[: given.traces], how, plan)
    for name, run in runs.items():
        sys.stdout.write(json.dumps({name: run(), "traces": len(traces)}, indent=2) + "\n")
        sys.stdout.flush()


def counterfactual(model: Model, traces: Sequence[Trace], sampling: Sampling, plan: Allotment) -> dict[str, Any]:
    """Effects of sentences on sentences by rollouts and by what they wrote in a sentence's place, and what the allotment spent."""
    writer, codec = PrefixWriter(model, batch_size=256), (model.encode_continuation, model.decode)
    thinking, effects, truths, spent, fixed = model.thinking, defaultdict(list), [], 0, 0
    for trace in traces:
        known, truth = true_sentences(trace)
        own = [sentence.text.strip() for sentence in known]
        continued = resample(writer, trace, known, codec[1], sampling, allotment=plan, thinking=thinking)
        wrong = wrong_statements(known, seed=sampling.seed)
        behind = replaced_rollouts(writer, trace, known, wrong, *codec, sampling, samples=plan.least, thinking=thinking)
        unlike = {
            i: [row for row in rows if row.sentences and row.sentences[0].strip() != own[i]]
            for i, rows in continued.items()
            if i < len(own)
        }
        effects["resampling, as published"].append(exact_effects(own, continued))
        effects["resampling, first sentence differs"].append(exact_effects(own, continued, unlike))
        effects["wrong numbers, following text rewritten"].append(exact_effects(own, continued, behind))
        read = replacement_effects(model, trace, known, resampled_alternatives(known, continued))
        effects["resampled sentences, following text read"].append(
            read.values if read.measured else np.full((len(own), len(own)), np.nan)
        )
        truths.append(truth)
        sizes = [len(rows) for rows in continued.values()]
        spent += sum(sizes)
        fixed += max(sizes) * len(sizes)
    return {
        "traces": len(truths),
        **{name: agreement_numbers(dependency_agreement(matrices, truths)) for name, matrices in effects.items()},
        "rollouts": {"adaptive": spent, "as many everywhere": fixed, "saved": 1 - spent / fixed},
    }


def exact_effects(own: Sequence[str], continued: Continued, without: Continued | None = None) -> NDArray[np.float64]:
    """`sentence_effects` with only exactly the same sentence counted: in a grammar, a sentence with another number is another."""
    place = {text: i for i, text in enumerate(dict.fromkeys(own))}

    def vectors(texts: Sequence[str]) -> NDArray[np.float64]:
        rows = np.zeros((len(texts), len(place)))
        for row, text in enumerate(texts):
            if text.strip() in place:
                rows[row, place[text.strip()]] = 1.0
        return rows

    def embedded(rows: Continued) -> dict[int, list[NDArray[np.float64]]]:
        return {i: [vectors(one.sentences) for one in some] for i, some in rows.items()}

    other = None if without is None else embedded(without)
    return sentence_effects(vectors(own), embedded(continued), 1.0, without=other)


def read_behind(model: Model, traces: Sequence[Trace]) -> dict[str, Any]:
    """Effects of wrong numbers on the following sentences, and of any odd sentence in their place."""
    matrices, truths = [], []
    for trace in traces:
        known, truth = true_sentences(trace)
        matrices.append(replacement_effects(model, trace, known, wrong_statements(known)).values)
        truths.append(truth)
    return {"traces": len(truths), **agreement_numbers(dependency_agreement(matrices, truths))}


def attention(model: Model, traces: Sequence[Trace]) -> dict[str, Any]:
    """Receiver heads, all heads alike, and suppression."""
    found = attention_agreement(model, traces)
    assert found.null is not None
    ends = np.stack([found.null.low, found.null.high], axis=-1)
    return {
        "traces": len(found.provenance["traces"]),
        **{
            method: {
                metric: [float(found.values[i, j]), ends[i, j].tolist()]
                for j, metric in enumerate(found.axis("metric").labels)
            }
            for i, method in enumerate(found.axis("method").labels)
        },
        **found.numbers,
    }


def confidence(model: Model, traces: Sequence[Trace]) -> dict[str, Any]:
    """Mean confidence of right traces at eleven cuts, and how much it rises from the first to the last; the other answer is the null."""
    writer, decode = PrefixWriter(model, batch_size=128), model.decode
    thinking, right = model.thinking, [trace for trace in traces if trace.correct]
    curves, lucky, kinds = [], [], []
    for trace in right:
        foreign = next(t.final_answer for t in right if t.final_answer != trace.final_answer)
        stub = closing_stub(trace, model.encode_continuation, thinking=thinking)
        found = confidence_of_trace(writer, trace, stub, decode, samples=8, foreign=foreign)
        assert found.null is not None
        curves.append(found.values)
        lucky.append(found.null.high)
        kinds.append(found.numbers["kind"])
    rise = mean_estimate([curve[-1] - curve[0] for curve in curves], shares=False)
    return {
        "right": len(right),
        "mean": np.mean(curves, axis=0).round(3).tolist(),
        "mean of another answer": np.mean(lucky, axis=0).round(3).tolist(),
        "rise": [rise.value, rise.low, rise.high],
        "progressive": kinds.count("progressive"),
        "premature": kinds.count("premature"),
        "constant": kinds.count(None),
    }


def answer_sentences(model: Model, traces: Sequence[Trace]) -> dict[str, Any]:
    """Share of traces whose last sentence holds a token above its null, and the share of the other sentences that do."""
    site = Site("resid_post", model.n_layers - 1)
    golds = [representations(model, [gold_text(trace)], [site])[0] for trace in traces]
    last, other, tokens = [], [], []
    for trace, gold in zip(traces, golds, strict=True):
        (hidden,) = replay(model, [trace.token_ids.tolist()], [site])
        others = [one for one in golds if one is not gold]
        found = mi_of_trace(trace, {site: as_numpy(hidden[site])}, gold, others[:20])
        assert found.null is not None
        above = dict(
            zip(map(int, found.axis("token").labels), (found.values[0] > found.null.high[0]).tolist(), strict=True)
        )
        sentences = true_sentences(trace)[0]
        hit = [any(above.get(t, False) for t in range(s.tokens.start, s.tokens.stop)) for s in sentences]
        last.append(hit[-1])
        other.append(float(np.mean(hit[:-1])))
        tokens.append(float(np.mean(list(above.values()))))
    stated, elsewhere = mean_estimate(np.asarray(last, float)), mean_estimate(other)
    return {
        "traces": len(traces),
        "sentence of the answer": [stated.value, stated.low, stated.high],
        "other sentences": [elsewhere.value, elsewhere.low, elsewhere.high],
        "tokens above null": float(np.mean(tokens)),
    }


READ: Mapping[str, Callable[[Model, Sequence[Trace]], dict[str, Any]]] = {
    "attention": attention,
    "replacement": read_behind,
    "confidence": confidence,
    "mi": answer_sentences,
}

if __name__ == "__main__":
    main()
