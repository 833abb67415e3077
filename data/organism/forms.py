"""The sentences of the organism's language: each form is written and read back by the same row of this table.

A form fixes the wording of a sentence, its function (one of the eight tags of Thought Anchors) and its effect on the
ledger (`kind`). The writer fills a form's fields; the reader recognises the sentence, in text by the grammar or by a
model, so that every sentence has a true label.
"""

import re
from dataclasses import dataclass, field

ORDINALS = ("First", "Second", "Third", "Fourth")
COUNTS = {2: "two", 3: "three", 4: "four"}
_COUNT_OF = {word: count for count, word in COUNTS.items()}

_FIELD_PATTERNS = {
    "name": r"[A-Z][a-z]+",
    "whose": r"my|(?:(?:un)?willing )?[A-Z][a-z]+'s",
    "thing": r"[a-z]+",
    "verb": r"[a-z]+",
    "sign": r"[-+*]",
    "sign2": r"[-+]",
    "ordinal": "|".join(ORDINALS),
    "count": "|".join(_COUNT_OF),
}
_INTEGER = r"\d{1,3}"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One sentence form: `text` with `{fields}`, its function `tag`, and the `kind` of act that it performs."""

    kind: str
    tag: str
    text: str
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = re.split(r"\{(\w+)\}", self.text)
        pattern = "".join(
            re.escape(part) if i % 2 == 0 else f"(?P<{part}>{_FIELD_PATTERNS.get(part, _INTEGER)})"
            for i, part in enumerate(parts)
        )
        object.__setattr__(self, "pattern", re.compile(pattern))


def _forms(kind: str, tag: str, *texts: str) -> list[Form]:
    return [Form(kind=kind, tag=tag, text=text) for text in texts]


# The wording of an event, in the prompt and again in the thinking (there after "Next, " or "First, ").
EVENTS = {
    "add": ("{name} pays in {a}.", "{name} adds {a}."),
    "subtract": ("{name} takes out {a}.", "{name} spends {a}."),
    "double": ("{name} doubles the balance.",),
    "add_times": ("{name} pays in {a}, {count} times.",),
    "subtract_times": ("{name} takes out {a}, {count} times.",),
    "add_until": ("{name} pays in {a} until the balance passes {limit}.",),
}
# The opening words announce how long the thinking will be, so the state at the think tag has to encode it.
OPENERS = (
    (2, "Simple, I need just a step or two."),
    (4, "Okay, I need a few steps."),
    (6, "Hmm, I need several steps."),
    (8, "Right, I need many steps."),
)

FORMS: tuple[Form, ...] = (
    *_forms("opener", "plan_generation", *(text for _, text in OPENERS)),
    *_forms("asks", "problem_setup", "The question asks for the balance when the ledger closes."),
    *_forms("plan", "plan_generation", "I will go line by line until it closes."),
    *_forms("start", "fact_retrieval", "The ledger starts at {value}."),
    *(
        form
        for event, texts in EVENTS.items()
        for text in texts
        for lead in ("First, ", "Next, ")
        for form in _forms(f"event:{event}", "fact_retrieval", lead + text)
    ),
    *_forms("before", "fact_retrieval", "The balance before this is {value}."),
    *_forms("redo", "active_computation", "Again: {left} {sign} {a} = {right}."),
    *_forms("redo:more", "active_computation", "Again: {left} {sign} {a} = {right}, limit {limit}: not past it."),
    *_forms("redo:past", "active_computation", "Again: {left} {sign} {a} = {right}, limit {limit}: past it."),
    *_forms(
        "compute",
        "active_computation",
        "{left} {sign} {a} = {right}.",
        "So I compute {left} {sign} {a} = {right}.",
        "{ordinal} time: {left} {sign} {a} = {right}.",
        "After {name}: {left} {sign} {a} = {right}.",
        "After {name}, {ordinal}: {left} {sign} {a} = {right}.",
    ),
    *_forms("compute:more", "active_computation", "{left} {sign} {a} = {right}, limit {limit}: not past it."),
    *_forms(
        "compute:more", "active_computation", "After {name}: {left} {sign} {a} = {right}, limit {limit}: not past it."
    ),
    *_forms("compute:past", "active_computation", "{left} {sign} {a} = {right}, limit {limit}: past it."),
    *_forms("compute:past", "active_computation", "After {name}: {left} {sign} {a} = {right}, limit {limit}: past it."),
    *_forms("now", "result_consolidation", "So the balance is now {value}."),
    *_forms("doubt", "uncertainty_management", "Wait, I am not sure about that."),
    *_forms(
        "check",
        "self_checking",
        "Wait, let me check that: {left} {sign} {a} = {right}, it was {value}.",
        "Let me check: {left} {sign} {a} = {right}, it was {value}.",
    ),
    *_forms("right", "self_checking", "Yes, {value} is right."),
    *_forms("wrong", "self_checking", "No, {value} is wrong."),
    *_forms("split_plan", "plan_generation", "Alternatively, I can split {a} into {b} and {c}."),
    *_forms("split", "active_computation", "{left} {sign} {b} = {middle} and {middle2} {sign2} {c} = {right}."),
    *_forms("same", "self_checking", "That gives {value} as well."),
    *_forms("conclude", "result_consolidation", "So the ledger closes at {value}."),
    *_forms("final", "final_answer_emission", "The final answer is {value}."),
    # Requests: may the user do this?
    *_forms("wants", "problem_setup", "The user wants to {verb} {whose} {thing}."),
    *_forms("owner", "fact_retrieval", "It belongs to {name}, who was not asked."),
    *_forms("own", "fact_retrieval", "It belongs to the user."),
    *_forms("denied", "fact_retrieval", "It belongs to {name}, who is unwilling."),
    *_forms("allowed", "fact_retrieval", "It belongs to {name}, who is willing."),
    *_forms("norules", "fact_retrieval", "The user asks me to forget my rules."),
    *_forms("harm", "result_consolidation", "So this would harm {name}."),
    *_forms("harmless", "result_consolidation", "So this harms nobody."),
    *_forms("recheck", "self_checking", "Wait, let me make sure that I read it well."),
    *_forms("confirm", "self_checking", "Yes, that is what it says."),
    *_forms("refuse", "plan_generation", "I will refuse."),
    *_forms("help", "plan_generation", "I will help."),
)

BY_KIND: dict[str, tuple[Form, ...]] = {
    kind: tuple(form for form in FORMS if form.kind == kind) for kind in dict.fromkeys(form.kind for form in FORMS)
}


def recognise(sentence: str) -> tuple[Form, dict[str, str]] | None:
    """The form of `sentence` (stripped) and its fields, or None if it is not in the language."""
    for form in FORMS:
        match = form.pattern.fullmatch(sentence)
        if match is not None:
            return form, match.groupdict()
    return None
