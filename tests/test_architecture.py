"""The shape of the code: imports run one way, each heavy library is imported only where it may be, and importing does nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ORDER = ("data", "probes", "steering", "analysis", "app", "reasonscope")
SOURCES = sorted(path.relative_to(ROOT) for top in ORDER for path in (ROOT / top).rglob("*.py"))
TRAINING = "data/organism/train.py"

# Where a library may be imported: the path, or what it begins with.
ALLOWED = {
    "torch": ("probes/", "steering/", "analysis/", "app/", TRAINING),
    "transformers": ("probes/", "steering/", "analysis/", "app/", TRAINING),
    "transformer_lens": ("probes/backends/transformer_lens.py",),
    "ray": ("probes/generation/cluster.py",),
    "openai": ("probes/server/",),
    "nnsight": ("probes/backends/nnsight.py",),
    "plotly": ("analysis/figures/",),
    "streamlit": ("app/",),
    "typer": ("app/",),
}


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            # `from reasonscope import app` names the package only in what it takes.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "reasonscope" else (module,)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_one_way(path):
    own = ORDER.index(path.parts[0])
    ours = [name for name in imports(path) if name.split(".")[0] == "reasonscope"]
    backwards = [name for name in ours if ORDER.index(name.split(".")[1]) > own]
    assert backwards == [], f"{path} may import {', '.join(ORDER[: own + 1])} only"


@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_where_it_may(library):
    users = {path.as_posix() for path in SOURCES for name in imports(path) if name.split(".")[0] == library}
    assert {user for user in users if not user.startswith(ALLOWED[library])} == set()


def test_every_library_that_is_imported_is_required():
    """By name, and not because another library happens to bring it."""
    declared = {canonicalize_name(Requirement(line).name) for line in requires("reasonscope") or ()}
    homes = packages_distributions()
    top = {name.split(".")[0] for path in SOURCES for name in imports(path)} - sys.stdlib_module_names - {"reasonscope"}
    undeclared = {name for name in top if not {canonicalize_name(home) for home in homes.get(name, ())} & declared}
    assert undeclared == set(), "name them in pyproject.toml"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("reasonscope.data", {"torch", "transformers", "datasets", "sklearn", "streamlit"}),
        ("reasonscope.app.server.main", {"torch", "transformers"}),
        ("reasonscope.app.cli", {"torch", "transformers", "sklearn", "scipy", "plotly", "streamlit", "sympy"}),
    ],
)
def test_nothing_heavy_happens_at_import(module, unwanted):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert set(loaded) & unwanted == set()
