"""What is packaged: every folder of code, every file that it needs, and a pin for every dependency."""

import os
import re
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
TOP = ("data", "probes", "steering", "analysis", "app", "reasonscope")
FOLDERS = SETUPTOOLS["package-dir"]


def test_the_packages_are_the_folders_that_hold_code():
    holding = {path.parent.relative_to(ROOT) for top in TOP for path in (ROOT / top).rglob("*.py")}
    expected = {
        "reasonscope" if folder == Path("reasonscope") else f"reasonscope.{'.'.join(folder.parts)}": folder.as_posix()
        for folder in holding
    }
    assert expected == FOLDERS
    assert sorted(expected) == sorted(SETUPTOOLS["packages"])


@pytest.mark.parametrize("name", FOLDERS)
def test_every_package_says_what_it_is(name):
    init = ROOT / FOLDERS[name] / "__init__.py"
    assert re.match(r'"""\w.{20,}', init.read_text(encoding="utf-8")), f"{init} needs a docstring"


def test_the_type_checker_sees_the_same_folders():
    links = {link.name: link.resolve() for link in (ROOT / ".types" / "reasonscope").iterdir()}
    names = ("__init__.py", "__init__.pyi")
    assert links == {name: ROOT / "reasonscope" / name for name in names} | {top: ROOT / top for top in TOP[:-1]}


def shipped_files() -> list[Path]:
    """Every file of the packages that git would keep, relative to the root."""
    return [
        path.relative_to(ROOT)
        for top in TOP
        for path in sorted((ROOT / top).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


def test_the_installed_package_holds_every_file():
    """True by construction of an editable install; run against the wheel it shows that nothing was left out."""
    for path in shipped_files():
        package = "reasonscope" if path.parts[0] == "reasonscope" else f"reasonscope.{path.parts[0]}"
        installed = files(package).joinpath(*path.parts[1:])
        assert installed.is_file(), f"{path} is not installed: add it to [tool.setuptools.package-data]"
        assert installed.read_bytes() == (ROOT / path).read_bytes(), f"{path} differs from the installed file"


def test_every_top_package_declares_its_types():
    packages = ["reasonscope", *(f"reasonscope.{top}" for top in TOP[:-1])]
    assert [name for name in packages if not files(name).joinpath("py.typed").is_file()] == []


@pytest.mark.skipif("REASONSCOPE_TEST_WHEEL" not in os.environ, reason="only `make test-wheel` installs a wheel")
def test_the_wheel_is_what_is_tested():
    assert Path(str(files("reasonscope.data"))).is_relative_to(sysconfig.get_path("purelib"))


def dependencies(root: str) -> set[str]:
    """All that `root` asks for, directly or not, as far as it is installed here; without what a parent pins exactly,
    as torch does its CUDA libraries."""
    todo, done = [Requirement(root)], set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in done or str(requirement.specifier).startswith("=="):
            continue
        done.add((name, extras))
        try:
            lines = requires(name) or ()
        except PackageNotFoundError:
            continue
        asked = [(child, child.marker) for child in map(Requirement, lines)]
        todo += [
            child
            for child, marker in asked
            if marker is None or any(marker.evaluate({"extra": e}) for e in {"", *extras})
        ]
    return {name for name, _ in done}


def pins(file: str) -> set[tuple[str, str]]:
    """The packages of a file and their versions, without the build that they are for."""
    found = re.findall(r"^([\w.-]+)==([^\s+]+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {(canonicalize_name(name), version) for name, version in found}


def test_every_dependency_is_pinned_and_locked():
    pinned, locked = pins("constraints.txt"), pins("requirements.lock")
    installer = {"pip"}  # pip-audit asks for it; it is what installs the pins
    assert dependencies("reasonscope[dev]") - {name for name, _ in pinned} - installer == {"reasonscope"}
    assert ("torch", "2.13.0") in pinned
    assert {name for name, _ in locked ^ pinned} == installer
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert sum(bool(re.search(r" --hash=sha256:[0-9a-f]{64}$", line)) for line in lines) == len(locked)


@pytest.mark.skipif("REASONSCOPE_EXTRAS" not in os.environ, reason="only `make test` says which extras it installed")
def test_no_test_is_skipped_for_want_of_a_package_that_make_installs():
    missing = []
    for name in dependencies(f"reasonscope[{os.environ['REASONSCOPE_EXTRAS']}]"):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    assert not missing
