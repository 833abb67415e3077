"""Traces made of what a dump holds, with an account of what could not be understood."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from tokenizers import Tokenizer

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.dump_shapes import exchanges_of
from reasonscope.data.exchange.exchanges import Exchange
from reasonscope.data.exchange.messages import Said
from reasonscope.data.text.answers import extract_answer, judge
from reasonscope.data.text.parse import THINK, ThinkTags, build_trace, regions_over_tokens, trace_from_text
from reasonscope.data.text.think_tags import GPT_OSS, KNOWN_TAGS
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Message, Problem, Regions, Span, Trace

_BARE = "without its special tokens"
_LISTED = 1000  # so many places of one reason are kept in a run; all are counted


class ChatRenderer(Protocol):
    """Renders a conversation as a model reads it, and encodes it."""

    @property
    def thinking(self) -> Thinking:
        """How thinking is found in a text that the server did not part."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What a trace says about the model."""

    @property
    def context_length(self) -> int:
        """The longest text that the model reads, in tokens."""

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, think: bool) -> str:
        """The text that the model reads, up to its own first token."""

    def restored(self, prompt: str) -> str | None:
        """A prompt that lost its special tokens, with them; None if the template writes no such prompt."""

    def reply(self, messages: Sequence[Mapping[str, Any]], said: Mapping[str, Any], tools: Sequence[Any]) -> str | None:
        """What the model writes, as its template has it; None if the template leaves the reasoning out."""

    def assembled(self, prompt: str, reasoning: str, text: str, *, ended: bool) -> str:
        """What the model writes, put together by its tags, after a prompt that may open the thinking."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt."""


@dataclass(frozen=True, kw_only=True)
class _NotUnderstood:
    """A row of a dump that is not a trace.

    Attributes:
        where: The file and the line, or what else names the place.
        reason: Why.
    """

    where: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import found.

    Attributes:
        traces: The traces.
        kinds: How many traces came in which shape.
        not_understood: Rows that are not traces, with the reason.
        n_repeated: Rows that repeat a trace that is there already, such as those of several filters of lm-eval.
        n_unanswered: Requests of a batch without an answer.
        thinking: How the thinking of most of them was found.
    """

    traces: tuple[Trace, ...]
    kinds: Mapping[str, int]
    not_understood: tuple[_NotUnderstood, ...] = ()
    n_repeated: int = 0
    n_unanswered: int = 0
    thinking: Thinking = field(default_factory=Thinking)

    @classmethod
    def of_kind(cls, kind: str, traces: Sequence[Trace]) -> "Imported":
        """Traces that were all understood."""
        return cls(traces=tuple(traces), kinds={kind: len(traces)})

    def report(self) -> dict[str, Any]:
        """The account as JSON, as a run keeps it: places are grouped by reason, and at most 1000 of each are listed."""
        reasons: dict[str, list[str]] = {}
        for one in self.not_understood:
            reasons.setdefault(one.reason, []).append(one.where)
        return {
            "kinds": dict(self.kinds),
            "reasoning": dict(
                Counter(str(trace.meta.get("reasoning_from", "the text")) for trace in self.with_reasoning)
            ),
            "with_reasoning": len(self.with_reasoning),
            "without_reasoning": len(self.traces) - len(self.with_reasoning),
            "encrypted": sum(trace.meta.get("reasoning_from") == "encrypted" for trace in self.traces),
            "cut_off_without": sum(
                trace.finish_reason == "length" and not len(trace.chars.thinking) for trace in self.traces
            ),
            "bare_prompts": sum(trace.meta.get("prompt") == _BARE for trace in self.traces),
            "repeated": self.n_repeated,
            "unanswered": self.n_unanswered,
            "not_understood": [
                {"reason": reason, "n": len(places), "places": places[:_LISTED]} for reason, places in reasons.items()
            ],
        }

    @property
    def with_reasoning(self) -> list[Trace]:
        """The traces whose thinking is not empty."""
        return [trace for trace in self.traces if len(trace.chars.thinking)]


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One turn of the assistant: what was said before, what it said, and the exchange that both are from."""

    exchange: Exchange
    asked: tuple[Said, ...]
    said: Said
    id: str
    answers: bool = True  # a turn that calls a tool and goes on is not an answer


def _is_request(row: Any) -> bool:
    """Whether a row is a request of a batch, whose answer stands elsewhere."""
    return (
        isinstance(row, Mapping)
        and row.get("custom_id") is not None
        and (isinstance(row.get("body"), Mapping) or isinstance(row.get("params"), Mapping))
        and not row.keys() & {"response", "result"}
    )


