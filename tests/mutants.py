"""Changes one thing at a time in what computes numbers, and sees whether a test notices.

    python tests/mutants.py [--sample 12] [--seed 0] [--only data/store.py] [--out docs/mutants.md]

A mutant is one changed operator, comparison, constant or condition of a file below; its tests run in a process of their own, which
imports the changed code in place of the real one. It is killed where a test fails or takes three times as long. Survivors are listed with
their line; `EQUIVALENT` says of those that change nothing why. mutmut and cosmic-ray look for a package where its folder is called so, and
ours are mapped (`data` is `reasonscope.data`), hence this script.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each file, and the tests that are to notice.
TARGETS = {
    "data/align.py": ["tests/data/test_align.py"],
    "data/answers.py": ["tests/data/test_answers.py"],
    "data/behaviour.py": ["tests/probes/test_refusal.py"],
    "data/durable.py": ["tests/data/test_store.py", "tests/faults/test_store_faults.py"],
    "data/export.py": ["tests/data/test_importers.py"],
    "data/importers.py": ["tests/data/test_importers.py"],
    "data/label.py": ["tests/data/test_label.py"],
    "data/manifest.py": ["tests/data/test_store.py"],
    "data/parse.py": ["tests/data/test_parse.py"],
    "data/problems.py": ["tests/data/test_problems.py"],
    "data/reading.py": ["tests/faults/test_fuzz.py"],
    "data/records.py": ["tests/data/test_store.py"],
    "data/segment.py": ["tests/data/test_segment.py"],
    "data/shards.py": ["tests/data/test_store.py"],
    "data/splitter.py": ["tests/data/test_splitter.py"],
    "data/store.py": ["tests/data/test_store.py"],
    "data/trace.py": ["tests/data/test_parse.py", "tests/data/test_store.py"],
    "probes/linear.py": ["tests/probes/test_linear.py"],
    "probes/evaluate.py": ["tests/probes/test_evaluate.py"],
    "steering/operators.py": ["tests/steering/test_operators.py"],
    "analysis/information.py": ["tests/analysis/test_information.py"],
    "analysis/statistics.py": ["tests/analysis/test_statistics.py"],
}
# Survivors that no test can tell from the original, by file and line as it stands there, and why.
EQUIVALENT: dict[tuple[str, str], str] = {}
_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.MatMult: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """The node number `index` of a file in the order of `ast.walk`, changed in way `how`."""

    file: str
    line: int
    index: int
    how: str


def mutants(file: str) -> list[Mutant]:
    """Every mutant of a file. What nobody computes with is left alone: annotations, docstrings, the words of errors."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    left = {id(inner) for node in _silent(tree) for inner in ast.walk(node)}
    found = []
    for index, node in enumerate(ast.walk(tree)):
        if id(node) not in left:
            found += [Mutant(file=file, line=getattr(node, "lineno", 0), index=index, how=how) for how in _ways(node)]
    return found


def _silent(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            yield node
        elif isinstance(node, ast.AnnAssign) or (isinstance(node, ast.arg) and node.annotation is not None):
            yield node.annotation
        elif isinstance(node, ast.FunctionDef):
            yield from node.decorator_list
            if node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.ClassDef):
            yield from (*node.decorator_list, *node.bases)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            yield node.value  # Literal[…] and other types
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "TypeVar",
            "cast",
            "InputError",
            "StoreError",
        ):
            yield node


def _ways(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Compare):
        return ["comparison"] if type(node.ops[0]) in _COMPARISONS else []
    if isinstance(node, ast.BinOp | ast.AugAssign):
        return ["operator"] if type(node.op) in _OPERATORS else []
    if isinstance(node, ast.BoolOp):
        return ["and/or"]
    if isinstance(node, ast.UnaryOp):
        return ["without not or minus"] if isinstance(node.op, ast.Not | ast.USub) else []
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool | int | float):
            return ["constant"]
        return ["text"] if isinstance(node.value, str) and node.value else []
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return ["condition"]
    if isinstance(node, ast.Return):
        return ["returns None"] if node.value is not None else []
    if isinstance(node, ast.Continue | ast.Break):
        return ["pass"]
    return []


