"""The organism's language: what the grammar writes it can read back, with the truth that it knows."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import jinja2
import pytest

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.organism.corpus import base_documents, batches, reasoning_documents, tokenizer_texts
from reasonscope.data.organism.forms import BY_KIND, FORMS, recognise
from reasonscope.data.organism.ledger import MODES, SPLITS, Ledger, Line, Operation, sample_ledger
from reasonscope.data.organism.problems import ledger_of, ledger_problem, request_of, request_problem
from reasonscope.data.organism.reader import read_ledger, read_request, read_steps
from reasonscope.data.organism.requests import Request, sample_request
from reasonscope.data.organism.tokenizer import (
    CHAT_TEMPLATE,
    THINK_CLOSE,
    THINK_OPEN,
    VOCABULARY,
    chat,
    train_tokenizer,
)
from reasonscope.data.organism.truth import reference_solution, true_sentences, truths
from reasonscope.data.organism.writer import write_ledger, write_request
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.sentence_labels import TAGS, label_sentences
from reasonscope.data.text.sentence_splitter import split_sentences
from reasonscope.data.text.steps_and_sentences import classify_step, sentences
from reasonscope.data.trace import Problem

TWO_STEPS = Ledger(
    start=14,
    lines=(
        Line(text="Ann pays in 8.", name="Ann", event="add"),
        Line(text="It rains all day."),
        Line(text="Bob spends 5.", name="Bob", event="subtract"),
        Line(text="Carl adds 2.", name="Carl", event="add"),
    ),
    closed=3,
    operations=(
        Operation(line=0, left=14, sign="+", a=8, right=22),
        Operation(line=2, left=22, sign="-", a=5, right=17),
    ),
)
THINKING = (
    "Simple, I need just a step or two. The question asks for the balance when the ledger closes. The ledger starts at 14.\n\n"
    "First, Ann pays in 8. 14 + 8 = 25.\n\n"
    "Wait, let me check that: 25 - 8 = 17, it was 14. No, 25 is wrong. Again: 14 + 8 = 22.\n\n"
    "Next, Bob spends 5. 22 - 5 = 17.\n\n"
    "Alternatively, I can split 5 into 2 and 3. 22 - 2 = 20 and 20 - 3 = 17. That gives 17 as well.\n\n"
    "So the ledger closes at 17. The final answer is 17."
)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(tokenizer_texts(0, 300))


def test_the_shipped_organism_speaks_this_language():
    """Its weights were trained on these sentences, to the letter: with another wording it would have to be trained anew."""
    shipped = TraceStore.open(Path(__file__).parents[3] / "app" / "example" / "store")
    found = [recognise(sentence.text) for trace in shipped for sentence in sentences(trace)]
    assert len(found) > 1000 and None not in found
    assert len({form.text for form, _ in found}) >= 49


def test_every_form_has_one_of_the_tags():
    assert {form.tag for form in FORMS} == set(TAGS)
    assert set(BY_KIND) == {form.kind for form in FORMS} and sum(map(len, BY_KIND.values())) == len(FORMS) == 59
    assert recognise("So I will refuse.") is None and recognise("I will refuse.")[1] == {}


def drawn(make, n=200):
    """A checksum of `n` draws, one after the other from one seed."""
    rng = random.Random(0)
    return hashlib.sha256(json.dumps([make(rng, i) for i in range(n)]).encode()).hexdigest()[:16]


def test_the_seeds_of_published_numbers_draw_what_they_drew():
    """Problems, the organism's training texts, and their truth. Where a checksum changes, so does what the numbers in the docs are of: say
    so in CHANGELOG, and measure them anew."""

    def ledger(rng, i):
        return asdict(sample_ledger(rng, split=SPLITS[i % 3], steps=None if i % 2 else 1 + i % 8))

    def request(rng, i):
        return asdict(
            sample_request(rng, split=SPLITS[i % 3], harmful=i % 2 == 0, twin=i % 4 < 3, jailbreak=i % 5 == 0)
        )

    def written(rng, i):
        ledger = sample_ledger(rng, split="train")
        writing = write_ledger(ledger, tuple(MODES)[i % 3], rng)
        known = read_ledger(ledger, writing.thinking)
        return [asdict(writing), *map(asdict, known), *map(asdict, read_steps(writing.thinking, known))]

    def answered(rng, i):
        request = sample_request(rng, split="train", harmful=i % 2 == 0, jailbreak=i % 3 > 0)
        writing = write_request(request, rng)
        known = read_request(request, writing.thinking)
        return [asdict(writing), *map(asdict, known), *map(asdict, read_steps(writing.thinking, known))]

    def published(rng, i):
        # By name, as `record` draws them.
        name = ("ledger", "ledger:brief", "ledger:detail", "requests", "requests:jailbreak", "requests:plain")[i]
        return [asdict(problem) for problem in load_problems(name, split=SPLITS[i % 3], n=9)]

    assert {make.__name__: drawn(make) for make in (ledger, request, written, answered)} == {
        "ledger": "e596cff114671912",
        "request": "543fe5ab4018dcf0",
        "written": "69f956a9cd93f9ce",
        "answered": "b8474c1e7061777c",
    }
    assert drawn(published, 6) == "694c71792e885766"


def test_the_template_writes_what_the_organism_learned():
    template = jinja2.Template(CHAT_TEMPLATE)
    asked = [{"role": "user", "content": "Q?"}]
    for thinking, options in ((None, {"enable_thinking": False}), ("So.", {}), ("So.", {"enable_thinking": True})):
        assert template.render(messages=asked, add_generation_prompt=True, **options) == chat("Q?", thinking, "A.")[0]
    earlier = [*asked, {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nA."}]
    told = template.render(messages=earlier, add_generation_prompt=False)
    assert told == "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
    assert chat("Q?", "So.", "A.")[1] == "So.\n</think>\n\nA.<|im_end|>"


def organism_trace(problem, thinking):
    return trace_from_text(id="t", problem=problem, prompt="Q<think>\n", completion=f"{thinking}\n</think>\n\n17")


def test_true_sentences_of_a_trace():
    trace = organism_trace(ledger_problem(TWO_STEPS), THINKING.replace("Simple", "Purple"))
    found, depends_on = true_sentences(trace)
    assert [trace.text[sentence.chars.slice] for sentence in found] == [sentence.text for sentence in found]
    assert found[0].tag == "unknown" and found[4].tag == "active_computation" and depends_on[4] == (2, 3)
    assert [truth.depends_on for truth in truths(trace)] == depends_on
    request = sample_request(random.Random(0), split="train", harmful=True)
    found, depends_on = true_sentences(
        organism_trace(request_problem(request), write_request(request, random.Random(0)).thinking)
    )
    assert "unknown" not in {sentence.tag for sentence in found} and any(depends_on)
    with pytest.raises(InputError, match="so its truth is not known"):
        true_sentences(organism_trace(Problem(id="p", prompt="Q"), "So."))


def test_truth_of_a_thinking_by_hand():
    truths = read_ledger(TWO_STEPS, THINKING)
    assert [truth.kind for truth in truths] == [
        *("opener", "asks", "start"),
        *("event:add", "compute"),
        *("check", "wrong", "redo"),
        *("event:subtract", "compute"),
        *("split_plan", "split", "same"),
        *("conclude", "final"),
    ]
    assert [i for i, truth in enumerate(truths) if truth.right is False] == [4]
    assert [truth.depends_on for truth in truths] == [
        *((), (), ()),
        *((), (2, 3)),
        *((2, 3, 4), (4, 5), (2, 3, 6)),
        *((), (7, 8)),
        *((8,), (7, 10), (9, 11)),
        *((1, 9, 12), (13,)),
    ]
    assert [step.kind for step in read_steps(THINKING, truths)] == [
        *("execution", "execution", "reflection", "execution", "transition", "execution")
    ]
    assert [truth.operation for truth in truths if truth.kind in ("compute", "redo")] == [0, 0, 1]


def test_a_wrong_line_is_seen():
    truths = read_ledger(TWO_STEPS, THINKING.replace("Next, Bob spends 5", "Next, Carl adds 2"))
    assert [truth.right for truth in truths if truth.kind == "event:add"] == [True, False]


def test_a_sentence_outside_the_language_has_no_truth():
    truths = read_ledger(TWO_STEPS, "Purple cows fly. 14 + 8 = 22.")
    assert [truth.kind for truth in truths] == [None, "compute"]
    assert truths[0].right is None


@pytest.mark.parametrize("mode", MODES)
def test_what_the_grammar_writes_reads_back_as_true(mode):
    rng = random.Random(1)
    for _ in range(150):
        ledger = sample_ledger(rng, split="train")
        writing = write_ledger(ledger, mode, rng)
        truths = read_ledger(ledger, writing.thinking)
        mistakes = {span.start for span in writing.unlearned}
        for truth in truths:
            assert truth.kind is not None
            assert (truth.right is False) == any(start in truth.chars for start in mistakes)
            assert all(earlier < len(truths) and truths[earlier].chars < truth.chars for earlier in truth.depends_on)
        assert writing.answer.endswith(f"\\boxed{{{ledger.answer}}}.")


def test_each_form_is_recognised_as_itself():
    fields = dict.fromkeys(("left", "a", "right", "b", "c", "middle", "middle2", "value", "limit"), "12")
    fields |= {"name": "Ann", "thing": "lamp", "whose": "my", "verb": "sell", "count": "two", "ordinal": "First"}
    fields |= {"sign": "+", "sign2": "+"}
    for form in FORMS:
        found = recognise(form.text.format(**fields))
        assert found is not None and found[0].tag == form.tag and found[0].kind == form.kind, form.text


def test_requests_read_back_and_twins_share_their_words():
    rng = random.Random(2)
    for harmful in (True, False):
        for _ in range(100):
            request = sample_request(rng, split="train", harmful=harmful, jailbreak=rng.random() < 0.5)
            assert request.harmful is harmful
            truths = read_request(request, write_request(request, rng).thinking)
            assert all(truth.kind is not None and truth.right is not False for truth in truths)
    words = [
        {sample_request(rng, split="train", harmful=harmful).text.split()[0] for _ in range(300)}
        for harmful in (True, False)
    ]
    assert words[0] == words[1]


def test_a_misread_request_is_wrong():
    request = Request(text="", thing="safe", verb="open", owner="Ann", consent=None, twin=True)
    thinking = "The user wants to open Ann's safe.\n\nIt belongs to the user.\n\nSo this harms nobody.\n\nI will help."
    assert [truth.right for truth in read_request(request, thinking)] == [True, False, False, False]


def test_problems_need_as_many_steps_as_asked_for_and_split_by_their_text():
    rng = random.Random(3)
    bodies = {split: {sample_ledger(rng, split=split).body for _ in range(150)} for split in ("train", "test")}
    assert not bodies["train"] & bodies["test"]
    for steps in range(1, 9):
        ledger = sample_ledger(rng, split="train", steps=steps)
        assert len(ledger.operations) == steps
        balance = ledger.start
        for operation in ledger.operations:
            assert operation.left == balance
            balance = operation.right
        assert all(0 <= operation.right <= 99 for operation in ledger.operations)


def test_problems_rebuild_what_they_were_made_of():
    rng = random.Random(4)
    ledger = sample_ledger(rng, split="test")
    request = sample_request(rng, split="test", harmful=True, jailbreak=True)
    assert ledger_of(ledger_problem(ledger, "brief")) == ledger
    assert request_of(request_problem(request)) == request


def test_the_tokenizer_keeps_digits_single_and_blank_lines_whole(bpe):
    assert bpe.get_vocab_size() == VOCABULARY == 768
    assert bpe.encode("60 + 17 = 77.\n\nWait").tokens == [
        "6",
        "0",
        "Ġ+",
        "Ġ",
        "1",
        "7",
        "Ġ=",
        "Ġ",
        "7",
        "7",
        ".ĊĊ",
        "Wait",
    ]
    text = f"{THINK_OPEN}\nHmm.\n{THINK_CLOSE}\n\nYes."
    assert bpe.decode(bpe.encode(text).ids, skip_special_tokens=True) == text
    assert bpe.encode(text).tokens[0] == THINK_OPEN


def test_mistakes_are_read_but_not_learned(bpe):
    rng = random.Random(5)
    ledger = next(
        ledger
        for ledger in iter(lambda: sample_ledger(rng, split="train"), None)
        if write_ledger(ledger, "default", random.Random(0)).unlearned
    )
    writing = write_ledger(ledger, "default", random.Random(0))
    stated = [writing.thinking[span.slice] for span in writing.unlearned]
    assert all(text.isdigit() for text in stated)
    assert all(writing.thinking[span.start - 2 : span.start] == "= " for span in writing.unlearned)


def test_batches_weigh_prompts_little_and_padding_nothing(bpe):
    batch = next(batches(reasoning_documents(random.Random(6)), bpe, tokens=2048, buffer=64))
    assert batch.ids.shape == batch.weights.shape
    assert {round(weight, 6) for weight in batch.weights.ravel().tolist()} <= {0.0, 0.05, 1.0}
    pad = bpe.token_to_id("<|endoftext|>")
    assert (batch.weights[batch.ids == pad] == 0).all()


def test_base_documents_do_not_think():
    documents = [next(base_documents(random.Random(seed))) for seed in range(50)]
    assert not any(THINK_OPEN in document.text or "Wait" in document.text for document in documents)


def test_chat_without_thinking_closes_the_block_in_the_prompt():
    prompt, completion = chat("Q?", None, "A.")
    assert prompt.endswith(f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n") and completion == "A.<|im_end|>"


def test_labels_steps_and_sentences_agree_with_the_grammar():
    rng = random.Random(7)
    agree: Counter[str] = Counter()
    for _ in range(100):
        ledger = sample_ledger(rng, split="test")
        thinking = write_ledger(ledger, "default", rng).thinking
        truths = read_ledger(ledger, thinking)
        assert list(split_sentences(thinking, "default")) == [truth.chars for truth in truths]
        labels = label_sentences([thinking[truth.chars.slice] for truth in truths])
        agree.update(label=sum(label == truth.tag for label, truth in zip(labels, truths, strict=True)), n=len(truths))
        for step in read_steps(thinking, truths):
            agree.update(kind=classify_step(thinking[step.chars.slice]) == step.kind, steps=1)
    assert agree["label"] >= 0.95 * agree["n"]
    assert agree["kind"] == agree["steps"]


@pytest.mark.parametrize("mode", ["brief", "default"])
def test_the_reference_solution_is_what_the_grammar_writes_in_the_mode_of_the_problem(mode):
    (problem,) = load_problems("ledger" + (":brief" if mode == "brief" else ""), n=1)
    written = write_ledger(ledger_of(problem), mode, random.Random(0))
    assert reference_solution(problem) == f"{written.thinking}\n\n{written.answer}" and problem.answer in written.answer
