"""A trace has one cut into sentences, and its hash tells it from any other."""

from reasonscope.data.sentence_cut import cut_hash, cut_provenance, cut_trace
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.steps_and_sentences import sentences, sentences_at
from reasonscope.data.trace import Problem, Span


def trace(thinking="Let me add. So it is 7.\n\nWait. Yes.", meta=None):
    problem = Problem(id="a", prompt="Add.", answer="7", meta=meta or {})
    completion = f"{thinking}\n</think>\n\n7"
    return trace_from_text(id="a/0", problem=problem, prompt="Add.\n<think>\n", completion=completion, tokenizer=None)


def test_the_same_spans_have_the_same_hash():
    cut = cut_trace(trace())
    assert cut.labels == "our" and cut.steps == (0, 0, 1, 1)
    assert cut.cut_hash == cut_hash(cut.sentences) == cut_hash(cut_trace(trace()).sentences)
    assert len(cut.cut_hash) == 16 and int(cut.cut_hash, 16) > 0
    relabelled = sentences_at(cut.trace, [one.chars for one in cut.sentences], ["unknown"] * 4)
    assert cut_hash(relabelled) == cut.cut_hash


def test_as_many_other_spans_have_another_hash():
    one = trace()
    known = sentences(one)
    moved = [Span(s.chars.start, s.chars.stop - (s.index == 2)) for s in known]
    assert cut_hash(sentences_at(one, moved, ["unknown"] * 4)) != cut_hash(known)
    assert cut_hash(known[:-1]) != cut_hash(known)


def test_no_sentences_have_no_cut():
    assert cut_provenance([]) == {} and cut_provenance(sentences(trace())).keys() == {"cut"}
