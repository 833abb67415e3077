"""Find phrases that no researcher would say aloud, in everything that a person reads here.

It reads docstrings, comments and strings of the packages, the benchmarks and the scripts of the docs, and the documents
and notebooks. `python .ci/prose.py` lists each hit with its line and what to say instead, and fails if it finds any;
`--table` counts them per folder and never fails.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("data", "probes", "steering", "analysis", "app", "reasonscope", "benchmarks", "docs")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
SKIPPED = {
    "docs/log.md": "history",
    "docs/cli.md": "made of the commands' help texts, which are read where they are written",
    "docs/mutants.md": "quotes code",
}


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A phrase to avoid: a space in `pattern` matches any white space, so that a phrase is found across a line break too."""

    name: str
    pattern: str
    say: str

    def search(self, text: str) -> Iterator[re.Match[str]]:
        return re.finditer(self.pattern.replace(" ", r"\s+"), text, flags=re.MULTILINE)


PHRASES = (
    Phrase(name="behind", pattern=r"\b[Bb]ehind\b(?! a router)", say="after, past, following"),
    Phrase(
        name="is no",
        pattern=r"\b(?:is|are|was|were|be|being) no(?:ne)?\b"
        r"(?! (?:longer|more than|less|other|different|need|later|earlier|greater|worse|better)\b)",
        say="is not a/an X, has no X, without X, no X exists",
    ),
    Phrase(name="hangs on", pattern=r"\b[Hh](?:angs?|ung) (?:on|by|from)\b", say="depends on"),
    Phrase(name="anew", pattern=r"\b[Aa]new\b", say="again"),
    Phrase(
        name="one a row",
        pattern=r"\b[Oo]ne an? (?:row|line|step|token|trace|problem|prompt|sequence|group|layer|head|site|file|batch)\b",
        say="one per row",
    ),
    Phrase(name="of all that", pattern=r"\b[Oo]f all that\b", say="of everything that, or name it"),
    Phrase(
        name="where for if",
        pattern=r"\bwhere (?:it|they|there|one|none|nothing|nobody|not|no|any|both|either|neither|all|only|given|this)\b"
        r"|(?:^|[.;:(] )Where [^.;:?]{3,90}, |\b[Rr]aises? [\w, `.]*(?<!`)\bwhere\b",
        say="if, when, for, unless",
    ),
    Phrase(
        name="a thinking",
        pattern=r"\b[Aa](?:nother)? (?:\w+ )?thinking\b(?! (?:block|token|word|model|trace|speed|budget|position)s?\b)",
        say="reasoning, a trace, the thinking block",
    ),
    Phrase(name="bears", pattern=r"\bb(?:ears?|ore|orne)\b", say="has, carries"),
    Phrase(
        name="to be had",
        pattern=r"\bto be (?:had|found|seen|said)\b",
        say="available, exists, or a verb with a subject",
    ),
    Phrase(name="foretold", pattern=r"\b[Ff]oret(?:old|ells?)\b", say="predicted"),
    Phrase(
        name="told",
        pattern=r"\b(?:is|are|was|were|be|being) told(?! (?:to|apart|how|that)\b)|\btold of\b",
        say="said, reported, described",
    ),
    Phrase(
        name="stands beside",
        pattern=r"\b[Ss]t(?:ands?|anding|ood) (?:beside|in(?! for)|at|on|there|before|here)\b",
        say="is next to, is in, or compare with",
    ),
    Phrase(name="the very", pattern=r"\bthe very (?!first|last|end|start)\w+", say="the same, exactly the, or nothing"),
    Phrase(
        name="save, but for",
        pattern=r"\b(?:all|each|every|everything|tokens?|any|none|nothing|place) save\b|\bbut for\b",
        say="except",
    ),
    Phrase(name="wants a", pattern=r"\bwants? (?:a|an|the|more|its|no|arguments)\b(?! to)", say="needs"),
    Phrase(name="mend", pattern=r"\b[Mm]end(?:s|ed|ing)?\b", say="fix, correct"),
    Phrase(name="as it was", pattern=r"\bis as it was\b|\bare as they were\b", say="is unchanged"),
)

# (path, the text around the phrase) → why it may stay.
EXCEPTIONS: dict[tuple[str, str], str] = {}