def mutated(mutant: Mutant) -> ast.Module:
    """The tree of the file with the change in it."""
    tree = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
    node = list(ast.walk(tree))[mutant.index]
    if mutant.how == "comparison":
        node.ops[0] = _COMPARISONS[type(node.ops[0])]()
    elif mutant.how == "operator":
        node.op = _OPERATORS[type(node.op)]()
    elif mutant.how == "and/or":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif mutant.how == "constant":
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif mutant.how == "text":
        node.value = f"XX{node.value}"
    elif mutant.how == "condition":
        node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)
    elif mutant.how == "returns None":
        node.value = ast.Constant(None)
    else:
        _replace(tree, node, ast.Pass() if mutant.how == "pass" else node.operand)
    return ast.fix_missing_locations(tree)


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and old in value:
                value[value.index(old)] = new


class Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree rather than from its file."""

    def __init__(self, module: str, file: Path, tree: ast.Module) -> None:
        self.module, self.file, self.tree = module, file, tree

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != self.module:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self.file))

    def exec_module(self, module: object) -> None:
        module.__file__ = str(self.file)
        exec(compile(self.tree, str(self.file), "exec"), module.__dict__)


def tests_fail(file: str, tree: ast.Module | None, seconds: float) -> bool:
    """Run the tests of a file in a fork of this process, which has imported what takes long and nothing of ours."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 2
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if tree is not None:
                module = "reasonscope." + file.removesuffix(".py").replace("/", ".")
                sys.meta_path.insert(0, Instead(module, ROOT / file, tree))
            import pytest

            status = int(
                pytest.main(
                    ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *(str(ROOT / t) for t in TARGETS[file])]
                )
            )
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of one file: how many mutants there are, how many were tried and killed, and which survived."""

    file: str
    there: int
    tried: int
    killed: int
    survivors: tuple[Mutant, ...]


def judge(file: str, sample: int, seed: int) -> Tally:
    there = mutants(file)
    chosen = there if sample >= len(there) else random.Random(f"{file} {seed}").sample(there, sample)
    began = time.monotonic()
    if tests_fail(file, None, 600):
        raise SystemExit(f"the tests of {file} fail without any mutant: {' '.join(TARGETS[file])}")
    limit = 3 * (time.monotonic() - began) + 10
    survivors = [mutant for mutant in chosen if not tests_fail(file, mutated(mutant), limit)]
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    real = tuple(m for m in survivors if (file, lines[m.line - 1].strip()) not in EQUIVALENT)
    return Tally(file=file, there=len(there), tried=len(chosen), killed=len(chosen) - len(real), survivors=real)


def markdown(tallies: Sequence[Tally]) -> str:
    tried, killed = sum(t.tried for t in tallies), sum(t.killed for t in tallies)
    lines = [
        "# Which mistakes the tests would notice", "",
        f"Written by `make mutants`: {killed} of {tried} mutants killed ({killed / max(tried, 1):.1%}), a random sample of "
        f"{sum(t.there for t in tallies)}.", "", "| file | mutants | tried | killed |", "|---|---|---|---|",
        *(f"| `{t.file}` | {t.there} | {t.tried} | {t.killed} |" for t in tallies), "", "## Survivors", "",
    ]  # fmt: skip
    for tally in tallies:
        source = (ROOT / tally.file).read_text(encoding="utf-8").splitlines()
        lines += [f"- `{m.file}:{m.line}` {m.how}: `{source[m.line - 1].strip()[:100]}`" for m in tally.survivors]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=12, help="Mutants of a file, at most.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--least", type=float, default=0.85)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # What takes long to import, once for all forks; nothing of ours.
    for name in (
        "torch",
        "transformers",
        "sklearn.linear_model",
        "sklearn.model_selection",
        "pyarrow.parquet",
        "scipy.stats",
    ):
        importlib.import_module(name)
    tallies = []
    for file in (file for file in TARGETS if given.only in file):
        tally = judge(file, given.sample, given.seed)
        tallies.append(tally)
        sys.stdout.write(f"{file}: {tally.killed} of {tally.tried} killed\n")
        for mutant in tally.survivors:
            sys.stdout.write(
                f"  {json.dumps(vars(mutant))} {(ROOT / file).read_text().splitlines()[mutant.line - 1].strip()[:110]}\n"
            )
        sys.stdout.flush()
    text = markdown(tallies)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    tried, killed = sum(t.tried for t in tallies), sum(t.killed for t in tallies)
    sys.stdout.write(f"{killed} of {tried} killed\n")
    return 0 if killed >= given.least * tried else 1


if __name__ == "__main__":
    sys.exit(main())
