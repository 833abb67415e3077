"""Choices that are made with one word: which form of a method, which answer to compare with, which tokens to look at."""

from typing import Literal

from reasonscope.data.errors import InputError

# Of a method that the paper or its code defines one way and we define another.
Variant = Literal["corrected", "published"]
# The answer that states are compared with: the problem's reference solution, or the model's own answer.
Gold = Literal["reference", "own"]
# Tokens of a trace: those of the thinking, or all that were generated.
Region = Literal["thinking", "generated"]


def is_published(variant: str) -> bool:
    """Whether `variant` asks for what was published, defects included. Raises InputError for any other word."""
    if variant not in ("corrected", "published"):
        raise InputError(f"variant {variant!r}: choose 'corrected' or 'published'")
    return variant == "published"
