"""Final answers: how they are found in a text and compared with the gold answer."""

import re
from fractions import Fraction

from reasonscope.data.grading.grader import same_mathematics

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?|-?\.\d+")
_STATED = re.compile(
    r"(?:\b(?:answer|(?:correct|right|best) (?:option|choice))\b[*_]*(?:\s+is\b|\s*[:=])|####)[\s:*_$]*([^\n]+)",
    re.IGNORECASE,
)
_STATES = re.compile(r"\\f?boxed\b|\banswer\b[*_]*\s*(?:is\b|should be\b|must be\b|[:=])|####", re.IGNORECASE)
_CHOICE = re.compile(r"\(([a-z])\)")
# Tokens that end a turn; nothing else in a model's answer has this form.
CONTROL = re.compile(r"<[|｜][^<>]*[|｜]>|</?s>|<eos>|<(?:start|end)_of_turn>")
_BOX = re.compile(r"\\f?boxed\b\s*")
_WORD = re.compile(r"[^\s$.,]+")
_BRACE = re.compile(r"(?<!\\)[{}]")
# Fences, sizes, spaces and units of style do not change the value; they are removed before strings are compared.
_DECORATION = re.compile(
    r"\\(?:left|right|[,;!:]|displaystyle|quad|qquad)(?![a-zA-Z])|\\?[$]|\\text(?:bf|rm|it)?(?=\{)|[*]{2}|\s+"
)
# Powers that sympy would expand, and the factorials that it can; whether answers with others are right is not decided.
_TOWER = re.compile(r"\^\s*\{?\s*\(?-?\d{4,}|\^[^+\-=,]*\^|\*\*[^+\-=,]*\*\*|\*\*\s*\(?-?\d{4,}|\d{400,}")
_SMALL_FACTORIAL = re.compile(r"(?<![\d!.])\d{1,2}!(?!\s*!)")
_LONGEST = 300


def extract_answer(text: str) -> str | None:
    r"""The final answer that a text states: its last \boxed{…}, else what follows its last "answer is", else its last
    number.

    Args:
        text: An answer, without the thinking.

    Returns:
        The answer as text, or None.

    Example:
        rs.data.extract_answer(r"So the sum is \boxed{408}.")  # "408"
        rs.data.extract_answer("The answer is 17/3.")  # "17/3"
        rs.data.extract_answer("I do not know.")  # None
    """
    text = CONTROL.sub(" ", text)
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    stated = _STATED.findall(text)
    if stated:
        answer = re.split(r"[.!?](?:\s|$)", stated[-1].strip(), maxsplit=1)[0].strip(" *_$")
        if answer:
            return answer
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def stated_answer(sentence: str) -> str | None:
    """The answer that a sentence states explicitly ("the answer is", a box), else None."""
    return extract_answer(sentence) if _STATES.search(sentence) else None


def judge(given: str | None, gold: str) -> bool | None:
    """Whether two answers have the same value: as text, as numbers, or else as mathematics (math-verify); None if undecided.

    Never raises and never hangs: mathematics is compared in a process of its own, with 2 seconds and 2 GiB. Towers of powers and
    factorials of large numbers are not tried, and text of more than 300 characters is compared as text.
    """
    if given is None:
        return False
    left, right = _plain(given), _plain(gold)
    if left == right:
        return bool(left)
    numbers = _number(left), _number(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if max(len(given), len(gold)) > _LONGEST or not (left and right):
        return False
    return None if _explosive(given) or _explosive(gold) else same_mathematics(given, gold)


def equivalent(given: str | None, gold: str) -> bool:
    r"""Whether two answers have the same value, as `judge` decides it; False if it is not decided.

    Args:
        given: The answer to judge; None is never right.
        gold: The gold answer.

    Returns:
        True if both have the same value.

    Example:
        rs.data.equivalent("0.5", r"\frac{1}{2}")  # True
        rs.data.equivalent("12 %", "12")  # True
        rs.data.equivalent(None, "12")  # False
    """
    return judge(given, gold) is True


def _explosive(answer: str) -> bool:
    """Whether expanding `answer` could take forever: towers of powers, or factorials of anything but a number below
    100."""
    plain = answer.replace("\\!", "")  # a thin space
    factorials = "!" in plain and ("^" in plain or "**" in plain or "!" in _SMALL_FACTORIAL.sub("", plain))
    return factorials or bool(_TOWER.search(plain))


def _last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} that is closed; braces nest, and \boxed 5 takes the next word."""
    starts = [match.end() for match in _BOX.finditer(text)]
    closed = _closed(text) if starts else {}
    for start in reversed(starts):
        if text.startswith("{", start):
            if start in closed:
                return text[start + 1 : closed[start]].strip()
        elif word := _WORD.match(text, start):
            return word[0]
    return None


def _closed(text: str) -> dict[int, int]:
    """For each brace that opens in `text`, the place of its closing brace; braces that stay open or follow a backslash
    are left out."""
    closed: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif opened:
            closed[opened.pop()] = match.start()
    return closed


def _plain(answer: str) -> str:
    """`answer` without its box, decoration and final stop, in lower case."""
    boxed = _last_boxed(answer)
    plain = _DECORATION.sub("", answer if boxed is None else boxed).rstrip(".").lower()
    while plain.startswith("{") and plain.endswith("}") and plain.count("{") == 1:
        plain = plain[1:-1]
    if choice := _CHOICE.fullmatch(plain):
        plain = choice[1]
    return plain.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\%", "%")


def _number(plain: str) -> Fraction | None:
    """The value of 1,234.50, -3/4 or 12 % (read as 12: gold answers give percentages with and without the sign),
    else None."""
    digits = plain.removesuffix("%").removeprefix("+").replace("{", "").replace("}", "")
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
        digits = digits.replace(",", "")
    if not re.fullmatch(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?", digits):
        return None
    try:
        numerator, _, denominator = digits.partition("/")
        return Fraction(numerator) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return None
