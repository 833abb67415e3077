"""What came into a run, what left it, and whether it is whole: for people."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reasonscope.data.exchange.imported import Imported
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import Summary, in_hundredths, plural
from reasonscope.data.text.published_chunks import published_sentences
from reasonscope.data.text.sentence_labels import label_sentences
from reasonscope.data.text.steps_and_sentences import sentences
from reasonscope.data.text.think_tags import THINK
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Sentence, ThinkingState, Trace

_SHOWN = 3  # places of one reason
_HAS_TEXT = "The run holds text only; analyses that need activations load a model."
_HAS_TOKENS = (
    "The run holds text, and tokens as the model's own template and tokenizer have them; analyses load the model."
)
# What a state of the thinking means to somebody who wonders why a trace is left out.
_STATES: Mapping[ThinkingState, str] = {
    "closed": "",
    "truncated": "Cut off while thinking, and without an answer: {n} of the traces.",
    "empty": "Without a word of thinking before the answer: {n} of the traces.",
    "absent": "Without thinking that could be found, so that probes and steering leave them out: {n} of the traces.",
}


def check_summary(run: str, store: TraceStore) -> Summary:
    """What a run holds, once every byte of it was found to be as it was written."""
    outcomes = _Outcomes(store)
    account = store.meta.get("imported", {}).get("report", {})
    model = store.meta.get("model", {}).get("name")
    rows = [
        ("traces", outcomes.states),
        ("thinking", _thinking(store.meta, outcomes)),
        ("problems", str(outcomes.n_problems)),
        ("right answers", outcomes.right),
        ("model", str(model or "not known (imported text)")),
        ("sites", _sites(store.sites)),
    ]
    if steered := store.meta.get("steered"):
        rows.append(("steered by", f"{steered['name']} ({steered['hash']})"))
    return Summary(
        finding=f"{run}: {plural(outcomes.n, 'trace')}, every byte as it was written.",
        columns=("what", "value"),
        rows=rows,
        notes=[*([f"The import: {_understood(account)}.", *_left_out(account)] if account else []), *outcomes.doubts],
        next_command=f"reasonscope app {run}",
    )


def _thinking(meta: Mapping[str, Any], outcomes: "_Outcomes") -> str:
    """How thinking was found, and by which rules if in the open."""
    found = Thinking.of_meta(meta)
    if found is None:
        return "between think tags"
    if found.mode == "completion":
        by = f"the pattern {found.answer_pattern}" if found.answer_pattern else outcomes.rules
        return f"in the open; the answer was found by {by}" if by else "in the open"
    return "none" if found.mode == "none" else f"between {(found.tags or THINK).open} and {(found.tags or THINK).close}"


def import_summary(out: str, imported: Imported, sites: Sequence[str] = ()) -> Summary:
    """How much was understood, in which state the thinking is, and how many sentences carry which tag: published ones
    beside ours."""
    traces, outcomes = imported.traces, _Outcomes(imported.traces)
    ours = Counter(sentence.tag for trace in traces for sentence in sentences(trace))
    placed = [published_sentences(trace) for trace in traces if "chunks" in trace.meta]
    known = [sentence for found in placed for sentence in found]
    published = Counter(sentence.tag for sentence in known)
    columns, counts = ["tag of the sentence", "our sentences"], [ours]
    if known:
        columns, counts = [*columns, "published"], [ours, published]
    rows = [(tag, *(str(count[tag]) for count in counts)) for tag in sorted(ours.keys() | published.keys())]
    rows.append(("all", *(str(count.total()) for count in counts)))
    return Summary(
        finding=f"{plural(outcomes.n, 'trace')} in {out}, read as {' and '.join(imported.kinds)}: {_understood(imported.report())}; "
        f"{outcomes.states}; right answers: {outcomes.right}.",
        columns=columns,
        rows=rows,
        notes=[
            *outcomes.notes,
            *_left_out(imported.report()),
            *outcomes.doubts,
            *_agreement(placed),
            _holds(traces, sites),
        ],
        next_command=f"reasonscope app {out}",
    )


def export_summary(out: str, form: str, n: int) -> Summary:
    """How much was written, and what reads it."""
    return Summary(
        finding=f"{plural(n, 'trace')} in {out} ({form}): text, labels and answers, without activations.",
        next_command="" if form == "parquet" else f"reasonscope import {out} --out RUN",
    )


def _holds(traces: Sequence[Trace], sites: Sequence[str]) -> str:
    if sites:
        return f"The run holds text, tokens and activations ({_sites(sites)})."
    return _HAS_TOKENS if any(len(trace.token_ids) for trace in traces) else _HAS_TEXT


def _understood(account: Mapping[str, Any]) -> str:
    """How many traces have reasoning, how many have none, and how many rows were not understood."""
    unread = sum(one["n"] for one in account["not_understood"])
    names = ", ".join(account["reasoning"])
    return (
        f"{account['with_reasoning']} with reasoning{f' (from {names})' * bool(names)}, "
        f"{account['without_reasoning']} without, {unread} not understood"
    )


def _left_out(account: Mapping[str, Any]) -> list[str]:
    """What did not become a trace, or not the whole of it, one line for each reason."""
    n = account["encrypted"]
    told = [f"The provider keeps the reasoning of {n} of the traces to itself (encrypted or redacted)."] * bool(n)
    n = account["reasoning"].get("summary", 0)
    told += [
        f"Of {n} of the traces there is a summary of the reasoning, written by the provider, not the reasoning."
    ] * bool(n)
    n = account["cut_off_without"]
    told += [
        f"Cut off, and without reasoning: {n} of the traces. Some servers take unfinished thinking for the answer."
    ] * bool(n)
    n = account.get("bare_prompts", 0)
    told += [
        f"The prompts of {n} of the traces lost their special tokens, and the model's template does not write them: they are read as "
        "they are."
    ] * bool(n)
    n = account["repeated"]
    told += [f"{n} row{'s repeat' if n > 1 else ' repeats'} a trace that is there already."] * bool(n)
    n = account["unanswered"]
    told += [f"{n} request{'s' * (n > 1)} of the batch ha{'ve' if n > 1 else 's'} no answer."] * bool(n)
    for one in account["not_understood"]:
        more = f" and {one['n'] - _SHOWN} more" if one["n"] > _SHOWN else ""
        told.append(f"Not understood: {', '.join(one['places'][:_SHOWN])}{more}: {one['reason']}.")
    return told


class _Outcomes:
    """Counts over traces, in words."""

    def __init__(self, traces: Iterable[Trace]) -> None:
        told, self._doubts, self._rules, self._several = [], Counter[str](), Counter[str](), 0
        for trace in traces:
            told.append((trace.state, trace.correct, trace.undecided, trace.problem.id))
            meta = trace.meta.get("thinking", {})
            self._doubts.update(meta.get("doubts", ()))
            self._rules.update([meta["answer_by"]] if "answer_by" in meta else [])
            self._several += len(trace.thinking_spans) > 1
        self.n, self.n_problems = len(told), len({problem for *_, problem in told})
        self._states = Counter(state for state, *_ in told)
        self._right = Counter(correct for _, correct, *_ in told if correct is not None)
        self._undecided = sum(undecided for _, _, undecided, _ in told)

    @property
    def states(self) -> str:
        return ", ".join(f"{n} {state}" for state, n in self._states.most_common()) or "none"

    @property
    def rules(self) -> str:
        """How often each rule found the answer of reasoning in the open."""
        return ", ".join(f"{rule} ({n})" for rule, n in self._rules.most_common())

    @property
    def doubts(self) -> list[str]:
        """What could be read in another way, and in how many traces."""
        several = (
            [f"Thinking in several blocks, which are counted together: {self._several} of the traces."]
            if self._several
            else []
        )
        return [*several, *(f"Doubtful in {plural(n, 'trace')}: {doubt}." for doubt, n in self._doubts.most_common())]

    @property
    def right(self) -> str:
        n = self._right.total()
        if not n:
            return "not decided" if self._undecided else "not known (no gold answers)"
        given_up = f", {self._undecided} not decided" if self._undecided else ""
        return f"{self._right[True]} of {n} ({in_hundredths(self._right[True] / n)}){given_up}"

    @property
    def notes(self) -> list[str]:
        return [said.format(n=self._states[state]) for state, said in _STATES.items() if said and self._states[state]]


def _sites(sites: Sequence[str]) -> str:
    if len(sites) > 4:
        return f"{len(sites)}: {sites[0]} … {sites[-1]}"
    return ", ".join(sites) or "none: text only"


def _agreement(placed: Sequence[Sequence[Sentence]]) -> list[str]:
    """How often our rules give the first published tag of a published sentence."""
    pairs = [
        (sentence.tag, label)
        for known in placed
        for sentence, label in zip(known, label_sentences([sentence.text for sentence in known]), strict=True)
    ]
    if not pairs:
        return []
    agree = sum(published == ours for published, ours in pairs) / len(pairs)
    return [f"Our labels of the published sentences agree with the published tags on {agree:.1%} of them."]
