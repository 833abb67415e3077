"""The lint of the prose finds what it forbids, in every kind of text, and lets good English pass."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "prose.py"
spec = importlib.util.spec_from_file_location("prose", SCRIPT)
assert spec is not None
assert spec.loader is not None
prose = importlib.util.module_from_spec(spec)
sys.modules["prose"] = prose  # dataclasses look their module up
spec.loader.exec_module(prose)

STILTED = {
    "behind": "the token behind it",
    "is no": "a file that is\nno store",
    "hangs on": "what the answer hangs on",
    "anew": "written anew",
    "one a row": "give one a row",
    "of all that": "Of all that is drawn.",
    "where for if": "None where there is nothing to read",
    "a thinking": "how a thinking ends",
    "bears": "the file that bears the name",
    "to be had": "other heads are not to be had",
    "foretold": "what is foretold without a head",
    "told": "its length is told below",
    "stands beside": "a random vector stands beside it",
    "the very": "the very ids of the run",
    "save, but for": "all save the last",
    "wants a": "the command wants a run",
    "mend": "mend the file",
    "as it was": "the store is as it was",
}
PLAIN = """The token after it is no longer than three characters. Where is it? The place where a head looks, where Σ is the
covariance, decides the answer. A thinking model writes a thinking block. One at a time. The very first of all that: no."""


def found(path: str, text: str, kind: str) -> list[tuple[str, int]]:
    texts = [prose.document(path, text)] if kind == "md" else [*prose.comments(path, text), *prose.strings(path, text)]
    return sorted((hit.phrase.name, hit.line) for text in texts for hit in prose.hits(text))


@pytest.mark.parametrize("name", [phrase.name for phrase in prose.PHRASES])
def test_each_phrase_is_found(name):
    assert name in {phrase for phrase, _ in found("a.md", STILTED[name], "md")}


def test_good_english_passes():
    assert found("a.md", PLAIN.replace("of all that", "of all"), "md") == []


def test_docstrings_comments_and_messages_are_read():
    source = '''"""One a row,
written anew."""

x = 1  # all save
# the last
y = f"it hangs on {x}"
'''
    assert found("a.py", source, "py") == [("anew", 2), ("hangs on", 6), ("one a row", 1), ("save, but for", 4)]


def test_code_in_a_document_is_not_prose():
    assert found("a.md", "`anew`\n\n```text\nanew\n```\nanew", "md") == [("anew", 6)]


def test_cells_of_a_notebook_are_read():
    source = '{"cells": [{"source": ["# Title"]}, {"source": ["It is ", "written anew."]}]}'
    found_in = [(hit.phrase.name, hit.line) for text in prose.notebook("a.ipynb", source) for hit in prose.hits(text)]
    assert found_in == [("anew", 1)]


def test_only_what_is_not_released_of_the_changelog_is_read():
    changes = "# Changelog\n\n## [Unreleased]\n\nanew\n\n## [0.1.0]\n\nanew\n"
    assert found("CHANGELOG.md", changes, "md") == [("anew", 5)]


def test_an_exception_excuses_one_place_and_must_be_used(monkeypatch):
    monkeypatch.setattr(prose, "EXCEPTIONS", {("a.md", "written anew"): "a quotation"})
    assert found("a.md", "It is written anew.", "md") == []
    assert found("b.md", "It is written anew.", "md") == [("anew", 1)]
    assert prose.unused([prose.document("a.md", "It is written anew.")]) == []
    assert len(prose.unused([prose.document("a.md", "Nothing.")])) == 1
