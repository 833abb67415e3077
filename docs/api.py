"""Writes docs/api/*.md, the reference of what each package exports: the names of its `__init__.pyi`, grouped by room.

python docs/api.py
"""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = Path(__file__).with_name("api")
PACKAGES = ("data", "probes", "steering", "analysis")
_ABOUT = "Written by `make docs` from the packages' lists of exports. Everything else is imported from its module.\n"


@dataclass(frozen=True, kw_only=True)
class Export:
    """A name that a package exports, and the module that defines it, such as `reasonscope.data.text.parse`."""

    name: str
    module: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def room(self) -> str:
        """The folder that the module is in, such as `reasonscope.data.text`, or the package of a module at its top."""
        return ".".join(self.module.split(".")[:3]) if self.module.count(".") > 2 else self.module.rpartition(".")[0]

    @property
    def tree(self) -> ast.Module:
        folder = ROOT / Path(*self.module.split(".")[1:])
        file = folder.with_suffix(".py")
        return ast.parse((file if file.exists() else folder / "__init__.py").read_text(encoding="utf-8"))

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring; "" for a name without one, such as a table."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == self.name:
                return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        return ""


def exports(package: str) -> list[Export]:
    """What `reasonscope.PACKAGE` exports ("" for reasonscope itself), without its packages, in the order of its list."""
    stub = ROOT / (package or "reasonscope") / "__init__.pyi"
    top = f"reasonscope.{package}" if package else "reasonscope"
    found = []
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [Export(name=alias.name, module=f"{top}.{node.module}") for alias in node.names]
    return found


def purpose(module: str) -> str:
    """The first sentence of a package's docstring."""
    file = ROOT / Path(*module.split(".")[1:]) / "__init__.py"
    if module == "reasonscope":
        file = ROOT / "reasonscope" / "__init__.py"
    return " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())


def package_page(package: str) -> str:
    """The page of one package: a heading per room, and the documentation of each name."""
    top = f"reasonscope.{package}"
    rooms: dict[str, list[Export]] = {}
    for export in exports(package):
        rooms.setdefault(export.room, []).append(export)
    lines = [f"# {top}\n", f"{purpose(top)}\n", _ABOUT]
    for room, found in rooms.items():
        lines += [f"## {room}\n", f"{purpose(room)}\n"] if room != top else ["## In the package itself\n"]
        lines += [f"::: {export.path}\n" for export in found]
    return "\n".join(lines)


def top_page() -> str:
    """The page of reasonscope itself: a table of contents, and the documentation of names that no package exports."""
    shown = {export.path for package in PACKAGES for export in exports(package)}
    found = exports("")
    lines = ["# reasonscope\n", f"{purpose('reasonscope')}\n", "| name | what it is |", "|---|---|"]
    lines += [
        f"| [`reasonscope.{package}`]({package}.md) | {purpose(f'reasonscope.{package}')} |" for package in PACKAGES
    ]
    lines += [f"| [`{export.name}`][{export.path}] | {export.summary} |" for export in found]
    own = [export for export in found if export.path not in shown]
    lines += [""] + [f"::: {export.path}\n" for export in own]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """The text of each page by its file name."""
    found = {"reasonscope.md": top_page()} | {f"{package}.md": package_page(package) for package in PACKAGES}
    return {name: f"{text.strip()}\n" for name, text in found.items()}


def main() -> None:
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