class TraceMaker:
    """Makes traces of rows, one dump at a time. With `strict` the first row that is not understood is an error."""

    def __init__(
        self,
        *,
        turn: int | Literal["last", "all"] = "last",
        renderer: ChatRenderer | None = None,
        tokenizer: Tokenizer | None = None,
        thinking: Thinking | None = None,
        strict: bool = False,
    ) -> None:
        self._turn, self._renderer, self._tokenizer, self._strict = turn, renderer, tokenizer, strict
        self._thinking = renderer.thinking if renderer else thinking or Thinking(tags=THINK)
        self._tags = self._thinking.tags or THINK
        self._says = renderer is not None or thinking is not None  # somebody says how the model thinks
        self._found: Counter[Thinking] = Counter()
        self._traces: dict[str, Trace] = {}
        self._kinds: Counter[str] = Counter()
        self._not_understood: list[_NotUnderstood] = []
        self._problems: dict[Any, str] = {}  # of each question that was asked, the id of its problem
        self._samples: Counter[str] = Counter()
        self._n_repeated = self._n_unanswered = self.n_rows = 0

    def add_all(self, rows: Iterable[tuple[str, Any]]) -> None:
        """Make traces of `rows`. The requests of a batch may come before or after their answers."""
        found, requests = [], {}
        for where, row in rows:
            if _is_request(row):
                requests[str(row["custom_id"])] = row.get("body") or row.get("params")
            else:
                found.append((where, row))
        answered = {str(row["custom_id"]) for _, row in found if isinstance(row, Mapping) and "custom_id" in row}
        self._n_unanswered += len(requests.keys() - answered)
        for where, row in found:
            self.n_rows += 1
            try:
                self._add(row, where, requests)
            except InputError as error:
                if self._strict:
                    raise
                self._not_understood.append(_NotUnderstood(where=where, reason=_reason(error, where)))

    def imported(self, source: str) -> Imported:
        """What was found. Raises InputError if that is nothing."""
        if not self._traces:
            left = [f"{one.where}: {one.reason}" for one in self._not_understood[:1]]
            n = f"none of its {self.n_rows} rows is understood, the first because: " if left else ""
            raise InputError(f"{source} has no completions; {n}{''.join(left)}".rstrip("; "))
        return Imported(
            traces=tuple(self._traces.values()),
            kinds=dict(self._kinds),
            not_understood=tuple(self._not_understood),
            n_repeated=self._n_repeated,
            n_unanswered=self._n_unanswered,
            thinking=max(self._found, key=self._found.__getitem__, default=self._thinking),
        )

    @property
    def _between_tags(self) -> Thinking:
        return Thinking(tags=self._tags)

    def _found_by(self, said: Said) -> Thinking:
        """How the thinking of a message is found: between tags if it was parted or has them, whatever its model usually does."""
        if said.reasoning or self._tags.open in said.text or self._tags.close in said.text:
            return self._between_tags
        tags = None if self._says else next(filter(said.begins_with, (GPT_OSS, *KNOWN_TAGS)), None)
        return Thinking(tags=tags) if tags else self._thinking

    def _add(self, row: Any, where: str, requests: Mapping[str, Mapping[str, Any]]) -> None:
        if isinstance(row, InputError):
            raise row
        for exchange in exchanges_of(row, where, requests):
            for turn in self._turns(exchange, exchange.id or _default_id(where), where):
                self._keep(self._trace(turn, where), where, exchange.kind)

    def _turns(self, exchange: Exchange, id: str, where: str) -> Iterator[_Turn]:
        said = exchange.said
        if said[-1].role != "assistant":
            raise InputError(f"{where}: the last message is the {said[-1].role}'s; it must be the assistant's")
        all_ends = [i for i, one in enumerate(said) if one.role == "assistant"]
        ends = all_ends if self._turn == "all" else all_ends[-1:]
        if isinstance(self._turn, int):
            if self._turn > len(all_ends):
                raise InputError(
                    f"{where}: has {len(all_ends)} turns of the assistant, and turn {self._turn} was asked for"
                )
            ends = all_ends[self._turn - 1 : self._turn]
        for end in ends:
            number = all_ends.index(end) + 1
            meta = {"turn": number, "turns": len(all_ends)} if len(all_ends) > 1 else {}
            last = end == all_ends[-1]
            yield _Turn(
                exchange=replace(
                    exchange,
                    meta={**exchange.meta, **meta},
                    group=exchange.group or id * (self._turn == "all"),
                    finish=exchange.finish if last else "stop",
                    token_ids=exchange.token_ids if last else (),
                ),
                asked=said[:end],
                said=said[end],
                answers=last or not said[end].calls,
                id=f"{id}/turn-{number}" if self._turn == "all" and len(all_ends) > 1 else id,
            )

    def _keep(self, trace: Trace, where: str, kind: str) -> None:
        known = self._traces.get(trace.id)
        if known is not None and self._strict:
            raise InputError(f"{where}: the id {trace.id!r} came before; ids must be unique")
        if known is not None and known.text == trace.text:
            self._n_repeated += 1
            return
        id, number = trace.id, 1
        while id in self._traces:
            number += 1
            id = f"{trace.id}-{number}"
        self._traces[id] = replace(trace, id=id)
        self._kinds[kind] += 1
        self._samples[trace.problem.id] += 1

    def _trace(self, turn: _Turn, where: str) -> Trace:
        said, exchange = turn.said, turn.exchange
        if exchange.prompt is None and not (said.text or said.reasoning or said.calls):
            why = "its reasoning is encrypted, and it has no text" if said.name == "encrypted" else "it is empty"
            raise InputError(f"{where}: the assistant's message has no text that can be read: {why}")
        problem = self._problem(turn)
        meta = {**exchange.meta, **({"reasoning_from": said.name} if said.name else {})}
        if said.calls:
            meta["tool_calls"] = [dict(call) for call in said.calls]
        fields: dict[str, Any] = {
            "id": turn.id,
            "problem": problem,
            "finish_reason": exchange.finish,
            "sample": self._samples[problem.id] if exchange.sample is None else exchange.sample,
            "model": exchange.model,
            "meta": meta,
        }
        self._found[self._found_by(said)] += 1
        made = self._rendered(turn, fields, where) if self._renderer else self._plain(turn, fields)
        return _with_reasoning_at(made, said.reasoning.strip(), self._tags, closed=not _cut_off(turn))

    def _problem(self, turn: _Turn) -> Problem:
        exchange = turn.exchange
        asked = (exchange.prompt, tuple((one.role, one.text, repr(one.calls)) for one in turn.asked))
        known = self._problems.get(asked) if exchange.prompt or turn.asked else None
        id = exchange.problem_id or known or turn.id
        self._problems.setdefault(asked, id)
        plain = (
            exchange.prompt is None and turn.asked and not exchange.tools and all(_is_plain(one) for one in turn.asked)
        )
        return Problem(
            id=id,
            messages=tuple(Message(role=one.role, content=one.text) for one in turn.asked) if plain else (),
            prompt=None if plain else _plain_prompt(turn),
            answer=exchange.gold if turn.answers else None,
            group=exchange.group,
            difficulty=exchange.difficulty,
            meta=exchange.about,
        )

    def _plain(self, turn: _Turn, fields: dict[str, Any]) -> Trace:
        """Without a model: roles before contents, and the reasoning between tags."""
        said, tags = turn.said, self._tags
        thought = said.reasoning.strip()
        if not thought and self._found_by(said).tags == GPT_OSS:
            completion = re.sub(
                r"<\|(?:return|call|end)\|>\s*$", "", said.with_calls
            )  # what ends a turn, not a word of it
            fields = {**fields, "finish_reason": "stop"} if completion != said.with_calls else fields
        elif not thought:
            completion = said.with_calls
        elif _cut_off(turn):
            completion = f"{tags.open}\n{thought}"
        else:
            completion = f"{tags.open}\n{thought}\n{tags.close}\n\n{said.with_calls}"
        thinking, prompt = self._found_by(said), _plain_prompt(turn)
        return trace_from_text(
            prompt=prompt, completion=completion, tokenizer=self._tokenizer, thinking=thinking, **fields
        )

    def _rendered(self, turn: _Turn, fields: dict[str, Any], where: str) -> Trace:
        """With a model: as its template has it, by the token ids of the server if they are in the dump."""
        renderer, exchange, said = self._renderer, turn.exchange, turn.said
        assert renderer is not None
        tokenizer = renderer.tokenizer
        messages = [one.for_template() for one in turn.asked]
        prompt_ids, ids = list(exchange.prompt_ids), list(exchange.token_ids)
        if not prompt_ids:
            thinks = bool(said.reasoning) or exchange.finish == "length" or self._tags.close in said.text
            prompt = exchange.prompt
            if prompt is not None and exchange.bare:
                restored = renderer.restored(prompt)
                fields["meta"] = {**fields["meta"], "prompt": "restored" if restored else _BARE}
                prompt = restored or prompt
            if prompt is None or turn.asked:
                prompt = (prompt or "") + renderer.prompt(messages, exchange.tools, think=thinks) if messages else ""
            prompt_ids = renderer.encode(prompt)
        if ids:
            _check_ids([*prompt_ids, *ids], said, tokenizer, where)
        else:
            prompt = tokenizer.decode(prompt_ids, skip_special_tokens=False)
            ids = tokenizer.encode(self._completion(turn, messages, prompt), add_special_tokens=False).ids
        if len(prompt_ids) + len(ids) > renderer.context_length:
            raise InputError(
                f"{where}: its {len(prompt_ids) + len(ids)} tokens are more than the model's context of {renderer.context_length}"
            )
        written = exchange.prompt is None and turn.asked
        if fields["problem"].prompt is not None and (written or fields["meta"].get("prompt") == "restored"):
            text = tokenizer.decode(prompt_ids, skip_special_tokens=False)
            fields["problem"] = replace(fields["problem"], prompt=text)
        known = {"name": exchange.model.get("name")} if exchange.model.get("name") else {}
        fields["model"] = {**renderer.fingerprint, **({"served_as": known["name"]} if known else {})}
        return build_trace(
            token_ids=[*prompt_ids, *ids],
            n_prompt_tokens=len(prompt_ids),
            tokenizer=tokenizer,
            thinking=self._found_by(said),
            **fields,
        )

    def _completion(self, turn: _Turn, messages: list[dict[str, Any]], prompt: str) -> str:
        renderer, said, exchange = self._renderer, turn.said, turn.exchange
        assert renderer is not None
        if messages and not _cut_off(turn) and (said.reasoning or said.calls):
            written = renderer.reply(messages, said.for_template(), exchange.tools)
            if written is not None:
                return written
        return renderer.assembled(prompt, said.reasoning.strip(), said.with_calls, ended=exchange.finish == "stop")


