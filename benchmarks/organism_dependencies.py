"""What the text-side analyses find on the organism, whose every dependency is known: one table, each number beside its null.

Anchors: sentence-to-sentence effects of resampling against the true dependencies (AUROC, precision at k). Confidence: how many right
traces are progressive. MI: whether the sentence that states the answer stands above its null. Adaptive allotment: rollouts spent against
the same number everywhere.
"""

import argparse
import json
import sys

import numpy as np

from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.analysis.anchors.rollouts import anchors_of_trace, resample
from reasonscope.analysis.confidence import confidence_of_trace
from reasonscope.analysis.forced import closing_stub, decoder, encoder
from reasonscope.analysis.mi_peaks import gold_text, mi_of_trace, representations
from reasonscope.analysis.organism import true_sentences
from reasonscope.analysis.statistics import agreement_numbers, dependency_agreement
from reasonscope.data.parse import THINK
from reasonscope.data.problems import load_problems
from reasonscope.data.trace import Sampling
from reasonscope.probes.branches import PrefixWriter
from reasonscope.probes.capture import replay
from reasonscope.probes.model import load_model
from reasonscope.probes.record import as_numpy
from reasonscope.probes.rollout import rollouts
from reasonscope.probes.sites import Site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=8)
    parser.add_argument("--most", type=int, default=60, help="rollouts of a sentence, at most")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    model = load_model("organism", device=given.device)
    writer, decode = PrefixWriter(model, batch_size=64), decoder(model.tokenizer_backend)
    sampling = Sampling(temperature=0.7, max_new_tokens=700, seed=0)
    problems = [p for p in load_problems("ledger", n=6 * given.traces, seed=3) if 2 <= (p.difficulty or 0) <= 5]
    traces = [t for t in rollouts(model, problems[: given.traces], sampling) if t.state == "closed"]
    tags = model.tags or THINK
    effects, truths, spent, fixed = [], [], 0, 0
    for trace in traces:
        known, truth = true_sentences(trace)
        plan = Allotment(most=given.most, half_width=0.125)
        continued = resample(writer, trace, known, decode, sampling, allotment=plan, tags=tags)
        found = anchors_of_trace(trace, known, continued, draws=20)
        effects.append(np.asarray(found.arrays["effects"]))
        truths.append(truth)
        spent += found.numbers["rollouts"]
        fixed += given.most * (len(known) + 1)
    curves = [
        confidence_of_trace(
            writer,
            trace,
            closing_stub(trace, encoder(model.tokenizer_backend), tags=tags),
            decode,
            samples=8,
            draws=20,
        )
        for trace in traces
    ]
    site = Site("resid_post", model.n_layers - 1)
    golds = [representations(model, [gold_text(trace)], [site])[0] for trace in traces]
    above, elsewhere = [], []
    for trace, gold in zip(traces, golds, strict=True):
        (hidden,) = replay(model, [trace.token_ids.tolist()], [site])
        others = [other for other in golds if other is not gold]
        found = mi_of_trace(trace, {site: as_numpy(hidden[site])}, gold, others)
        assert found.null is not None
        over = found.values[0] > found.null.high[0]
        last = true_sentences(trace)[0][-1].tokens
        inside = np.array([int(label) in last for label in found.axis("token").labels])
        above.append(bool(over[inside].any()))
        elsewhere.append(float(over[~inside].mean()))
    right = [c for c, t in zip(curves, traces, strict=True) if t.correct and c.numbers["kind"]]
    table = {
        "traces": len(traces),
        "dependencies": agreement_numbers(dependency_agreement(effects, truths)),
        "rollouts": {"adaptive": spent, "fixed": fixed},
        "progressive_of_right": float(np.mean([c.numbers["kind"] == "progressive" for c in right])) if right else None,
        "mean_confidence_of_right": np.mean([c.values for c in right], axis=0).tolist() if right else None,
        "mi_above_null_in_answer_sentence": float(np.mean(above)),
        "mi_above_null_elsewhere": float(np.mean(elsewhere)),
    }
    sys.stdout.write(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
