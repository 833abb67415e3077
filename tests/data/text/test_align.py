import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reasonscope.data.errors import InputError
from reasonscope.data.text.align import decode_with_offsets, token_strings, tokens_overlapping
from reasonscope.data.trace import Span


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A Llama-2-like vocabulary: pieces with ▁, byte fallback, one space stripped from the front."""
    words = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefg.\n", "▁a", "▁b", "ab", "▁cab"]
    tok = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.add_special_tokens(["<s>", "<unk>"])
    return tok


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_byte_level_text_is_what_the_library_decodes(tokenizer, data):
    size = tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
    text, offsets = decode_with_offsets(ids, tokenizer)
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    _check_cover(text, offsets)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_sentencepiece_text_is_what_the_library_decodes(sentencepiece, data):
    ids = data.draw(st.lists(st.integers(0, sentencepiece.get_vocab_size() - 1), max_size=30))
    text, offsets = decode_with_offsets(ids, sentencepiece)
    assert text == sentencepiece.decode(ids, skip_special_tokens=False)
    _check_cover(text, offsets)


def _check_cover(text, offsets):
    assert (np.diff(offsets[:, 0]) >= 0).all() and (np.diff(offsets[:, 1]) >= 0).all()
    covered = np.zeros(len(text), dtype=bool)
    for start, stop in offsets:
        covered[start:stop] = True
    assert covered.all()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_encoded_text_comes_back_with_the_offsets_of_the_encoder(tokenizer, text):
    encoding = tokenizer.encode(text, add_special_tokens=False)
    decoded, offsets = decode_with_offsets(encoding.ids, tokenizer)
    assert decoded == text
    assert offsets.tolist() == [list(pair) for pair in encoding.offsets]


def test_tokens_of_one_emoji_all_span_it(tokenizer):
    text, offsets = decode_with_offsets(tokenizer.encode("a😀b").ids, tokenizer)
    assert text == "a😀b"
    assert token_strings(text, offsets) == ["a", "😀", "😀", "😀", "😀", "b"]
    assert tokens_overlapping(offsets, Span(1, 2)) == Span(1, 5)


def test_newline_merged_with_the_stop_before_the_tag_belongs_to_the_thinking(tokenizer):
    text, offsets = decode_with_offsets(tokenizer.encode("so 7.\n\n</think>").ids, tokenizer)
    strings = token_strings(text, offsets)
    assert strings[-2:] == [".\n\n", "</think>"]
    close = Span(text.index("\n\n"), len(text))
    assert tokens_overlapping(offsets, close) == Span(len(strings) - 2, len(strings))


def test_metaspace_drops_the_space_it_put_in_front():
    tok = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁so", -1.0), ("▁it", -1.0), ("▁", -2.0)], unk_id=0))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text, offsets = decode_with_offsets([1, 2], tok)
    assert (text, offsets.tolist()) == ("so it", [[0, 2], [2, 5]])


def test_no_tokens_and_ids_beyond_the_vocabulary(tokenizer):
    text, offsets = decode_with_offsets([], tokenizer)
    assert text == "" and offsets.shape == (0, 2) and offsets.dtype == np.int64
    text, offsets = decode_with_offsets([tokenizer.token_to_id("<think>"), 99999], tokenizer)
    assert text == "<think>" and offsets.tolist() == [[0, 7], [7, 7]]


def test_empty_span_overlaps_nothing(tokenizer):
    _, offsets = decode_with_offsets(tokenizer.encode("so 7 and 8").ids, tokenizer)
    assert len(tokens_overlapping(offsets, Span(3, 3))) == 0


def test_a_wordpiece_tokenizer_is_refused():
    tok = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tok.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="byte-level BPE and SentencePiece"):
        decode_with_offsets([0], tok)
