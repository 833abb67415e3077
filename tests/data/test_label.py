import json
import random
from collections import Counter

import pytest

from reasonscope.data.label import TAGS, label_sentences
from reasonscope.data.organism.ledger import sample_ledger
from reasonscope.data.organism.reader import read_ledger, read_request
from reasonscope.data.organism.requests import sample_request
from reasonscope.data.organism.writer import write_ledger, write_request


def _written(rng: random.Random, i: int):
    """A thinking that the grammar wrote, and its truth."""
    if i % 3 == 0:
        request = sample_request(rng, split="train", harmful=i % 2 == 0, jailbreak=i % 4 == 0)
        thinking = write_request(request, rng).thinking
        return thinking, read_request(request, thinking)
    ledger = sample_ledger(rng, split="train")
    thinking = write_ledger(ledger, ("default", "brief", "detail")[i % 5 % 3], rng).thinking
    return thinking, read_ledger(ledger, thinking)


def test_the_grammar_of_the_organism_is_labelled_right():
    rng = random.Random(0)
    right = seen = 0
    kinds = Counter()
    for i in range(120):
        thinking, truth = _written(rng, i)
        tags = label_sentences([thinking[sentence.chars.slice] for sentence in truth])
        right += sum(sentence.tag == tag for sentence, tag in zip(truth, tags, strict=True))
        seen += len(truth)
        kinds.update(sentence.tag for sentence in truth)
    assert set(kinds) == set(TAGS)
    assert right / seen >= 0.95, f"{right} of {seen}"


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("Let me break this down step by step.", "plan_generation"),
        ("I remember that the area of a circle is pi r squared.", "fact_retrieval"),
        ("12 * 3 = 36", "active_computation"),
        ("Wait, that doesn't make sense.", "uncertainty_management"),
        ("Let me double-check the sum.", "self_checking"),
        ("So the total is 36.", "result_consolidation"),
        (r"So it is \boxed{36}.", "final_answer_emission"),
        ("The problem asks for the total.", "problem_setup"),
    ],
)
def test_plain_cases(text, tag):
    assert label_sentences(["A start.", text])[1] == tag


def test_calculations_behind_an_announced_check_are_part_of_it():
    texts = ["12 + 3 = 15.", "Wait, let me verify the sum:", "12 + 3 = 15.", "So the sum is 15.", "15 + 1 = 16."]
    assert label_sentences(texts) == [
        "active_computation",
        "self_checking",
        "self_checking",
        "result_consolidation",
        "active_computation",
    ]


def test_no_sentence_at_all():
    assert label_sentences([]) == []
    assert label_sentences([""]) == ["fact_retrieval"]


def test_agreement_with_the_published_tags(real_traces, capsys):
    """Prints it: the number is reported, and asserted only not to fall apart."""
    published, ours = [], []
    for path in sorted(real_traces.rglob("chunks_labeled.json")):
        chunks = json.loads(path.read_text())
        published += [chunk["function_tags"][0] for chunk in chunks]
        ours += label_sentences([chunk["chunk"] for chunk in chunks])
    n = len(published)
    agreement = sum(a == b for a, b in zip(published, ours, strict=True)) / n
    first, second = Counter(published), Counter(ours)
    chance = sum(first[tag] * second[tag] for tag in TAGS) / n**2
    kappa = (agreement - chance) / (1 - chance)
    with capsys.disabled():
        print(f"\nsentence tags: agreement {agreement:.3f}, Cohen's kappa {kappa:.3f} on {n} published sentences")  # noqa: T201
    assert agreement > 0.65 and kappa > 0.55
