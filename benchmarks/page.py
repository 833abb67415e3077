"""Runs the benchmarks one after another and writes docs/benchmarks.md: the machine, the goals missed, and what every script prints."""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from goals import MET, MISSED, NOISE

HERE = Path(__file__).parent
ONE_FORM = ("under_cap", "with_gpu")  # no small one
# The parts of the page in its order, each with its script and arguments. `--only` measures some of them again.
PARTS: Mapping[str, tuple[str, ...]] = {
    "peers-organism": ("peers", "--model", "organism"),
    "peers-random": ("peers", "--model", "random"),
    "recording": ("recording", "--part", "runs"),
    "files": ("recording", "--part", "files"),
    "under_cap": ("under_cap",),
    "attention": ("attention", "--part", "receivers"),
    "suppression": ("attention", "--part", "suppression"),
    "real_model": ("real_model",),
    "mi_low_rank": ("mi_low_rank",),
    "rollouts": ("rollouts",),
    "monitor": ("monitor",),
    "probe_sweep": ("probe_sweep",),
    "app": ("app",),
    "growth": ("growth",),
    "analyses_growth": ("analyses_growth",),
    "with_gpu": ("with_gpu",),
}


def section(part: str, small: bool) -> tuple[str, bool]:
    """The output of a part with time and place, and whether it finished; otherwise a line says that it failed."""
    script, *arguments = PARTS[part]
    arguments += ["--small"] if small and script not in ONE_FORM else []
    began, where = time.perf_counter(), machine()
    done = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *arguments], stdout=subprocess.PIPE, text=True)
    printed = done.stdout.strip()
    if done.returncode:
        printed += f"\n\n**`benchmarks/{script}.py` failed** (exit status {done.returncode}); what it was to measure is missing here."
    if not printed.startswith("## "):
        printed = f"## {part}\n\n{printed.strip()}"
    seconds = time.perf_counter() - began
    sys.stderr.write(f"{part}: {seconds:.0f} s{', failed' if done.returncode else ''}\n")
    return f"{printed}\n\n*{where}; {seconds:.0f} s.*", not done.returncode


def sections(page: str) -> dict[str, str]:
    """Those of a page, by heading."""
    return {part.splitlines()[0]: f"## {part.strip()}" for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]}


def verdicts(text: str) -> Iterator[tuple[str, str]]:
    """The verdict of every row that has one, after the nearest heading and the row's first cell."""
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for cell in cells:
            if cell.removesuffix(NOISE) in (MET, MISSED):
                yield cell, f"{heading} – {cells[0]}"


def missed(text: str) -> str:
    found = list(verdicts(text))
    rows = [f"- {row}: {said}" for said, row in found if said.startswith(MISSED)]
    return "\n".join(
        [f"{len(found) - len(rows)} of {len(found)} goals are met." + (" Missed:\n" if rows else ""), *rows]
    )


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    commit = _git("rev-parse", "--short", "HEAD") + (" and changes" if _git("status", "--porcelain", "-uno") else "")
    return f"{os.cpu_count()} cores of {model}; {datetime.now(UTC):%d %B %Y}, commit {commit}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()


def head(small: bool, body: str) -> str:
    size = " with `BENCH=--small`, which only tries the scripts" if small else ""
    return "\n\n".join(
        [
            "# Benchmarks",
            f"Written by `make bench`{size}; place and time are below each section.",
            'Next to a number is whether it meets its goal; "within the noise" means that the quartiles over the turns lie on both '
            "sides of it. The section says why a goal is missed: what the time goes to, or what bounds it.",
            missed(body),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the small form of every script")
    parser.add_argument("--out", type=Path, help="docs/benchmarks.md, of small forms build/benchmarks.md")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts; the other sections stay as they are")
    given = parser.parse_args()
    out = given.out or HERE.parent / ("build" if given.small else "docs") / "benchmarks.md"
    out.parent.mkdir(exist_ok=True)
    found, ended = sections(out.read_text(encoding="utf-8")) if given.only and out.exists() else {}, []
    for part in given.only or PARTS:
        text, whole = section(part, given.small)
        found |= sections(text)
        ended.append(whole)
        body = "\n\n".join(found.values())  # written after every part, so that an interruption loses one at most
        out.write_text(f"{head(given.small, body)}\n\n{body}\n", encoding="utf-8")
    sys.exit(not all(ended))


if __name__ == "__main__":
    main()