@dataclass(frozen=True, kw_only=True)
class Text:
    """A piece of prose that begins in line `line` of `path`."""

    path: str
    line: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Hit:
    path: str
    line: int
    phrase: Phrase
    excerpt: str

    def __str__(self) -> str:
        return f'{self.path}:{self.line}: "{self.excerpt}" ({self.phrase.name}): say {self.phrase.say}'


def comments(path: str, source: str) -> Iterator[Text]:
    """The comments of a file; neighbouring lines are one text."""
    start, last, lines = 0, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and lines:
            yield Text(path=path, line=start, text="\n".join(lines))
            lines = []
        start, last = start if lines else token.start[0], token.start[0]
        lines.append(token.string.lstrip("# "))
    if lines:
        yield Text(path=path, line=start, text="\n".join(lines))


def strings(path: str, source: str) -> Iterator[Text]:
    """The docstrings and other strings of a file, `{}` for what an f-string fills in."""

    def visit(node: ast.AST) -> Iterator[Text]:
        if isinstance(node, ast.JoinedStr):
            parts = [value.value if isinstance(value, ast.Constant) else "{}" for value in node.values]
            yield Text(path=path, line=node.lineno, text="".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Text(path=path, line=node.lineno, text=node.value)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    yield from visit(ast.parse(source))


def document(path: str, source: str) -> Text:
    """A Markdown text without its code; of a changelog what is not released yet."""
    if path == "CHANGELOG.md":
        source = "\n## [".join(source.split("\n## [")[:2])
    kept, fenced = [], False
    for line in source.splitlines():
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        kept.append("" if fence or fenced else re.sub(r"`[^`]*`", "`…`", line))
    return Text(path=path, line=1, text="\n".join(kept))


def notebook(path: str, source: str) -> Iterator[Text]:
    """The cells of a notebook; the line is the number of the cell."""
    for number, cell in enumerate(json.loads(source)["cells"]):
        yield Text(path=path, line=number, text="".join(cell["source"]))


def texts(root: Path) -> Iterator[Text]:
    for folder in CODE:
        for file in sorted((root / folder).rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            path = file.relative_to(root).as_posix()
            yield from comments(path, source)
            yield from strings(path, source)
    pages = [root / name for name in DOCUMENTS] + sorted((root / "docs").rglob("*.md"))
    for file in pages:
        path = file.relative_to(root).as_posix()
        if path not in SKIPPED:
            yield document(path, file.read_text(encoding="utf-8"))
    for file in sorted((root / "docs").rglob("*.ipynb")):
        yield from notebook(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8"))


def hits(text: Text) -> Iterator[Hit]:
    """The phrases of a text that are not excused."""
    for phrase in PHRASES:
        for match in phrase.search(text.text):
            around = " ".join(text.text[max(0, match.start() - 60) : match.end() + 60].split())
            if not any(path == text.path and excuse in around for path, excuse in EXCEPTIONS):
                line = text.line + text.text.count("\n", 0, match.start())
                yield Hit(path=text.path, line=line, phrase=phrase, excerpt=" ".join(match.group().split()))


def unused(everything: list[Text]) -> list[str]:
    """Exceptions that excuse nothing any more."""
    flat: dict[str, str] = {}
    for text in everything:
        flat[text.path] = flat.get(text.path, "") + "\n" + " ".join(text.text.split())
    return [
        f"{path}: the exception {excuse!r} excuses nothing: remove it"
        for path, excuse in EXCEPTIONS
        if excuse not in flat.get(path, "")
    ]


def folder(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[:2]) if len(parts) > 2 else "/".join(parts) if path.endswith(".md") else parts[0]


def table(found: list[Hit]) -> str:
    counts = Counter(folder(hit.path) for hit in found)
    return "".join(f"{count:5}  {name}\n" for name, count in sorted(counts.items())) + f"{len(found):5}  in all\n"


def main(arguments: list[str]) -> int:
    everything = list(texts(ROOT))
    found = [hit for text in everything for hit in hits(text)]
    if arguments == ["--table"]:
        sys.stdout.write(table(found))
        return 0
    chosen = [hit for hit in found if not arguments or hit.path.startswith(tuple(arguments))]
    complaints = [*map(str, chosen), *unused(everything)]
    sys.stdout.write("".join(f"{line}\n" for line in complaints))
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