def _with_reasoning_at(trace: Trace, reasoning: str, tags: ThinkTags, *, closed: bool) -> Trace:
    """The trace with `reasoning` as its thinking, although it may mention the tags by which it would be found."""
    prompt_stop = int(trace.offsets[trace.n_prompt_tokens, 0]) if trace.n_prompt_tokens < len(trace.offsets) else 0
    start = trace.text.find(reasoning, max(prompt_stop, trace.chars.prompt.stop)) if reasoning else -1
    if start < 0:
        return trace
    stop, end = start + len(reasoning), len(trace.text)
    close = trace.text.find(tags.close, stop) if closed else -1
    rest = trace.text[close + len(tags.close) :] if close >= 0 else ""
    chars = Regions(
        prompt=Span(0, min(trace.chars.open.start, start)),
        open=Span(min(trace.chars.open.start, start), start),
        thinking=Span(start, stop if close >= 0 else end),
        close=Span(stop if close >= 0 else end, end - len(rest.lstrip())),
        answer=Span(end - len(rest.lstrip()), end),
        close_window=Span(stop if close >= 0 else end, end - len(rest.lstrip())),
    )
    if chars == trace.chars:
        return trace
    final = extract_answer(trace.text[chars.answer.slice]) if close >= 0 else None
    gold = trace.problem.answer
    return replace(
        trace,
        chars=chars,
        tokens=regions_over_tokens(chars, trace.offsets) if len(trace.offsets) else trace.tokens,
        state="closed" if close >= 0 else "truncated",
        final_answer=final,
        correct=None if gold is None else judge(final, gold),
        meta={name: value for name, value in trace.meta.items() if name != "thinking"},  # it was of other regions
    )


