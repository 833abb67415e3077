"""The two forms of a method that the paper or its code defines one way and we define another."""

from typing import Literal

from reasonscope.data.errors import InputError

Variant = Literal["corrected", "published"]


def is_published(variant: str) -> bool:
    """Whether `variant` asks for what was published, defects included. Raises InputError for any other word."""
    if variant not in ("corrected", "published"):
        raise InputError(f"variant {variant!r}: choose 'corrected' or 'published'")
    return variant == "published"
