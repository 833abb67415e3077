"""The runs that may be opened: those below one folder."""

from pathlib import Path

from reasonscope.data.errors import InputError
from reasonscope.data.storage.manifest import NAME

_DEPTH = 2  # levels of folders below the root that are searched for runs
_MANY_RUNS = 200


def confined(root: Path, name: str) -> Path:
    """The folder `name` below `root`. Raises InputError if it leads elsewhere: by `..`, as an absolute path or by a link."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InputError(f"run {name!r} lies outside of {root}; start the app with --root for another folder of runs")
    return path


def find_runs(root: Path) -> list[str]:
    """The runs below `root`, as relative paths; links that lead out are not followed."""
    found = []
    for pattern in ("/".join(["*"] * depth) for depth in range(1, _DEPTH + 1)):
        for folder in sorted(root.glob(pattern)):
            name = folder.relative_to(root).as_posix()
            if folder.name != "store" and _is_run(folder) and folder.resolve().is_relative_to(root.resolve()):
                found.append(name)
    return found[:_MANY_RUNS]


def _is_run(folder: Path) -> bool:
    return (folder / NAME).is_file() or (folder / "store" / NAME).is_file()
