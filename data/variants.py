"""Options with a few named values: which form of a method, which answer to compare with, which tokens to look at, how to pack weights."""

from typing import Literal

from reasonscope.data.errors import InputError

# The form of a method whose paper or code defines it differently from us.
Variant = Literal["corrected", "published"]
# The answer that states are compared with: the problem's reference solution, or the model's own answer.
Gold = Literal["reference", "own"]
# Tokens of a trace: those of the thinking, or all that were generated.
AttentionBackend = Literal["hooks", "vllm"]
Region = Literal["thinking", "generated"]
# How bitsandbytes packs weights while a model is loaded.
Quantise = Literal["4bit", "8bit"]


def is_published(variant: str) -> bool:
    """Whether `variant` asks for the method as published, defects included. Raises InputError for any other word."""
    if variant not in ("corrected", "published"):
        raise InputError(f"unknown variant {variant!r}: choose 'corrected' or 'published'")
    return variant == "published"
