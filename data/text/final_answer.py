r"""Reasoning in the open: where a completion without tags stops to reason and states its final answer.

The completion is cut into sentences. The answer begins with the first rule that finds one:

1. statement: the last sentence that states the answer: `\boxed{…}`, a line `#### 18`, "the answer is …" or "Answer: …", "the correct
   option is …", or a line that is a letter alone. Sentences that state it directly before that one belong to the answer, too.
2. code: the last fenced block of code.
3. last number: the last sentence with a number.
4. last sentence.

Rules 2 to 4 are for completions that ended by themselves: what was cut off before it stated an answer was still reasoning. A pattern of
the user takes the place of all four, and its first group, if it has one, is the final answer.
"""

import re
from collections.abc import Sequence

from reasonscope.data.errors import InputError
from reasonscope.data.text.answers import CONTROL
from reasonscope.data.text.sentence_splitter import split_sentences
from reasonscope.data.text.think_tags import FoundThinking, regions_from
from reasonscope.data.trace import FinishReason, Span, ThinkingState

_LETTER = r"\(?[A-J]\)?"
_STATEMENT = re.compile(
    r"\\f?boxed\b"
    r"|^[ \t]*####[ \t]*[-+$]*\d[\d,]*(?:\.\d+)?(?:/\d+)?[ \t]*%?[ \t]*$"
    r"|\banswer\b[*_]*(?:[ \t]+(?:to|for|of)\b[^.?!\n]{1,80}?)?[ \t]*(?:\bis\b|[:=])"
    r"|\b(?:correct|right|best)[ \t]+(?:option|choice)\b[*_]*[ \t]*(?:is\b|[:=])"
    rf"|^[ \t*_]*(?:(?:option|choice)[ \t]+)?{_LETTER}[ \t*_.]*$",
    re.IGNORECASE | re.MULTILINE,
)
# What states an answer while it is being written: each ends with a character that settles it, whatever follows.
CUE = re.compile(
    r"\\f?boxed\{"
    r"|^[ \t]*####[ \t]*[-+$]*\d"
    r"|\banswer\b[*_]*(?:[ \t]+(?:to|for|of)\b[^.?!\n]{1,80}?)?[ \t]*(?:is[\s:*]|[:=])"
    r"|\b(?:correct|right|best)[ \t]+(?:option|choice)\b[*_]*[ \t]*(?:is[\s:*]|[:=])"
    rf"|^[ \t*_]*(?:(?:option|choice)[ \t]+)?{_LETTER}[ \t*_.]*\n",
    re.IGNORECASE | re.MULTILINE,
)
_CODE = re.compile(r"^[ \t]*```[^\n`]*\n.*?(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"\d")
_TAIL = re.compile(rf"(?:\s|{CONTROL.pattern})+\Z")


def find_stated(text: str, prompt_stop: int, pattern: str | None, finish: FinishReason) -> FoundThinking:
    """The reasoning of a completion, which is everything before its answer, by the rules above or by a `pattern`."""
    tail = _TAIL.search(text, prompt_stop)
    written = text[prompt_stop : tail.start() if tail else len(text)]
    at, answer_by, final = _answer_start(written, pattern, finish)
    begin = prompt_stop + len(written) - len(written.lstrip())
    if at is None:
        regions = regions_from(prompt_stop, begin, len(text), len(text), len(text))
        doubts = (f"no sentence matches the answer pattern {pattern!r}",) if pattern and finish != "length" else ()
        return FoundThinking(regions=regions, state="truncated", blocks=(Span(begin, len(text)),), doubts=doubts)
    stop = max(begin, prompt_stop + len(written[:at].rstrip()))
    regions = regions_from(prompt_stop, begin, stop, prompt_stop + at, len(text))
    state: ThinkingState = "closed" if stop > begin else "empty"
    return FoundThinking(regions=regions, state=state, blocks=(Span(begin, stop),), answer_by=answer_by, final=final)


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern of a final answer. Raises InputError for an invalid one."""
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise InputError(f"invalid answer pattern {pattern!r}: {error}; give a regular expression of Python") from error


def _answer_start(written: str, pattern: str | None, finish: FinishReason) -> tuple[int | None, str, str | None]:
    """The start of the answer in what was written or None, the rule that found it, and the answer itself if the rule says it."""
    sentences = split_sentences(written)
    if pattern is not None:
        found = list(compiled(pattern).finditer(written))
        if not found:
            return None, "", None
        final = next((group for group in found[-1].groups() if group is not None), None)
        return _holding(sentences, found[-1].start()), "pattern", final.strip() if final else None
    if (at := _last_statement(written, sentences)) is not None:
        return at, "statement", None
    if finish == "length" or not sentences:
        return (None, "", None) if finish == "length" else (0, "last sentence", None)
    if code := list(_CODE.finditer(written)):
        return code[-1].start(), "code", code[-1][0].strip().removesuffix("```").partition("\n")[2].strip()
    numbered = [one for one in sentences if _NUMBER.search(written[one.slice])]
    return (numbered or sentences)[-1].start, "last number" if numbered else "last sentence", None


def _last_statement(written: str, sentences: Sequence[Span]) -> int | None:
    """The start of the last sentence that states an answer, or of the first of those that do so directly before it."""
    states = [_holding(sentences, match.start()) for match in _STATEMENT.finditer(written)]
    if not states:
        return None
    stating, at = set(states), states[-1]
    for before, after in zip(reversed(sentences[:-1]), reversed(sentences[1:]), strict=True):
        if after.start == at and before.start in stating:
            at = before.start
    return at


def _holding(sentences: Sequence[Span], position: int) -> int:
    """The start of the sentence that holds a character, or else the character itself."""
    return max((one.start for one in sentences if one.start <= position < one.stop), default=position)
