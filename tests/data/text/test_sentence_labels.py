import json
import random
from collections import Counter

import pytest

from reasonscope.data.organism.ledger import sample_ledger
from reasonscope.data.organism.reader import read_ledger, read_request
from reasonscope.data.organism.requests import sample_request
from reasonscope.data.organism.writer import write_ledger, write_request
from reasonscope.data.text.sentence_labels import TAGS, label_sentences


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
        ("Final answer", "final_answer_emission"),
        ("I think the answer is to be found.", "fact_retrieval"),
        ("The answer is 4.", "final_answer_emission"),
        ("But wait, I should verify it.", "uncertainty_management"),
        ("Wait, I should check it, because it is odd.", "uncertainty_management"),
        ("Let's go through it.", "self_checking"),
        ("Yes, it is.", "self_checking"),
        ("So it matches the sum.", "result_consolidation"),
        ("It is all correct", "fact_retrieval"),
        ("It is all correct, I see.", "self_checking"),
        ("They match.", "self_checking"),
        ("The user wants a sum.", "problem_setup"),
        ("This is a hard problem here.", "problem_setup"),
        ("I am not sure of this.", "uncertainty_management"),
        ("But hold on a moment.", "uncertainty_management"),
        ("It has eight sides, right?", "uncertainty_management"),
        ("Here I recall that 3 + 4 = 7.", "fact_retrieval"),
        ("Alternatively, there is the fact.", "fact_retrieval"),
        ("So the theorem says it.", "fact_retrieval"),
        ("Okay, let me see if I can compute it.", "active_computation"),
        ("Okay, I'll do the second part.", "plan_generation"),
        ("Alternatively, go there.", "plan_generation"),
        ("Multiplying both.", "active_computation"),
        ("It follows by plugging it in.", "active_computation"),
        ("The sum was 4 plus 3.", "active_computation"),
        ("So x = 4.", "result_consolidation"),
        ("So this holds.", "result_consolidation"),
        ("Therefore it becomes 4.", "result_consolidation"),
        ("So it holds.", "fact_retrieval"),
        ("Here y = mx.", "fact_retrieval"),
    ],
)
def test_plain_cases(text, tag):
    assert label_sentences(["A start.", text])[1] == tag


def test_calculations_after_an_announced_check_are_part_of_it():
    texts = ["12 + 3 = 15.", "Wait, let me verify the sum:", "12 + 3 = 15.", "So the sum is 15.", "15 + 1 = 16."]
    assert label_sentences(texts) == [
        "active_computation",
        "self_checking",
        "self_checking",
        "result_consolidation",
        "active_computation",
    ]


def test_a_formula_goes_with_what_came_before():
    assert label_sentences(["A start.", "I will use a line.", "y = mx", "y = mx"])[2:] == ["plan_generation"] * 2
    assert label_sentences(["A start.", "12 * 3 = 36", "y = mx"])[2] == "fact_retrieval"


def test_the_task_is_set_up_in_what_the_thinking_opens_with():
    opening = ["I need to find it.", "Then compute the rest.", "Then evaluate the rest.", "Then evaluate the rest."]
    assert label_sentences(opening)[:3] == ["problem_setup"] * 3 and label_sentences(opening)[3] != "problem_setup"
    assert label_sentences(["It rains.", "I need to find it."])[1] == "plan_generation"


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
