"""Compares answers as mathematics, one pair per line, in a process of its own that the kernel ends when it takes too long.

A signal handler of Python cannot interrupt a power or a factorial of large numbers, which is one call in C. A signal
without a handler ends the process even there, so the limits of time are timers of the kernel, and nobody has to wait.
"""

import json
import logging
import resource
import signal
import sys

from math_verify import parse, verify

# Seconds of processor time for one pair, seconds on the clock, and bytes of memory.
_PROCESSOR, _CLOCK, _MEMORY = 2.0, 5.0, 2 * 2**30


def _same_mathematics(given: str, gold: str) -> bool | None:
    """Whether two answers are the same mathematics, or None if that needs more memory or depth than there is."""
    try:
        left, right = (parse(_as_latex(answer), parsing_timeout=None, raise_on_error=False) for answer in (gold, given))
        return bool(left and right and verify(left, right, timeout_seconds=None, raise_on_error=False))
    except (MemoryError, RecursionError):  # raise_on_error=False catches neither
        return None


def _within_limits(given: str, gold: str) -> bool | None:
    """As `_same_mathematics`; the kernel ends this process if it takes too long."""
    signal.setitimer(signal.ITIMER_PROF, _PROCESSOR)
    signal.setitimer(signal.ITIMER_REAL, _CLOCK)
    try:
        return _same_mathematics(given, gold)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _as_latex(answer: str) -> str:
    r"""In dollars, unless it has its own: otherwise bare LaTeX is read as a plain expression and \frac is lost."""
    return answer if "$" in answer or "\\(" in answer else f"${answer}$"


def main() -> None:
    logging.disable()  # math-verify warns, on every call, that its own time limit is off
    for limit in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(limit, signal.SIG_DFL)  # a parent that ignores them would pass that on
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        given, gold = json.loads(line)
        sys.stdout.write(f"{json.dumps(_within_limits(given, gold))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
