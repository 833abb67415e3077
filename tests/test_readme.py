"""The documents tell the truth: their Python and their `reasonscope` commands run, in order, as a reader would run them.

A document's snippets share one namespace and one empty folder. A snippet after `<!-- not run: reason -->` is left out; so is a
```bash block that does not begin with `reasonscope` (installing, make).
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import typer.core
import typer.main
from markdown_it import MarkdownIt
from typer.cli import get_docs_for_click

from reasonscope.app.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True, kw_only=True)
class Snippet:
    language: str
    code: str
    line: int


def snippets(document: str) -> list[Snippet]:
    """The snippets of a Markdown text that are to run; `line` counts the text's lines from 1."""
    found, excused = [], False
    for token in MarkdownIt().parse(document):
        if token.type == "html_block":
            excused = re.match(r"<!-- not run: \S.* -->", token.content) is not None
            continue
        runs = token.info == "python" or (token.info == "bash" and token.content.startswith("reasonscope "))
        if token.type == "fence" and runs and not excused:
            assert token.map is not None
            found.append(Snippet(language=token.info, code=token.content, line=token.map[0] + 2))
        excused = False
    return found


def run_python(snippet: Snippet, document: Path, namespace: dict[str, object]) -> None:
    # Blank lines in front make a traceback name the line of the document.
    source = "\n" * (snippet.line - 1) + snippet.code
    exec(compile(source, document, "exec"), namespace)


def run_bash(snippet: Snippet, document: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", snippet.code],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{document}:{snippet.line}: status {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if snippets(d.read_text(encoding="utf-8"))],
    ids=lambda d: str(d.relative_to(ROOT)),
)
def test_snippets_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in snippets(document.read_text(encoding="utf-8")):
        if snippet.language == "python":
            run_python(snippet, document, namespace)
        else:
            run_bash(snippet, document)


def test_readme_has_snippets_of_both_kinds():
    readme = snippets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {snippet.language for snippet in readme} == {"python", "bash"}


def test_which_snippets_run():
    text = """
```python
a = 1
```

<!-- not run: takes an hour -->
```python
b = 2
```

```bash
make demo
```

```bash
reasonscope version
```

<!-- a remark -->
```python
c = 3
```
"""
    assert [(s.code, s.line) for s in snippets(text)] == [
        ("a = 1\n", 3),
        ("reasonscope version\n", 16),
        ("c = 3\n", 21),
    ]


def command_lines(document: str) -> list[str]:
    """Every line of a Markdown text that calls the command: in snippets, those that do not run too, and in running text."""
    tokens = MarkdownIt().parse(document)
    blocks = [
        token.content.replace("\\\n", " ").splitlines()
        for token in tokens
        if token.type == "fence" and token.info == "bash"
    ]
    inline = [child for token in tokens for child in token.children or [] if child.type == "code_inline"]
    lines = [*(line for block in blocks for line in block), *(child.content for child in inline)]
    return [line.strip() for line in lines if line.strip().startswith("reasonscope ")]


def complaint(line: str) -> str:
    """What a line that calls the command names and the command does not have; alternatives are a|b, placeholders NAME, omissions …"""
    command = typer.main.get_command(app)
    words = [word.strip("[]") for word in shlex.split(line, comments=True)[1:] if "…" not in word]
    while words and isinstance(command, typer.core.TyperGroup):
        if words[0].isupper():  # the reader's own choice
            return ""
        named = words.pop(0).split("|")
        if missing := set(named) - set(command.commands):
            return f"no command {sorted(missing)}"
        command = command.commands[named[0]]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    missing = {word.partition("=")[0] for word in words if word.startswith("-")} - known
    return f"no option {sorted(missing)}" if missing else ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_command_lines_name_what_exists(document):
    lines = command_lines(document.read_text(encoding="utf-8"))
    assert {line: found for line in lines if (found := complaint(line))} == {}


def test_complaints():
    assert complaint("reasonscope probe length --run RUN --folds 3") == ""
    assert complaint("reasonscope analyse mi|nothing --run RUN") == "no command ['nothing']"
    assert complaint("reasonscope analyse NAME") == ""
    assert complaint("reasonscope probe length --runs=RUN") == "no option ['--runs']"
    assert command_lines("`reasonscope a`, then\n```bash\nmake x\nreasonscope b\n```") == [
        "reasonscope b",
        "reasonscope a",
    ]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_linked_exist(document):
    """Links between the pages of docs/ are checked where the site is built."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def test_the_command_reference_is_up_to_date():
    """`make docs` writes it again."""
    command = typer.main.get_command(app)
    written = get_docs_for_click(obj=command, ctx=typer.Context(command), name="reasonscope", title="Command line")
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == f"{written.strip()}\n"


def test_documents_name_make_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    named = {target for text in texts for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


def test_the_page_of_the_organism_has_the_numbers_of_its_card():
    """`reasonscope organism evaluate --card` writes the card."""
    card, page = (
        [
            line
            for line in (ROOT / path).read_text(encoding="utf-8").splitlines()
            if re.search(r"\| (\d+\.\d{3}) \|", line)
        ]
        for path in ("data/organism/card.md", "docs/organism.md")
    )
    assert len(card) > 20 and page == card


def test_the_readme_can_be_read_at_once():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