def _cut_off(turn: _Turn) -> bool:
    """Whether the model was still thinking when it stopped: it has reasoning, and nothing after it."""
    said = turn.said
    return bool(said.reasoning) and not (said.text.strip() or said.calls)


def _plain_prompt(turn: _Turn) -> str:
    turns = [f"{one.role}: {one.with_calls}\n\n" for one in turn.asked]
    if turn.exchange.prompt is not None or not turns:
        return "".join([turn.exchange.prompt or "", *turns])
    return "".join(turns) + "assistant: "


def _is_plain(said: Said) -> bool:
    return said.role in ("system", "user", "assistant") and not said.calls


def _check_ids(ids: Sequence[int], said: Said, tokenizer: Tokenizer, where: str) -> None:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    told = re.sub(r"\s+", "", said.text)[:200]
    if max(ids) >= size or told not in re.sub(r"\s+", "", tokenizer.decode(list(ids), skip_special_tokens=False)):
        raise InputError(f"{where}: its token ids do not spell its text; the dump is of a model with another tokenizer")


def _default_id(where: str) -> str:
    named = re.fullmatch(r"(.*), (?:line|element|row|sample) (\d+)", where, re.DOTALL)
    return f"{Path(named[1]).stem}-{named[2]}" if named else Path(where).stem


def _reason(error: InputError, where: str) -> str:
    return str(error).removeprefix(where).removeprefix(": ")
