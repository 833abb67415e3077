"""Replacing a sentence moves what depends on it and nothing else; replacing it by itself changes nothing."""

import random

import numpy as np
import pytest

from reasonscope.analysis.anchors.replacement import replacement_effects, resampled_alternatives
from reasonscope.analysis.anchors.rollouts import Continuation
from reasonscope.analysis.organism import wrong_statements
from reasonscope.analysis.statistics import dependency_agreement
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.problems import ledger_of
from reasonscope.data.organism.truth import true_sentences
from reasonscope.data.organism.writer import write_ledger
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Problem
from reasonscope.probes.models.model import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("organism")


@pytest.fixture(scope="module")
def trace(model):
    """What the grammar writes about a ledger of three steps."""
    problem = next(p for p in load_problems("ledger", n=60, seed=5) if p.difficulty == 3)
    writing = write_ledger(ledger_of(problem), "default", random.Random(0))
    prompt = model.tokenizer_backend.decode(model.encode_prompt(problem), skip_special_tokens=False)
    completion = f"<think>\n{writing.thinking}\n</think>\n\n{writing.answer}"
    return trace_from_text(
        id="a/0", problem=problem, prompt=prompt, completion=completion, tokenizer=model.tokenizer_backend
    )


def effects(model, trace, known, alternatives):
    return replacement_effects(model, trace, known, alternatives)


def test_wrong_numbers_find_the_true_dependencies(model, trace):
    known, truth = true_sentences(trace)
    wrong = wrong_statements(known)
    assert all(text != known[i].text.strip() for i, texts in wrong.items() for text in texts)
    found = effects(model, trace, known, wrong)
    assert dependency_agreement(found.values, truth).above_null
    stated = [i for i, texts in wrong.items() if texts]
    assert (
        np.isfinite(found.values[-1, stated[0]]) and np.isnan(np.triu(found.values)[np.triu_indices(len(known))]).all()
    )
    assert found.numbers["replaced"] == [len(wrong[i]) for i in range(len(known))] and found.null.high[0, 0] > 0


def test_a_sentence_in_its_own_place_changes_nothing(model, trace):
    known, _ = true_sentences(trace)
    found = effects(model, trace, known, {3: (known[3].text,)})
    assert np.nanmax(found.values) == pytest.approx(0, abs=1e-6) and np.isfinite(found.values).sum() == len(known) - 4


def test_alternatives_are_what_was_written_first_and_differs(trace):
    known, _ = true_sentences(trace)
    own = known[0].text
    first = [Continuation(sentences=(text,), answer=None, n_tokens=1) for text in ("Hm.", own, "No.", "No.", " " + own)]
    assert resampled_alternatives(known, {0: first})[0] == ("No.", "Hm.")
    assert resampled_alternatives(known, {})[1] == ()


def test_nothing_to_replace_is_a_state_and_text_alone_an_error(model, trace):
    known, _ = true_sentences(trace)
    assert "no sentence has an alternative" in effects(model, trace, known, {}).reason
    assert "two sentences" in effects(model, trace, known[:1], {0: ("x",)}).reason
    text = trace_from_text(id="t", problem=Problem(id="t", prompt="p"), prompt="p", completion=trace.text)
    with pytest.raises(InputError, match="no tokens"):
        effects(model, text, known, {0: ("x",)})
