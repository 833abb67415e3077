"""Published code beside ours on the organism, for docs/methods/published-code.md: each departure that changes a number, with both.

Every number is computed twice from the same traces: as the published code does it, defects included, and as it is done here. What the
steering methods do is judged on ledgers of `test` that no vector learned from, in one batch with the same seeds. Each method is
measured once; `--out` keeps its rows, and a second call goes on after them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from organism_arms import SAMPLING, ledgers, source_of
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge

from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.analysis.anchors.importance import Convention
from reasonscope.analysis.anchors.rollouts import anchors_of_trace, resample
from reasonscope.analysis.attention.receiver_heads import receiver_heads
from reasonscope.analysis.attention.vertical import top_heads
from reasonscope.analysis.causal import suppression
from reasonscope.analysis.causal.suppression import Untouched, suppression_matrix
from reasonscope.analysis.tokens.mi import emitting_rows, gold_text, mi_of_trace, representations
from reasonscope.analysis.tokens.nocco import EPSILON, SIGMA
from reasonscope.data import Trace, TraceStore, load_problems
from reasonscope.data.text.steps_and_sentences import sentences, steps
from reasonscope.data.variants import Variant
from reasonscope.probes import Model, Site, load_model, record
from reasonscope.probes.architecture.heads import Head
from reasonscope.probes.generation.branches import PrefixWriter
from reasonscope.probes.generation.padding import left_padded
from reasonscope.probes.models.unembedding import Unembedding
from reasonscope.steering import METHODS, AdaptiveSteering, Arm, Condition, Scope, SteeringExperiment
from reasonscope.steering.ablation.interventions import AblationIntervention
from reasonscope.steering.ablation.targets import Ablation
from reasonscope.steering.decoding.budget import TRUST, LengthPredictor, negative_log_density, train_predictor
from reasonscope.steering.experiments.side_effects import divergences, logits_function
from reasonscope.steering.methods.adaptive import layer_difference
from reasonscope.steering.methods.asc import CompletionPair, extract_asc_from_pairs, mode_pairs
from reasonscope.steering.methods.reasoning_strength import extract_strength
from reasonscope.steering.methods.refusal import (
    ablated_everywhere,
    answer_contexts,
    answer_start,
    contexts,
    extract_refusal,
    judged_halves,
    refusal_candidates,
    refusal_scores,
)
from reasonscope.steering.methods.registry import ExtractionData
from reasonscope.steering.methods.seal import extract_seal
from reasonscope.steering.vectors.application import VectorUse, as_intervention
from reasonscope.steering.vectors.contrast import state_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """A departure and a number that it changes, as text."""

    departure: str
    number: str
    published: str
    ours: str


@dataclass(frozen=True, kw_only=True)
class Organism:
    """The model with what its methods learn from and are judged on."""

    model: Model
    run: Path
    learn: int
    n: int

    @cached_property
    def experiment(self) -> SteeringExperiment:
        return SteeringExperiment(self.model, ledgers(self.n, "test"), SAMPLING, on_given_text=False)

    def source(self, name: str) -> ExtractionData:
        return source_of(self.model, self.run, self.learn, name)

    def arms(self, uses: Mapping[str, tuple[VectorUse, float]]) -> dict[str, Arm]:
        """What each vector at its multiplier does."""
        conditions = [
            Condition(name=name, multiplier=strength, intervention=as_intervention([use], strength))
            for name, (use, strength) in uses.items()
        ]
        return dict(zip(uses, self.experiment.arms(conditions), strict=True))


def seal(organism: Organism) -> Iterator[Row]:
    source, site = organism.source("seal"), Site("resid_post", 3)
    vectors = {
        variant: extract_seal(source.store, site, ids=source.ids, variant=variant)
        for variant in ("published", "corrected")
    }
    published, ours = vectors["published"], vectors["corrected"]
    counts = {name: sum(vector.provenance["steps"].values()) for name, vector in vectors.items()}
    yield Row(
        departure="the region is the whole text unless the model is called DeepSeek, and not the thinking",
        number="steps that are compared",
        published=f"{counts['published']:,}",
        ours=f"{counts['corrected']:,}",
    )
    kinds = [
        [step.kind for trace in source.traces for step in steps(trace, variant=variant)]
        for variant in ("published", "corrected")
    ]
    yield Row(
        departure="a keyword is misspelt (“think differenly”)",
        number="transition steps",
        published=str(kinds[0].count("transition")),
        ours=str(kinds[1].count("transition")),
    )
    yield Row(
        departure="the vector is stored with the opposite sign, and applied with −1",
        number="its cosine with ours",
        published=f"{_cosine(published.directions[site], ours.directions[site]):.3f}",
        ours="1",
    )
    scope = Scope.thinking(organism.model, at_separators=True)
    arms = organism.arms(
        {
            "published": (VectorUse(vector=published, scope=scope), -1.0),
            "ours": (VectorUse(vector=ours, scope=scope), 1.0),
            "forgotten": (VectorUse(vector=published, scope=scope), 1.0),
        }
    )
    yield _steered("all of these", arms["published"], arms["ours"])
    yield _steered("the stored sign taken for the paper's: added with +1", arms["forgotten"], arms["ours"])


def asc(organism: Organism) -> Iterator[Row]:
    source, model, site = organism.source("asc-clamp"), organism.model, Site("resid_post", 3)
    pairs = [
        CompletionPair(
            question=brief.text[: brief.chars.open.start],
            concise=brief.text[brief.chars.open.start :],
            verbose=verbose.text[verbose.chars.open.start :],
        )
        for brief, verbose in mode_pairs(source.traces, verbose="default")
    ]
    twice = [replace(pair, verbose=pair.question + pair.verbose) for pair in pairs]
    ours, doubled = (extract_asc_from_pairs(model, given, [site]) for given in (pairs, twice))
    yield Row(
        departure="the verbose text holds its question twice",
        number="cosine of the vector with ours",
        published=f"{_cosine(doubled.directions[site], ours.directions[site]):.3f}",
        ours="1",
    )
    after = replace(ours, directions={Site("resid_post", 4): ours.directions[site]})
    scope = Scope(prompt_positions=(-1,), generation_window=(0, None))
    arms = organism.arms(
        {
            name: (VectorUse(vector=vector, scope=scope), strength)
            for name, vector, strength in (
                ("ours", ours, 1.0),
                ("subtracted", ours, -1.0),
                ("later", after, 1.0),
                ("twice", doubled, 1.0),
            )
        }
    )
    yield _steered("the verbose text holds its question twice", arms["twice"], arms["ours"])
    yield _steered("concise − verbose is subtracted", arms["subtracted"], arms["ours"])
    yield _steered("it is added one block after it was read", arms["later"], arms["ours"])


def speed(organism: Organism) -> Iterator[Row]:
    source, model = organism.source("speed"), organism.model
    (part,) = METHODS["speed"].parts(source)
    norms = part.vector.provenance["stream_norms"]
    monitored = [Site("resid_post", layer) for layer in range(model.n_layers - 1)]
    found: dict[Variant, list[NDArray[np.float64]]] = {"published": [], "corrected": []}
    for trace in source.traces[:20]:
        early, final = _lens(model, trace, monitored)
        for variant, values in found.items():
            values.append(layer_difference(early, final, variant=variant).double().numpy())
    means = {variant: np.concatenate(values) for variant, values in found.items()}
    yield Row(
        departure="the divergence swaps its arguments and is divided by the vocabulary",
        number="mean difference of the layers, nats",
        published=f"{means['published'].mean():.2g}",
        ours=f"{means['corrected'].mean():.2g}",
    )
    ranks = [np.argsort(np.argsort(means[variant])) for variant in ("published", "corrected")]
    yield Row(
        departure="the same",
        number="rank correlation over tokens with ours",
        published=f"{np.corrcoef(*ranks)[0, 1]:.2f}",
        ours="1",
    )
    vector = replace(part.vector, directions={at: u * norms[str(at)] for at, u in part.vector.directions.items()})
    conditions = []
    for variant in ("published", "corrected"):
        adaptive = AdaptiveSteering(
            model,
            vector,
            monitored=range(model.n_layers - 1),
            lowest=-0.15,
            highest=0.3,
            step=0.075,
            variant=variant,
        )
        conditions.append(Condition(name=variant, intervention=adaptive, processors=(adaptive,)))
    yield _steered("the same, steering adaptively up to .3 of the norm", *organism.experiment.arms(conditions))


def budget_guidance(organism: Organism) -> Iterator[Row]:
    source, model = organism.source("budget-guidance"), organism.model
    sites = [Site.parse(site) for site in source.store.sites]
    rows = [trace for trace in source.traces if trace.state == "closed"]
    yield Row(
        departure="truncated traces count in full, and are left out here",
        number="traces that the predictor learns from",
        published=str(len(source.traces)),
        ours=str(len(rows)),
    )
    trained = {}
    for name, how in {"published": {"epochs": 1, "learning_rate": 1e-4, "batch_size": 200}, "ours": {}}.items():
        trained[name] = train_predictor(source.store, sites, vocabulary=model.vocabulary, ids=source.ids, **how)
    yield Row(
        departure="one epoch at a rate of 10⁻⁴, a trace per batch, and not five at 10⁻³ (both with our small encoder)",
        number="loss of the predictor, nats",
        published=f"{trained['published'][1]:.2f}",
        ours=f"{trained['ours'][1]:.2f}",
    )
    shares = [_trusted(predictor, source.store, sites, rows[:40]) for predictor, _ in trained.values()]
    yield Row(
        departure="the same",
        number="share of the written tokens whose prediction is trusted",
        published=f"{shares[0]:.2f}",
        ours=f"{shares[1]:.2f}",
    )


def strength(organism: Organism) -> Iterator[Row]:
    source, model = organism.source("strength"), organism.model
    sites = [Site("resid_pre", layer) for layer in range(model.n_layers)]
    ours = extract_strength(source.store, sites, ids=source.ids)
    order = np.random.default_rng(0).permutation(model.n_layers)
    shuffled = {site: ours.directions[sites[at]] for site, at in zip(sites, order, strict=True)}
    arms = organism.arms(
        {
            name: (VectorUse(vector=vector, scope=Scope()), 0.8)
            for name, vector in (("published", replace(ours, directions=shuffled)), ("ours", ours))
        }
    )
    listed = ", ".join(map(str, order))
    yield _steered(f"vectors meet layers in the order of the file system (here {listed}); λ = .8", *arms.values())
    without = _half_without_level(source.store, source.ids, sites[-1])
    yield Row(
        departure="a problem of unknown level counts as level 3 (here every second one is made unknown)",
        number="norm of r̄ at the last block",
        published=f"{without[0]:.0f}",
        ours=f"{without[1]:.0f}, of those with a level",
    )
    first = {trace.problem.id: trace for trace in source.traces}
    states = np.array([state_of(source.store, trace, sites[-1], "prompt") for trace in first.values()])
    probe = Ridge(alpha=10.0).fit(states, [trace.n_thinking_tokens for trace in first.values()])
    effect = 0.2 * float(probe.coef_ @ ours.directions[sites[-1]])
    yield Row(
        departure="the intercept counts in a difference of predictions",
        number="tokens that a probe of the length expects of λ = .2",
        published=f"{effect + 0.2 * float(probe.intercept_):+.1f}",
        ours=f"{effect:+.1f}",
    )


def refusal(organism: Organism) -> Iterator[Row]:
    model = organism.model
    asked = load_problems("requests", split="train", n=96)
    sites = [f"resid_pre.{layer}" for layer in range(model.n_layers)]
    store = record(model, asked, organism.run / "asked", sites=sites, sampling=SAMPLING, batch_size=64)
    made, held_out = judged_halves(list(store))
    opens = made.following(answer_start)
    ends: dict[str, Callable[[list[Trace]], list[list[int]]]] = {
        "published": lambda traces: contexts(traces, lambda trace: trace.n_prompt_tokens),
        "ours": answer_contexts,
    }
    best = {}
    for name, cut in ends.items():
        candidates = refusal_candidates(model, cut(made.harmful), cut(made.harmless), n_positions=1)
        scores = refusal_scores(model, candidates, cut(held_out.harmful), cut(held_out.harmless), opens)
        best[name] = float(np.nanmax(scores.induce)), float(np.nanmin(scores.bypass))
    yield Row(
        departure="the direction is read after the prompt, and not after the closing tag",
        number="highest log-odds of a refusal that adding it gives (above 0: induces)",
        published=f"{best['published'][0]:.1f}",
        ours=f"{best['ours'][0]:.1f}",
    )
    judged = load_problems("requests:harmful", split="test", n=30)
    experiment = SteeringExperiment(model, judged, SAMPLING, on_given_text=False)
    sides = [answer_contexts(side) for half in (made, held_out) for side in (half.harmful, half.harmless)]
    chosen = extract_refusal(model, *sides, opens, prune_share=0.0)
    data = ExtractionData(model=model, store=store, ids=store.ids)
    projected = METHODS["refusal-ablate-published"].parts
    try:
        projected(data)
        last_fifth = "found"
    except ValueError:
        last_fifth = "none"
    yield Row(
        departure="the last fifth of the layers may not be chosen",
        number="layer of the direction",
        published=last_fifth,
        ours=", ".join(map(str, chosen.directions)) + " if it may",
    )
    ((_, direction),) = chosen.directions.items()
    clamp = METHODS["refusal-ablate"].parts(data)
    everywhere = _Everywhere(model, direction)
    arms = experiment.arms(
        [
            Condition(name="published", intervention=everywhere),
            Condition(name="ours", multiplier=1.0, intervention=as_intervention(clamp, 1.0)),
        ]
    )
    refused = [arm.measures["refused_harmful"] for arm in arms]
    yield Row(
        departure="that direction is projected out everywhere, and not clamped to the benign mean at the words that decide",
        number=f"share of {len(judged)} harmful requests refused",
        published=_number(refused[0].value, refused[0].interval),
        ours=_number(refused[1].value, refused[1].interval),
    )


def mi_peaks(organism: Organism) -> Iterator[Row]:
    source, site = organism.source("seal"), Site("resid_post", 5)
    traces = [trace for trace in source.traces if trace.n_thinking_tokens > 40][:20]
    golds = representations(organism.model, [gold_text(trace) for trace in traces], [site])
    off, exact, peaks, generated, tops = [], [], [], [], []
    for trace, gold in zip(traces, golds, strict=True):
        hidden = {site: source.store.activations(trace.id, str(site))}
        found = mi_of_trace(trace, hidden, gold, n_permutations=40)
        rows = emitting_rows(trace)
        dense = _dense_float32(np.asarray(hidden[site][rows], dtype=np.float32)[::10], gold[site])
        off.append(np.abs(dense - found.values[0, ::10]).max())
        exact.append(np.abs(found.values[0]).mean())
        peaks.append(found.arrays["peaks"][0].mean())
        tops.append(found.arrays["top"][0].mean())
        all_written = mi_of_trace(trace, hidden, gold, region="generated", n_permutations=40)
        generated.append(all_written.values[0].mean())
    yield Row(
        departure="dense kernels in float32, and not of low rank in float64",
        number=f"largest difference (mean value {np.mean(exact):.2f})",
        published=f"{np.max(off):.2g}",
        ours="0",
    )
    yield Row(
        departure="the 20 highest tokens of every trace are peaks, and not those above Q3 + 1.5 IQR",
        number="share of tokens that are peaks",
        published=f"{np.mean(tops):.3f}",
        ours=f"{np.mean(peaks):.3f}",
    )
    yield Row(
        departure="the first 512 generated tokens are read, and not the thinking",
        number="mean value",
        published=f"{np.mean(generated):.2f}",
        ours=f"{np.mean(exact):.2f}",
    )


def anchors(organism: Organism) -> Iterator[Row]:
    source, model = organism.source("seal"), organism.model
    traces = [trace for trace in source.traces if trace.correct and 60 < trace.n_thinking_tokens < 200]
    yield _receivers(model, traces[:12])
    yield _suppressed(model, traces[:6])
    yield from _likeliest_tokens_alone(model, traces[:12])
    yield _after_the_projection(model, traces[:40])
    cut = [
        [len(sentences(trace, splitter=how)) for trace in source.traces]
        for how in ("thought_anchors_published", "thought_anchors")
    ]
    yield Row(
        departure="a last piece that no stop closes is dropped",
        number=f"sentences of {len(source.traces)} traces",
        published=f"{sum(cut[0]):,}",
        ours=f"{sum(cut[1]):,}",
    )
    few = Allotment(least=16, step=16, half_width=0.01, most=16)
    decode, warm = model.decode, replace(SAMPLING, temperature=1.0)
    tables: dict[str, list[NDArray[np.float64]]] = {"published": [], "corrected": []}
    longest = sorted(source.traces, key=lambda trace: trace.n_thinking_tokens)
    for trace in [trace for trace in longest if trace.correct and trace.n_thinking_tokens < 260][-2:]:
        own = sentences(trace)
        written = resample(PrefixWriter(model), trace, own, decode, warm, allotment=few)
        for name, how in {
            "published": Convention(variant="published"),
            "corrected": Convention(),
        }.items():
            found = anchors_of_trace(trace, own, written, convention=how, n_permutations=5)
            labels = found.axes[0].labels
            tables[name].append(
                np.stack([found.values[labels.index(of)] for of in ("resampling_kl", "counterfactual_accuracy")])
            )
    numbers = {name: np.concatenate(table, axis=1) for name, table in tables.items()}
    yield Row(
        departure="10⁻⁹ is added to every count of an answer, and not 1",
        number="mean resampling KL, nats (16 rollouts per sentence)",
        published=f"{np.nanmean(numbers['published'][0]):.2f}",
        ours=f"{np.nanmean(numbers['corrected'][0]):.2f}",
    )
    yield Row(
        departure="counterfactual accuracy is without − with, all others with − without",
        number="the largest of a sentence",
        published=f"{_largest(numbers['published'][1]):+.2f}",
        ours=f"{_largest(numbers['corrected'][1]):+.2f}",
    )
    yield Row(
        departure="a comparison with an empty side is 0, and not undefined",
        number="undefined counterfactual accuracies",
        published=str(int(np.isnan(numbers["published"][1]).sum())),
        ours=f"{int(np.isnan(numbers['corrected'][1]).sum())} of {numbers['corrected'].shape[1]}",
    )


def bert_base(organism: Organism) -> Iterator[Row]:
    """The predictor of budget guidance with the encoder of the paper, trained by its schedule, in bfloat16; half an hour on one core."""
    source = organism.source("budget-guidance")
    model, sites = organism.model, [Site.parse(site) for site in source.store.sites]
    traces = [trace for trace in source.traces if trace.state == "closed"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        large = LengthPredictor(model.d_model, model.vocabulary, width=768, depth=12, heads=12)
        loss = _one_epoch(large, source.store, sites, traces)
    small, of_small = train_predictor(
        source.store, sites, vocabulary=model.vocabulary, ids=source.ids, epochs=1, learning_rate=1e-4, batch_size=200
    )
    departure = "the encoder is BERT-base (from random weights), and not two layers of width 128; both by the published schedule"
    yield Row(
        departure=departure, number="loss of the predictor, nats", published=f"{loss:.2f}", ours=f"{of_small:.2f}"
    )
    shares = [_trusted(one, source.store, sites, traces[:40]) for one in (large.eval(), small)]
    yield Row(
        departure="the same",
        number="share of the written tokens whose prediction is trusted",
        published=f"{shares[0]:.2f}",
        ours=f"{shares[1]:.2f}",
    )


METHODS_BESIDE: Mapping[str, Callable[[Organism], Iterator[Row]]] = {
    "SEAL": seal,
    "MI peaks": mi_peaks,
    "Thought anchors": anchors,
    "Refusal direction": refusal,
    "Thinking speed": speed,
    "ASC": asc,
    "Budget guidance": budget_guidance,
    "BERT-base": bert_base,
    "Strength planning": strength,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/arms"), help="what the methods learn from; recorded once"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/published.json"))
    parser.add_argument("--only", nargs="*", default=[*METHODS_BESIDE], choices=[*METHODS_BESIDE])
    parser.add_argument("--learn", type=int, default=64, help="ledgers that the vectors are made from")
    parser.add_argument("--n", type=int, default=40, help="ledgers that they are judged on")
    given = parser.parse_args()
    organism = Organism(model=load_model("organism"), run=given.run, learn=given.learn, n=given.n)
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    for name in given.only:
        if name not in known:
            known[name] = [asdict(row) for row in METHODS_BESIDE[name](organism)]
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(known, ensure_ascii=False, indent=1), encoding="utf-8")
    sys.stdout.write("\n".join(_table(known)))


def _table(known: Mapping[str, list[dict[str, str]]]) -> Iterator[str]:
    for name, rows in known.items():
        yield f"### {name}\n"
        yield "| the published code | number | published | ours |"
        yield "| --- | --- | --- | --- |"
        for row in rows:
            both = " | ".join(row[side].replace("-", "−") for side in ("published", "ours"))
            yield f"| {row['departure']} | {row['number']} | {both} |"
        yield ""


def _steered(departure: str, published: Arm, ours: Arm) -> Row:
    def told(arm: Arm) -> str:
        change = f"{100 * arm.change.value:+.1f} % ({100 * arm.change.low:.1f} to {100 * arm.change.high:.1f})"
        return f"{change}, {arm.differences['accuracy'].value:+.3f}"

    number = "change of thinking tokens, of accuracy"
    return Row(departure=departure, number=number, published=told(published), ours=told(ours))


def _number(value: float, ends: tuple[float, float]) -> str:
    return f"{value:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


def _largest(values: NDArray[np.float64]) -> float:
    """The one that is farthest from 0."""
    return float(values[np.nanargmax(np.abs(values))])


def _cosine(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def _lens(model: Model, trace: Trace, monitored: list[Site]) -> tuple[torch.Tensor, torch.Tensor]:
    """The next-token logits of the monitored layers (layer, token, vocab) and of the last one (token, vocab), along the thinking."""
    ids, mask = left_padded([trace.token_ids.tolist()], model.device)
    seen = model.backend.forward(ids, mask=mask, read=tuple(monitored))
    rows = emitting_rows(trace)
    norm, unembedding = model.hf.get_submodule(model.layout.final_norm), Unembedding.of(model)
    with torch.no_grad():
        early = torch.stack([unembedding.logits(norm(seen.activations[site][0, rows])) for site in monitored])
    return early.float(), seen.logits[0, rows].detach().float()


def _half_without_level(store: TraceStore, ids: list[str], site: Site) -> tuple[float, float]:
    """The norm of r̄ if every second problem has no level: all at level 3, or left out."""
    first = {trace.problem.id: trace for trace in (store.trace(id) for id in ids)}
    states = np.array([state_of(store, trace, site, "prompt") for trace in first.values()])
    levels = np.array([float(trace.problem.difficulty or 0) for trace in first.values()])
    known = np.arange(len(levels)) % 2 == 0

    def norm(states: NDArray[np.float64], levels: NDArray[np.float64]) -> float:
        lowest, *others = np.unique(levels)
        means = [states[levels == one].mean(axis=0) - states[levels == lowest].mean(axis=0) for one in others]
        return float(np.linalg.norm(np.mean(means, axis=0)))

    return norm(states, np.where(known, levels, 3.0)), norm(states[known], levels[known])


class _Everywhere:
    """A direction projected out of everything that is written to the stream, as an intervention."""

    def __init__(self, model: Model, direction: NDArray[np.floating]) -> None:
        self.edits = ablated_everywhere(model, direction)
        self.n_edited = 1

    def on_step(self, step: object) -> None:
        """Nothing to follow: every token is edited."""

    def begin(self, n_prompt: object) -> None:
        """Nothing to follow."""


def _dense_float32(rows: NDArray[np.float32], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """tr(R_x R_y) with d × d matrices in float32, as the published code computes it."""

    def factor(values: torch.Tensor) -> torch.Tensor:
        d = len(values)
        kernel = torch.exp(-((values[:, None] - values[None]) ** 2) / (2 * SIGMA**2))
        centring = torch.eye(d) - 1 / d
        centred = centring @ kernel @ centring
        return centred @ torch.linalg.inv(centred + EPSILON * d * torch.eye(d))

    right = factor(torch.from_numpy(np.asarray(target, dtype=np.float32)))
    return np.array([float((factor(torch.from_numpy(row)) * right.T).sum()) for row in rows])


def _receivers(model: Model, traces: list[Trace]) -> Row:
    told = []
    for depth_control, from_layer in ((False, 0), (True, 1)):
        found = receiver_heads(model, traces, depth_control=depth_control)
        told.append(", ".join(map(str, top_heads(found.values, 4, from_layer=from_layer))))
    return Row(
        departure="vertical scores are not controlled for depth by default, and block 0 counts",
        number="the four receiver heads",
        published=told[0],
        ours=told[1],
    )


def _suppressed(model: Model, traces: list[Trace]) -> Row:
    """The effect of a sentence on the next one, judged where its tokens are predicted, and one token later as released."""
    ours, later = [], []
    for trace in traces:
        spans = [sentence.tokens for sentence in sentences(trace) if len(sentence.tokens)]
        members = torch.zeros(len(spans) - 1, len(trace.token_ids), dtype=torch.bool)
        for index, span in enumerate(spans[:-1]):
            members[index, span.slice] = True
        found = Untouched.of(model, trace.token_ids.tolist()).divergences(members, temperature=0.6, batch=8)
        for i, target in enumerate(spans[1:]):
            ours.append(found[i, target.start - 1 : target.stop - 1].mean())
            later.append(found[i, target.start : target.stop].mean())
    return Row(
        departure="a suppressed sentence is judged one token late",
        number="mean KL of the next sentence, nats",
        published=f"{np.mean(later):.3f}",
        ours=f"{np.mean(ours):.3f}",
    )


def _likeliest_tokens_alone(model: Model, traces: list[Trace]) -> Iterator[Row]:
    """Suppression with the stored logits of the released code in place of whole distributions."""
    ours = [suppression_matrix(model, trace, n_controls=0) for trace in traces]
    with patch.object(suppression, "kl_from_hidden", _kl_of_stored_logits):
        published = [suppression_matrix(model, trace, n_controls=0) for trace in traces]
    kl = [np.concatenate([one.arrays["kl"][np.isfinite(one.values)] for one in found]) for found in (published, ours)]
    departure = (
        "suppression stores the 100 likeliest tokens, at most .9999 of the probability; the others have a logit of −10⁹"
    )
    yield Row(
        departure=departure,
        number="mean and median KL of two sentences, nats",
        published=f"{kl[0].mean():.3g}, {np.median(kl[0]):.3g}",
        ours=f"{kl[1].mean():.3g}, {np.median(kl[1]):.3g}",
    )
    alike = [
        spearmanr(*(one.values[np.isfinite(ours.values)] for one in (theirs, ours)))[0]
        for theirs, ours in zip(published, ours, strict=True)
    ]
    yield Row(
        departure="the same",
        number="rank correlation with ours over pairs of sentences, mean of the traces",
        published=f"{np.mean(alike):.2f}",
        ours="1",
    )


def _kl_of_stored_logits(
    unembedding: Unembedding, hidden: torch.Tensor, other: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    p, q = (_stored(unembedding.logits(states)).double() / temperature for states in (hidden, other))
    left, right = p.log_softmax(-1), q.log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1).clamp(min=0)


def _stored(logits: torch.Tensor) -> torch.Tensor:
    """The logits that the released code keeps of a position, in float16; −10⁹ for all others."""
    likeliest, order = logits.sort(dim=-1, descending=True)
    probability = likeliest.softmax(-1)
    outside = probability.cumsum(-1) - probability >= 0.9999
    outside[..., 100:] = True
    kept = likeliest.half().float().masked_fill(outside, -1e9)
    return torch.empty_like(logits).scatter(-1, order, kept)


def _after_the_projection(model: Model, traces: list[Trace]) -> Row:
    """Four heads zeroed before the output projection, and the slices of its output that the released code takes for them."""
    heads = top_heads(receiver_heads(model, traces[:12]).values, 4)
    spans = {"thinking": lambda trace: trace.tokens.thinking}
    readers = [
        logits_function(model, _Slices(model, heads)),
        logits_function(model, AblationIntervention(model, Ablation(name="", heads=tuple(heads)))),
    ]
    of_each = [found["thinking"] for found in divergences(model, traces, readers, spans)]
    published, ours = (found.kl.sum() / found.n_tokens.sum() for found in of_each)
    return Row(
        departure="heads are zeroed after the output projection, as slices of its output, and not before it",
        number=f"KL of the next token without heads {', '.join(map(str, heads))}, nats",
        published=f"{published:.3f}",
        ours=f"{ours:.3f}",
    )


class _Slices:
    """Zeroes the slices of the attention output that have the places of `heads`, as an intervention."""

    def __init__(self, model: Model, heads: Sequence[Head]) -> None:
        width = model.d_model // model.n_heads
        self.n_edited = 1
        self._columns = {
            Site("attn_out", layer): [slice(h.index * width, (h.index + 1) * width) for h in heads if h.layer == layer]
            for layer in {head.layer for head in heads}
        }

    @property
    def edits(self) -> dict[Site, Callable[[torch.Tensor, object], torch.Tensor]]:
        return {site: partial(_zeroed, columns=columns) for site, columns in self._columns.items()}

    def on_step(self, step: object) -> None:
        """Nothing to follow: every token is edited."""

    def begin(self, n_prompt: object) -> None:
        """Nothing to follow."""


def _zeroed(activation: torch.Tensor, _: object, *, columns: list[slice]) -> torch.Tensor:
    after = activation.clone()
    for column in columns:
        after[..., column] = 0
    return after


def _one_epoch(predictor: LengthPredictor, store: TraceStore, sites: Sequence[Site], traces: Sequence[Trace]) -> float:
    """One trace per step at a rate of 10⁻⁴; the mean loss while it trains, as `train_predictor` says it."""
    optimiser, total, n = torch.optim.AdamW(predictor.parameters(), lr=1e-4), 0.0, 0
    for at in torch.randperm(len(traces)).tolist():
        states, following, left = _to_close(store, sites, traces[at])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            shape, rate = predictor(states)
        picked = (one.float().gather(1, following[:, None])[:, 0] for one in (shape, rate))
        loss = negative_log_density(*picked, left).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimiser.step()
        total, n = total + float(loss.detach()) * len(left), n + len(left)
    return total / n


def _to_close(
    store: TraceStore, sites: Sequence[Site], trace: Trace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The states before each token of the thinking and of its end (token, site, d_model), these tokens, and how many are left from each."""
    start, stop = trace.tokens.thinking.start, trace.tokens.thinking.stop + 1
    rows = np.stack([store.activations(trace.id, str(site))[start - 1 : stop - 1] for site in sites], axis=1)
    left = torch.arange(stop - start, 0, -1, dtype=torch.float32)
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(trace.token_ids[start:stop]), left


def _trusted(predictor: LengthPredictor, store: TraceStore, sites: Sequence[Site], traces: Sequence[Trace]) -> float:
    """The share of the written tokens whose prediction is trusted."""
    kept = []
    for trace in traces:
        states, following, _ = _to_close(store, sites, trace)
        with torch.no_grad():
            shape, rate = predictor(states)
        kept.append(TRUST.kept(shape, rate).gather(1, following[:, None])[:, 0])
    return float(torch.cat(kept).float().mean())


if __name__ == "__main__":
    main()
