"""Anchors with a writer whose answers depend on one known sentence; forced answers and confidence on the organism."""

from types import SimpleNamespace

import numpy as np
import pytest

from reasonscope.analysis.anchors.allotment import Allotment
from reasonscope.analysis.anchors.rollouts import Continuation, anchors_of_trace, resample
from reasonscope.analysis.anchors.similarity import tfidf
from reasonscope.analysis.statistics import dependency_agreement
from reasonscope.analysis.tokens.confidence import confidence_of_trace
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.intervals import wilson_half_width
from reasonscope.data.organism.truth import true_sentences
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.branches import PrefixWriter
from reasonscope.probes.generation.decoding import Completion
from reasonscope.probes.generation.forced_answers import _boxed_answer, closing_stub, forced_answers
from reasonscope.probes.generation.rollout import rollouts
from reasonscope.probes.models.model import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def trace(model):
    found = rollouts(model, load_problems("ledger", n=6, seed=5), Sampling(temperature=0.0, max_new_tokens=400))
    return next(t for t in found if t.state == "closed" and len(true_sentences(t)[0]) >= 5)


def speaks(text):
    """A decoder that turns a writer's fake ids back into what it said."""
    return lambda ids: "".join(text[i] for i in ids)


class Hanging:
    """A writer whose answer is right iff sentence 2 is kept; what it says is a lookup table, so that nothing is random but a coin."""

    def __init__(self, cuts, gold):
        self.cuts, self.said, self.asked = cuts, [], 0
        self.gold = gold

    def __call__(self, ids, branches, sampling):
        done = []
        for branch in branches:
            self.asked += 1
            kept = self.cuts.index(branch.cut)
            right = kept > 2 or branch.seed % 4 == 0
            text = f"Something new {branch.seed % 5}. So it goes.\n</think>\n\n\\boxed{{{self.gold if right else 'x'}}}"
            self.said.append(text)
            token_ids = np.array([*ids[: branch.cut], len(self.said) - 1])
            done.append(
                Completion(
                    token_ids=token_ids,
                    n_prompt_tokens=branch.cut,
                    finish_reason="stop",
                    logprobs=np.zeros(1, np.float32),
                    entropies=np.zeros(1, np.float32),
                )
            )
        return done


def test_the_sentence_that_the_answer_depends_on_stands_out_and_rollouts_are_saved(trace):
    known, _ = true_sentences(trace)
    cuts = [s.tokens.start for s in known] + [known[-1].tokens.stop]
    writer = Hanging(cuts, trace.problem.answer)
    plan = Allotment(least=16, most=60, step=10, half_width=0.12)
    continued = resample(writer, trace, known, speaks(writer.said), Sampling(seed=1), allotment=plan)
    sizes = [len(continued[i]) for i in range(len(cuts))]
    assert max(sizes[:3]) > 30 and sizes[3:] == [16] * len(sizes[3:]) and writer.asked == sum(sizes)
    found = anchors_of_trace(trace, known, continued, n_permutations=60)
    effect = found.at(metric="resampling_accuracy")
    at = found.axis("metric").labels.index("resampling_accuracy")
    assert np.argmax(effect) == 2 and effect[2] > found.null.high[at, 2] and found.interval.low[at, 2] > 0
    assert np.abs(effect[3:]).max() == 0 and found.numbers["rollouts"] == sum(sizes)
    assert found.arrays["effects"].shape == (len(known),) * 2


def test_rollouts_that_never_answer_and_too_few_sentences_are_states(trace):
    known, _ = true_sentences(trace)
    silent = [SimpleNamespace(sentences=("Hm.",), answer=None, n_tokens=3)] * 4
    found = anchors_of_trace(trace, known, dict.fromkeys(range(len(known) + 1), silent), n_permutations=5)
    assert not found.measured and found.reason == "no rollout gave an answer"
    assert "two sentences" in anchors_of_trace(trace, known[:1], {}).reason


def test_a_model_that_writes_the_same_again_changes_nothing(trace):
    known, _ = true_sentences(trace)
    texts = [s.text for s in known]
    same = {
        i: [Continuation(sentences=tuple(texts[i:]), answer=trace.final_answer, n_tokens=9)] * 4
        for i in range(len(known) + 1)
    }
    found = anchors_of_trace(trace, known, same, n_permutations=5)
    assert found.numbers["similarity_threshold"] < 1
    assert not found.at(metric="different_fraction").any()
    assert anchors_of_trace(trace, known, same, threshold=0.0, n_permutations=5).numbers["similarity_threshold"] == 0


def test_an_allotment_stops_where_it_knows_enough():
    plan = Allotment()
    assert plan.wanted(0, 0) == 20 and plan.wanted(20, 20) == 0 and plan.wanted(10, 20) == 10
    assert plan.wanted(50, 100) == 0 and Allotment(half_width=0.05).wanted(48, 95) == 5
    assert Allotment.fixed(7).wanted(0, 7) == 0 and Allotment.fixed(7).wanted(0, 0) == 7
    assert wilson_half_width(50, 100) == pytest.approx(0.0962, abs=1e-3)
    with pytest.raises(InputError, match="least <= most"):
        Allotment(least=9, most=3)


def test_sentences_are_like_themselves_and_numbers_count():
    texts = ["So 3 + 4 = 7.", "So 3 + 4 = 8.", "The shop is shut."]
    rows = tfidf(texts)(texts)
    cosines = rows @ rows.T
    np.testing.assert_allclose(np.diag(cosines), 1)
    assert cosines[0, 1] < 1 - 0.05 and cosines[0, 1] > cosines[0, 2]
    with pytest.raises(InputError, match="no sentence"):
        tfidf(["", " "])


def test_forced_answers_read_the_box_and_share_the_prefix(model, trace):
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    stub = closing_stub(trace, encode, thinking=model.thinking)
    assert model.tokenizer.decode(list(stub)).endswith("The answer is \\boxed{")
    cuts = [trace.tokens.thinking.start, trace.tokens.thinking.stop]
    found = forced_answers(PrefixWriter(model), trace, cuts, stub, model.tokenizer.decode)
    assert found.answers[1][0] == trace.final_answer and found.own[1] == 1
    assert _boxed_answer("\\boxed{\\frac{1}{2}} and more") == "\\frac{1}{2}" and _boxed_answer("\\boxed{12") is None
    with pytest.raises(InputError, match="greedy"):
        forced_answers(PrefixWriter(model), trace, cuts, stub, model.tokenizer.decode, samples=2)
    result = confidence_of_trace(
        PrefixWriter(model), trace, stub, model.tokenizer.decode, parts=4, samples=3, foreign="-1"
    )
    assert result.values.shape == (5,) and result.values[-1] == 1 and result.null.high.max() == 0
    same = f"{trace.final_answer}.0"  # another way to write the answer
    result = confidence_of_trace(
        PrefixWriter(model), trace, stub, model.tokenizer.decode, parts=4, samples=3, foreign=same
    )
    np.testing.assert_array_equal(result.null.high, result.values)


def test_true_dependencies_are_known_of_the_organism(trace):
    known, truth = true_sentences(trace)
    assert len(known) == len(truth) and any(truth)
    oracle = np.random.default_rng(0).random((len(known),) * 2) * 0.1
    for target, sources in enumerate(truth):
        oracle[target, list(sources)] += 1
    assert dependency_agreement(oracle, truth).above_null
