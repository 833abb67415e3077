"""A griffe extension: the lines below `Example:` in a docstring are shown as Python."""

import re

import griffe

_EXAMPLE = re.compile(r"^Example:\n((?:    .*\n?|\n)+)", flags=re.MULTILINE)


def _fenced(match: re.Match[str]) -> str:
    code = match.group(1).rstrip()
    return f"Example:\n    ```python\n{code}\n    ```\n"


class ExamplesAsCode(griffe.Extension):
    """Puts a fence around each example, so that it is not read as running text."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None and "```" not in obj.docstring.value:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)
