"""Sentences of a reasoning text: the splitter of Thought Anchors, and ours, which knows abbreviations, numbers,
mathematics and code."""

import re
from typing import Literal

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Span

Splitter = Literal["default", "thought_anchors", "thought_anchors_published"]

_SHORT = 10  # the published splitter joins chunks with fewer characters to their neighbour
# Nothing ends a sentence inside these: fenced and inline code, display and inline mathematics. The last follows pandoc's
# rule (no blank inside the dollars, no digit after them), so that sums of money are not formulas.
_PROTECTED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`|\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|(?<![\\$\w])\$(?=[^\s$])[^$\n]{0,400}?(?<=[^\s\\])\$(?!\d)",
    re.DOTALL,
)
_BREAK = re.compile(
    r"(?<![.?!…])(?P<stop>[.?!…]+)[\"'”’)\]*_]*(?=\s|\Z)"  # a stop, with quotes and brackets that close after it
    r"|[。！？]+[”’」』）]*"
    r"|\n[ \t]*\r?\n"  # a blank line
    r"|\n(?=[ \t]*(?:[-•*]|\d{1,2}[.)])[ \t])"  # a list item begins
)
_ALWAYS = frozenset("dr mr mrs ms prof st vs cf e.g i.e resp approx viz".split())
_BEFORE_NUMBER = frozenset("no fig figs eq eqs sec ch p pp vol thm ex".split())
_BEHIND = re.compile(r"\s*(\S?)")
_MARKER = re.compile(r"\W*(?:\d{1,3}|[a-zA-Z]|[ivx]{1,4})\W*")


def split_sentences(text: str, splitter: Splitter = "default") -> list[Span]:
    """The sentences of `text` as character spans, without white space at their ends, in order and disjoint.

    `thought_anchors` is the published splitter (arXiv 2506.19143) with the last piece kept; `thought_anchors_published`
    drops a piece that no stop closes, as the published code does. Both join short pieces to their neighbour. `default`
    also ends a sentence at a list item, and does not end one at "Dr.", "e.g.", "1.", a factorial, or inside mathematics
    and code.
    """
    if splitter == "default":
        return _split(text)
    if splitter not in ("thought_anchors", "thought_anchors_published"):
        raise InputError(f"unknown splitter {splitter!r}: choose default, thought_anchors or thought_anchors_published")
    chunks = _glued(text, _pieces(text, keep_tail=splitter == "thought_anchors"))
    return [Span(chunk[0].start, chunk[-1].stop) for chunk in chunks]


def _pieces(text: str, *, keep_tail: bool) -> list[Span]:
    pieces = []
    start = 0
    for match in re.finditer(r"[.?!](?=[ \n])|\n(?=\n)|\r(?=\n\r\n)", text):
        span = _stripped(text, start, match.end())
        pieces += [span] if len(span) else []
        start = match.end()
    tail = _stripped(text, start, len(text))
    return [*pieces, tail] if keep_tail and len(tail) else pieces


def _glued(text: str, pieces: list[Span]) -> list[list[Span]]:
    """Pieces joined with the next one while they are short; a short last one joins the chunk before it."""
    chunks: list[list[Span]] = []
    pending: list[Span] = []
    for piece in pieces:
        pending = [*pending, piece]
        if sum(map(len, pending)) + len(pending) - 1 >= _SHORT:
            chunks.append(pending)
            pending = []
    if pending and chunks:
        chunks[-1] = chunks[-1] + pending
    elif pending:
        chunks.append(pending)
    return chunks


def _split(text: str) -> list[Span]:
    protected = [match.span() for match in _PROTECTED.finditer(_unopened(text))]
    found: list[Span] = []
    start = 0
    said, seen = "", 0  # the sentence up to the character `seen`, shortened
    inside = 0  # the first protected range that does not end before us
    for match in _BREAK.finditer(text):
        while inside < len(protected) and protected[inside][1] <= match.start():
            inside += 1
        if inside < len(protected) and protected[inside][0] <= match.start():
            continue
        if match["stop"] and _goes_on(said + text[seen : match.start()], match):
            last = match.end() - 1
            said, seen = _shortened(said + text[seen:last]), last
            continue
        found += _sentence(text, start, match.end(), found)
        start = seen = match.end()
        said = ""
    found += _sentence(text, start, len(text), found)
    return found


def _unopened(text: str) -> str:
    """`text` without the openings of mathematics that nothing closes; otherwise each would be searched to the end."""
    for opening, closing in (("\\[", "\\]"), ("\\(", "\\)")):
        last = max(text.rfind(closing), 0)
        text = text[:last] + text[last:].replace(opening, "\\.")
    return text


def _sentence(text: str, start: int, stop: int, found: list[Span]) -> list[Span]:
    """The sentence in [start, stop), if it has a letter or digit; a piece without one extends the sentence before
    it."""
    span = _stripped(text, start, stop)
    if found and len(span) and not re.search(r"\w", text[span.slice]):
        found[-1] = Span(found[-1].start, span.stop)
        return []
    return [span] if len(span) else []


def _shortened(said: str) -> str:
    """A beginning in which `_MARKER` finds what it finds in `said`: no marker has more than eight characters."""
    return re.sub(r"\W+", " ", said)[:8]


def _goes_on(so_far: str, match: re.Match[str]) -> bool:
    """Whether the stop at `match` does not end the sentence `so_far`, of which everything before its last stop may
    be shortened."""
    behind = _BEHIND.match(match.string, match.end())
    rest = behind[1] if behind else ""
    if match["stop"] == ".":
        word = re.split(r"[\s(\[\"“]", so_far)[-1].lower()
        numbered = word in _BEFORE_NUMBER and rest.isdigit()
        marker = _MARKER.fullmatch(so_far.strip()) or re.search(r":\s+1$", so_far)
        return word in _ALWAYS or numbered or bool(marker) or (word == "etc" and rest.islower())
    if match["stop"] == "!" and re.search(r"[\d)\]}]$|(?:^|\W)[a-zA-Z]$", so_far):
        return rest.islower() or rest in tuple("=+-*/)^·×<>,")  # a factorial
    return match["stop"] in ("...", "…") and rest.islower()


def _stripped(text: str, start: int, stop: int) -> Span:
    piece = text[start:stop]
    lead = len(piece) - len(piece.lstrip())
    return Span(start + lead, max(start + lead, start + len(piece.rstrip())))
