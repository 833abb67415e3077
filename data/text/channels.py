"""The channels of gpt-oss: `analysis` is the thinking, `final` the answer, and `commentary` calls tools or speaks to the user.

openai-harmony parses the same markers into messages, but drops their place in the text, and fetches its vocabulary from the net. On 4,000
random turns of its own rendering, cut anywhere, both find the same thoughts (docs/log.md).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reasonscope.data.text.think_tags import GPT_OSS, FoundThinking, regions_from
from reasonscope.data.trace import Span

_HEADER = re.compile(
    r"(?:<\|start\|>assistant)?(?P<to> to=[^<]*)?<\|channel\|>(?P<channel>\w+)(?P<rest>[^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
_TURN = "<|start|>assistant"
# What is left of the markers if special tokens were removed from the text.
_STRIPPED = re.compile(
    r"\s*analysis(?P<thinking>.*?)assistant(?P<channel>final|commentary(?: to=[\w.]+)?)(?:\s*json)?", re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A message of a channel: where its header and its content begin, and where the content stops."""

    thinks: bool
    begin: int
    content: Span
    ended: bool


def find_channels(text: str, prompt_stop: int) -> FoundThinking:
    """The thinking of a turn of gpt-oss: its analysis messages before the last message of another channel, which is the answer."""
    parts = _parts(text, _turn_start(text, prompt_stop))
    if not parts:
        return _without_markers(text, prompt_stop)
    thoughts = [part for part in parts if part.thinks]
    if not thoughts:
        absent = regions_from(prompt_stop, prompt_stop, prompt_stop, prompt_stop, len(text))
        return FoundThinking(regions=absent, state="absent")
    doubts = tuple(_doubts(parts))
    if parts[-1].thinks:
        return replace(_cut_off(thoughts, len(text)), doubts=doubts)
    first, last = _first(thoughts), [part for part in thoughts if len(part.content)] or thoughts
    stop = last[-1].content.stop
    regions = regions_from(thoughts[0].begin, first.content.start, stop, parts[-1].content.start, len(text))
    blocks = tuple(part.content for part in last)
    return FoundThinking(
        regions=regions, state="closed" if len(regions.thinking) else "empty", blocks=blocks, doubts=doubts
    )


def _cut_off(thoughts: Sequence[_Part], end: int) -> FoundThinking:
    """Thinking that goes on to the end of the text, or up to a marker after which nothing was written."""
    last = thoughts[-1]
    stop = last.content.stop if last.ended else end
    regions = regions_from(thoughts[0].begin, min(_first(thoughts).content.start, stop), stop, end, end)
    earlier = [part.content for part in thoughts[:-1] if len(part.content)]
    blocks = (*earlier, Span(last.content.start, stop))
    return FoundThinking(regions=regions, state="truncated", blocks=blocks)


def _first(thoughts: Sequence[_Part]) -> _Part:
    """The first message with words, or else the last."""
    return next((part for part in thoughts if len(part.content)), thoughts[-1])


def _doubts(parts: Sequence[_Part]) -> list[str]:
    if not parts[-1].thinks and len(parts) > 2 and any(not part.thinks for part in parts[:-1]):
        return ["messages of other channels stand between the thinking and the answer"]
    return []


def _turn_start(text: str, prompt_stop: int) -> int:
    """The start of the turn that the prompt leaves open, with an empty analysis if the prompt closed one."""
    off = GPT_OSS.open + GPT_OSS.close
    if text[:prompt_stop].endswith(off):
        return prompt_stop - len(off)
    at = text.rfind(_TURN, 0, prompt_stop)
    return at + len(_TURN) if at >= 0 and "<|end|>" not in text[at:prompt_stop] else prompt_stop


def _parts(text: str, start: int) -> list[_Part]:
    found = []
    for header in _HEADER.finditer(text, start):
        end = _END.search(text, header.end())
        body = text[header.end() : end.start() if end else len(text)]
        begin = header.end() + len(body) - len(body.lstrip())
        stop = max(begin, header.end() + len(body.rstrip()))
        # Tools of its own, such as python, gpt-oss calls in its analysis: what they are sent is not thinking.
        thinks = header["channel"] == "analysis" and not header["to"] and " to=" not in header["rest"]
        found.append(_Part(thinks=thinks, begin=header.start(), content=Span(begin, stop), ended=end is not None))
    return found


def _without_markers(text: str, prompt_stop: int) -> FoundThinking:
    """The thinking of a text that lost its special tokens: `analysis…assistantfinal…`."""
    match = _STRIPPED.match(text, prompt_stop)
    if match is None:
        absent = regions_from(prompt_stop, prompt_stop, prompt_stop, prompt_stop, len(text))
        return FoundThinking(regions=absent, state="absent")
    start, stop = match.span("thinking")
    block = Span(start, start + len(text[start:stop].rstrip()))
    regions = regions_from(prompt_stop, block.start, block.stop, match.end(), len(text))
    doubt = "the markers of its channels are missing, and were found by their names"
    return FoundThinking(regions=regions, state="closed" if len(block) else "empty", blocks=(block,), doubts=(doubt,))
