r"""The characters of each token, derived from the token ids of a run: text is decoded once and never encoded again.

Encoding a prefix does not give the prefix of the encoding (".\n\n" is one token, "." followed by "\n\n" are two), so
every span in this package comes from the table of offsets that is made here.
"""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span

_REPLACEMENT = "\ufffd"


def decode_with_offsets(ids: Sequence[int] | NDArray[np.int64], tokenizer: Tokenizer) -> tuple[str, NDArray[np.int64]]:
    """The text of `ids`, with special tokens, and the half-open character span of each token, (token, 2) int64.

    The text equals `tokenizer.decode(ids, skip_special_tokens=False)`. Tokens that share the bytes of one character (an
    emoji in four pieces) all span that character, invalid UTF-8 becomes U+FFFD, and an id without a string (the padding
    rows of an embedding) spans nothing. Starts never decrease. Raises InputError for a tokenizer that is neither
    byte-level nor of the SentencePiece kind, because its text cannot be split by token.
    """
    pieces = _pieces([int(i) for i in ids], tokenizer)
    lengths = np.fromiter((len(piece) for piece in pieces), dtype=np.int64, count=len(pieces))
    stops = np.cumsum(lengths)
    text, char_of_byte = _decode(b"".join(pieces))
    starts = stops - lengths
    first = char_of_byte[starts]
    last = np.where(lengths > 0, char_of_byte[np.maximum(stops - 1, 0)] + 1, first)
    return text, np.stack([first, last], axis=1).reshape(-1, 2)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first place at which two sequences differ, where the end of one counts as a difference; None if they are equal."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return None if len(first) == len(second) else min(len(first), len(second))


def tokens_overlapping(offsets: NDArray[np.int64], chars: Span) -> Span:
    """The tokens that share at least one character with `chars`; empty if `chars` is."""
    start = int(np.searchsorted(offsets[:, 1], chars.start, side="right"))
    stop = int(np.searchsorted(offsets[:, 0], chars.stop, side="left"))
    return Span(start, max(start, stop)) if len(chars) else Span(start, start)


def token_strings(text: str, offsets: NDArray[np.int64]) -> list[str]:
    """The text of each token; tokens that share a character all show it."""
    return [text[start:stop] for start, stop in offsets.tolist()]


def _pieces(ids: list[int], tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token."""
    added = {i: token.content.encode() for i, token in tokenizer.get_added_tokens_decoder().items()}
    decoders = _decoders(tokenizer)
    strings = [None if i in added else tokenizer.id_to_token(i) for i in ids]
    if "ByteLevel" in decoders:
        table = _byte_of_char()
        return [
            added.get(i, b"") if s is None else _from_byte_level(s, table) for i, s in zip(ids, strings, strict=True)
        ]
    if decoders & {"Metaspace", "ByteFallback"}:
        return _from_sentencepiece(
            [added.get(i, b"") if s is None else s for i, s in zip(ids, strings, strict=True)], decoders
        )
    raise InputError(
        f"tokenizer with decoder {tokenizer.decoder!r}: byte-level BPE and SentencePiece (Metaspace, ByteFallback) are understood; "
        "use a model with one of these"
    )


def _decoders(tokenizer: Tokenizer) -> set[str]:
    """The kinds of decoder in a tokenizer; they include `Strip` if the first space is removed."""
    if tokenizer.decoder is None:
        return set()
    state = json.loads(tokenizer.decoder.__getstate__())
    parts = state.get("decoders", [state])
    kinds = {part["type"] for part in parts}
    if any(part["type"] == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts):
        kinds.add("Strip")
    return kinds


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's table of printable stand-ins for bytes, from character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}


def _from_byte_level(token: str, table: dict[str, int]) -> bytes:
    try:
        return bytes(table[char] for char in token)
    except KeyError:  # the vocabulary has this string verbatim
        return token.encode()


def _from_sentencepiece(tokens: list[bytes | str], decoders: set[str]) -> list[bytes]:
    """The bytes of each token. `bytes` are added tokens, taken verbatim; strings are pieces, in which "▁" is a space
    and <0xE2> a byte."""
    pieces: list[bytes] = []
    run: list[int] = []  # positions of neighbouring byte tokens, which form characters together
    for token in [*tokens, b""]:
        if isinstance(token, str) and "ByteFallback" in decoders and _is_byte(token):
            run.append(len(pieces))
            pieces.append(bytes([int(token[3:5], 16)]))
            continue
        if run and not _is_utf8(b"".join(pieces[run[0] : run[-1] + 1])):
            for (
                position
            ) in run:  # like the tokenizers library: one U+FFFD per byte, even for the valid bytes of the run
                pieces[position] = _REPLACEMENT.encode()
        run = []
        pieces.append(token if isinstance(token, bytes) else token.replace("▁", " ").encode())
    pieces.pop()
    if "Strip" in decoders and pieces and pieces[0].startswith(b" "):
        pieces[0] = pieces[0][1:]  # the space that the encoder put before the text
    return pieces


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decode(raw: bytes) -> tuple[str, NDArray[np.int64]]:
    """Text of `raw`, and the index of the character that each byte (and the end) belongs to: (byte + 1,)."""
    parts: list[str] = []
    leads = np.zeros(len(raw) + 1, dtype=np.int64)  # 1 where a character begins
    position = 0
    while position < len(raw):
        try:
            good, bad = len(raw), len(raw)
            parts.append(raw[position:].decode())
        except UnicodeDecodeError as error:
            good, bad = position + error.start, position + error.end
            parts += [raw[position:good].decode(), _REPLACEMENT]
            leads[good] = 1
        block = np.frombuffer(raw, dtype=np.uint8)[position:good]
        leads[position:good] = (block & 0xC0) != 0x80
        position = bad
    leads[-1] = 1
    return "".join(parts), np.cumsum(leads) - 1
