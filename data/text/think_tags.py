"""Think tags in a text: which of them open and close the thinking, and which are only mentioned.

Real traces differ in all of this: the opening tag may be in the prompt (the template opened it), in the completion, or missing; the
closing tag is missing if the completion was cut off; templates may prefill a closed empty block to switch thinking off; earlier turns
have blocks of their own; models quote tags, nest them, and think again after a tool call or a first answer.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reasonscope.data.errors import InputError
from reasonscope.data.trace import Regions, Span, ThinkingState

# What templates put between turns. A tag before one of these belongs to an earlier turn or to the user's words.
_TURN = re.compile(r"<[|｜][^<>]*[|｜]>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|\[/?INST\]|</s>")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n`]*)$", re.MULTILINE)
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "„": "“"}
_FEW_WORDS = 5  # a mention such as "<think> and </think>" has fewer words between the tags


@dataclass(frozen=True, kw_only=True)
class ThinkTags:
    """The text that opens and closes thinking.

    Attributes:
        open: The opening tag.
        close: The closing tag.
        implied: Whether a completion begins inside the thinking even though no opening tag is visible (text imported
            without its prompt, from a model whose template opens the tag).
        answer: What may open the answer after the closing tag, such as `<response>`; it counts as part of the close.

    Raises:
        InputError: If a tag is empty or both are equal.

    Example:
        tags = rs.data.ThinkTags(open="<reasoning>", close="</reasoning>")
        model = rs.load_model("models/mine", tags=tags)
        traces = rs.import_jsonl("completions.jsonl", tags=tags)
    """

    open: str = "<think>"
    close: str = "</think>"
    implied: bool = False
    answer: str = ""

    def __post_init__(self) -> None:
        if not self.open.strip() or not self.close.strip() or self.open == self.close:
            raise InputError(
                f"think tags {self.open!r}, {self.close!r}: give two different texts, such as <think> and </think>"
            )


THINK = ThinkTags()
GPT_OSS = ThinkTags(open="<|channel|>analysis<|message|>", close="<|end|><|start|>assistant<|channel|>final<|message|>")
GEMMA_4 = ThinkTags(open="<|channel>thought", close="<channel|>")
# Pairs in use, the most specific first. Their token ids differ between models, and some models split them into several tokens.
KNOWN_TAGS = (
    GEMMA_4,
    ThinkTags(open="<seed:think>", close="</seed:think>"),  # Seed-OSS
    ThinkTags(
        open="<|START_THINKING|>", close="<|END_THINKING|>", answer="<|START_RESPONSE|>"
    ),  # Cohere Command A and R7B
    ThinkTags(open="<|inner_prefix|>", close="<|inner_suffix|>"),  # Apertus
    THINK,  # Qwen, DeepSeek, GLM, MiniMax, EXAONE 4, Granite 3.3 and most others
    ThinkTags(open="<thinking>", close="</thinking>"),
    ThinkTags(open="<thought>", close="</thought>"),  # EXAONE Deep
    ThinkTags(open="<|think|>", close="<|/think|>"),
    ThinkTags(open="<|begin_of_thought|>", close="<|end_of_thought|>"),
    ThinkTags(open="[THINK]", close="[/THINK]"),  # Magistral
    ThinkTags(open="◁think▷", close="◁/think▷"),  # Kimi
    ThinkTags(open="Here is my thought process:", close="Here is my response:"),  # Granite 3.2
    ThinkTags(open="<reasoning>", close="</reasoning>"),
)


@dataclass(frozen=True, kw_only=True)
class FoundThinking:
    """Where a text thinks.

    Attributes:
        regions: The regions over characters; `thinking` runs from the first block to the last.
        state: Whether the thinking is "closed", "truncated", "empty" or "absent".
        blocks: The blocks of thinking, in order; one unless the model thought again.
        doubts: What could be read in another way, in words.
        answer_by: The rule that found the answer of reasoning in the open.
        final: The final answer, if the rule that found it also says what it is.
    """

    regions: Regions
    state: ThinkingState
    blocks: tuple[Span, ...] = ()
    doubts: tuple[str, ...] = ()
    answer_by: str = ""
    final: str | None = None


@dataclass(frozen=True, kw_only=True)
class TagPlaces:
    """The characters at which a tag begins as a token of its own, by the ids of the run, which tells it from a quoted one.

    None for a tag that is ordinary text.
    """

    opens: frozenset[int] | None = None
    closes: frozenset[int] | None = None

    def of(self, *, opens: bool) -> frozenset[int] | None:
        return self.opens if opens else self.closes


def find_tagged(
    text: str,
    prompt_stop: int,
    tags: ThinkTags,
    *,
    places: TagPlaces | None = None,
    turn_start: int = 0,
    only_first: bool = False,
) -> FoundThinking:
    """The thinking between `tags` in a prompt and its completion.

    `places` limits the tags of the completion to those that are tokens of their own; `turn_start` is where the last message of the
    prompt ends, because a tag before it is somebody's words. With `only_first`, later blocks belong to the answer.
    """
    tagged = _Tagged(text, tags, prompt_stop, places)
    opener = tagged.opener(turn_start)
    if opener is None:
        regions = regions_from(prompt_stop, prompt_stop, prompt_stop, prompt_stop, len(text))
        return FoundThinking(regions=regions, state="absent", doubts=tuple(tagged.doubts))
    ends = tagged.blocks(opener)[: 1 if only_first else None]
    blocks = tuple(_block(text, start, stop, closed=close is not None) for start, stop, close in ends)
    kept = tuple(block for block in blocks if len(block)) or blocks[-1:]
    close, doubts = ends[-1][2], tuple(tagged.doubts)
    if close is None:
        regions = regions_from(opener.start, kept[0].start, len(text), len(text), len(text))
        return FoundThinking(regions=regions, state="truncated", blocks=kept, doubts=doubts)
    answer = _skip_white(text, close)
    if tags.answer and text.startswith(tags.answer, answer):
        answer = _skip_white(text, answer + len(tags.answer))
    regions = regions_from(opener.start, kept[0].start, kept[-1].stop, answer, len(text))
    state: ThinkingState = "closed" if len(regions.thinking) else "empty"
    return FoundThinking(regions=regions, state=state, blocks=kept, doubts=doubts)


def regions_from(open_start: int, thinking: int, close: int, answer: int, end: int) -> Regions:
    """The regions, from the start of each part but the first."""
    return Regions(
        prompt=Span(0, open_start),
        open=Span(open_start, thinking),
        thinking=Span(thinking, close),
        close=Span(close, answer),
        answer=Span(answer, end),
        close_window=Span(close, answer),
    )


@dataclass(frozen=True, order=True)
class _Tag:
    start: int
    stop: int
    opens: bool


class _Tagged:
    """The tags of one text, with what was doubtful about them."""

    def __init__(self, text: str, tags: ThinkTags, prompt_stop: int, places: TagPlaces | None) -> None:
        self._text, self._tags, self._stop, self._places = text, tags, prompt_stop, places or TagPlaces()
        self._fences = _fenced(text)
        self.doubts: list[str] = []
        written = [*self._found(tags.open, opens=True), *self._found(tags.close, opens=False)]
        self._written = sorted(tag for tag in written if self._is_real(tag))

    def opener(self, turn_start: int) -> Span | None:
        """The start of `open` and the end of its tag; an empty span if thinking begins with the completion, without a tag."""
        given = opener_in_prompt(self._text, self._stop, self._tags, turn_start)
        first = self._first_block()
        if given is not None:
            prefill = self._text[given.stop : self._stop].strip()
            if not prefill:
                return given
            if prefill.endswith(self._tags.close):  # thinking was switched off, but a model may still open it
                reopened = self._text[self._stop :].lstrip().startswith(self._tags.open)
            else:  # the beginning of the thinking was given, or the prompt mentions the tag and the model opens its own
                reopened = first is not None
            if not reopened:
                return given
        if first is not None:
            return Span(self._stop, first.stop)
        closes = [tag for tag in self._written if not tag.opens and not self._is_mention(tag, None)]
        if len(closes) < sum(not tag.opens for tag in self._written):
            self.doubts.append("a closing tag in the middle of a sentence counts as words")
        return Span(self._stop, self._stop) if self._tags.implied or closes else None

    def blocks(self, opener: Span) -> list[tuple[int, int, int | None]]:
        """Each block as (start, stop, end of its closing tag); the last has None if it was never closed."""
        rest = [*self._in_prefill(opener), *(tag for tag in self._written if tag.start >= opener.stop)]
        blocks: list[tuple[int, int, int | None]] = []
        start = opener.stop
        while True:
            end = self._end(start, rest)
            if end is None:
                return [*blocks, (start, len(self._text), None)]
            blocks.append((start, end.start, end.stop))
            rest = [tag for tag in rest if tag.start >= end.stop]
            following = self._next_block(rest)
            if following is None:
                return blocks
            start = following.stop
            rest = [tag for tag in rest if tag.start >= start]

    def _first_block(self) -> _Tag | None:
        """The first tag of the completion that opens thinking, unless a closing tag comes before it."""
        for i, tag in enumerate(self._written):
            if not tag.opens:
                return None
            if not self._is_mention(tag, self._close_after(i)):
                return tag
            self.doubts.append("an opening tag in the middle of a sentence counts as words")
        return None

    def _next_block(self, rest: Sequence[_Tag]) -> _Tag | None:
        """The tag after a closed block that opens another one."""
        for i, tag in enumerate(rest):
            closing = next((other for other in rest[i + 1 :] if not other.opens), None)
            if not tag.opens:
                self.doubts.append("the answer has a closing tag of its own, which counts as words")
            elif self._is_mention(tag, closing):
                self.doubts.append("the answer mentions an opening tag, which counts as words")
            else:
                return tag
        return None

    def _end(self, start: int, rest: Sequence[_Tag]) -> _Tag | None:
        """The closing tag of the block that begins at `start`: nested pairs belong to it."""
        depth, ends = 1, [tag for tag in rest if not tag.opens]
        for i, tag in enumerate(rest):
            depth += 1 if tag.opens else -1
            if depth == 0:
                if i and any(other.opens for other in rest[:i]):
                    self.doubts.append("tags are nested")
                return self._later_end(tag, rest[i + 1 :])
        if not ends:
            return None
        self.doubts.append("more tags open than close; the last closing tag ends the thinking")
        return ends[-1]

    def _later_end(self, end: _Tag, rest: Sequence[_Tag]) -> _Tag:
        """Another closing tag, if that one has a line of its own and the first is in the middle of one: the first is then words."""
        if self._places.closes is not None or self._ends_a_line(end):
            return end
        for tag in rest:
            if tag.opens:
                return end
            if self._ends_a_line(tag):
                self.doubts.append("the thinking has a closing tag in the middle of a sentence, which counts as words")
                return tag
        return end

    def _close_after(self, i: int) -> _Tag | None:
        return next((tag for tag in self._written[i + 1 :] if not tag.opens), None)

    def _in_prefill(self, opener: Span) -> list[_Tag]:
        """Closing tags between an opener in the prompt and the completion."""
        text = self._text[opener.stop : self._stop] if opener.start < self._stop else ""
        at = text.rfind(self._tags.close)
        return [_Tag(opener.stop + at, opener.stop + at + len(self._tags.close), False)] if at >= 0 else []

    def _found(self, tag: str, *, opens: bool) -> Iterator[_Tag]:
        """The occurrences of `tag` in the completion."""
        at = self._text.find(tag, self._stop)
        while at >= 0:
            yield _Tag(at, at + len(tag), opens)
            at = self._text.find(tag, at + len(tag))

    def _is_real(self, tag: _Tag) -> bool:
        """Whether a tag is a token of its own, or else not in quotes."""
        if (known := self._places.of(opens=tag.opens)) is not None:
            return tag.start in known
        quoted = _is_quoted(self._text, tag.start, tag.stop) or any(tag.start in fence for fence in self._fences)
        if quoted:
            self.doubts.append("a tag in quotes or code counts as words")
        return not quoted

    def _is_mention(self, tag: _Tag, closing: _Tag | None) -> bool:
        """Whether a tag is in the middle of a sentence, with a few words at most up to its closing tag."""
        if (
            self._places.of(opens=tag.opens) is not None
            or self._begins_a_line(tag)
            or not self._text[tag.start - 1].isspace()
        ):
            return False
        if not tag.opens:
            return not self._ends_a_line(tag)
        if closing is None:
            return True
        inside = self._text[tag.stop : closing.start]
        follows = self._text[closing.stop : closing.stop + 1]
        return (
            "\n" not in inside
            and inside[:1] == " "
            and inside[-1:] == " "
            and len(inside.split()) < _FEW_WORDS
            and (not follows or not follows.isalnum())
        )

    def _begins_a_line(self, tag: _Tag) -> bool:
        before = self._text[self._stop : tag.start].rstrip(" \t")
        return not before or before.endswith("\n") or bool(re.search(r"[>\]｜|]$", before))

    def _ends_a_line(self, tag: _Tag) -> bool:
        before = self._text[: tag.start].rstrip(" \t")
        after = self._text[tag.stop :].lstrip(" \t")
        return before.endswith("\n") or not after or after.startswith("\n")


def opener_in_prompt(text: str, prompt_stop: int, tags: ThinkTags, turn_start: int = 0) -> Span | None:
    """The tag that the prompt leaves open, or opens and closes at its very end; not one of an earlier turn."""
    start = text.rfind(tags.open, turn_start, prompt_stop)
    if start < 0:
        return _closed_in_prompt(text, prompt_stop, tags, turn_start)
    stop = start + len(tags.open)
    inside, closed, behind = text[stop:prompt_stop].partition(tags.close)
    if _TURN.search(inside) or (closed and behind.strip()):
        return None
    if inside.strip() and not closed and not _opens_a_turn(text[turn_start:start], inside):
        return None
    return Span(start, stop)


def _closed_in_prompt(text: str, prompt_stop: int, tags: ThinkTags, turn_start: int) -> Span | None:
    """Nothing, before a closing tag alone at the end of the prompt: some templates switch thinking off so."""
    given = text[turn_start:prompt_stop].rstrip()
    if not given.endswith(tags.close):
        return None
    at = turn_start + len(given) - len(tags.close)
    return Span(at, at)


def _opens_a_turn(before: str, after: str) -> bool:
    """Whether a tag between `before` and `after` begins what the model writes, rather than being part of a sentence."""
    return not before or before[-1] == "\n" or before[-1] in ">]｜|:" or after.startswith("\n")


def _is_quoted(text: str, start: int, stop: int) -> bool:
    """Whether quotation marks or backticks enclose the tag."""
    closing = _QUOTES.get(text[start - 1 : start])
    if closing is not None and text[stop : stop + 1] == closing:
        return True
    line_start, line_stop = text.rfind("\n", 0, start) + 1, text.find("\n", stop)
    line = text[line_start : line_stop if line_stop >= 0 else len(text)]
    return any(code.start() < start - line_start < code.end() for code in re.finditer(r"`[^`\n]+`", line))


def _fenced(text: str) -> list[Span]:
    """Fenced blocks of code that are closed; a fence with a language always opens one."""
    found: list[Span] = []
    opened: int | None = None
    for fence in _FENCE.finditer(text):
        if opened is None or fence[2].strip():
            opened = fence.start()
        else:
            found.append(Span(opened, fence.end()))
            opened = None
    return found


def _block(text: str, start: int, stop: int, *, closed: bool) -> Span:
    """The block without white space around it; what was cut off keeps its end."""
    begin = min(_skip_white(text, start), stop)
    return Span(begin, max(begin, start + len(text[start:stop].rstrip())) if closed else stop)


def _skip_white(text: str, start: int) -> int:
    return start + len(text[start:]) - len(text[start:].lstrip())
