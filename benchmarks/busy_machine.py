"""How long `reasonscope demo --quick` takes on an idle machine, and beside one busy process.

The two take turns, and each turn writes a fresh folder. Beside the medians stand the processor time, user and system together, and the
ratio of the medians, which should be at most 1.3. To measure a fixed thread count, set it as a user would: OMP_NUM_THREADS=2.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from goals import verdict

BUILD = Path(__file__).parents[1] / "build" / "busy"
DEMO = [sys.executable, "-c", "from reasonscope.app.cli import main; main()", "demo", "--quick", "--out", str(BUILD)]
BUSY = [sys.executable, "-c", "while True: pass"]
AT_MOST = 1.3


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of one demo: by the clock, and of the processor."""

    clock: float
    processor: float


def one_demo() -> Spent:
    shutil.rmtree(BUILD, ignore_errors=True)
    began = time.perf_counter()
    process = subprocess.Popen(DEMO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the demo ended with {process.returncode}; run it by hand to see why")
    return Spent(clock=time.perf_counter() - began, processor=used.ru_utime + used.ru_stime)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """A context in which `count` processes each keep a core busy."""
    processes = [subprocess.Popen(BUSY) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--busy", type=int, default=1, help="busy processes to run beside the demo")
    given = parser.parse_args()
    spent: dict[int, list[Spent]] = {0: [], given.busy: []}
    for turn in range(given.turns):
        for busy in sorted(spent, reverse=bool(turn % 2)):
            with busy_processes(busy):
                spent[busy].append(one_demo())
            last = spent[busy][-1]
            sys.stderr.write(f"beside {busy} busy: {last.clock:.0f} s, {last.processor:.0f} s of the processor\n")
    clocks = {busy: [one.clock for one in turns] for busy, turns in spent.items()}
    ratio = statistics.median(clocks[given.busy]) / statistics.median(clocks[0])
    threads = os.environ.get("OMP_NUM_THREADS")
    setting = "threads by the rule" if threads is None else f"OMP_NUM_THREADS={threads}"
    lines = [
        f"`reasonscope demo --quick`, {setting}; medians (and ranges) of {given.turns} turns:",
        "",
        "| | seconds | of the processor |",
        "|---|---|---|",
        *(
            f"| {f'beside {busy} busy' if busy else 'idle'} | {statistics.median(clocks[busy]):.0f} "
            f"({min(clocks[busy]):.0f} – {max(clocks[busy]):.0f}) | {statistics.median(one.processor for one in turns):.0f} |"
            for busy, turns in spent.items()
        ),
        "",
        f"Beside ÷ idle: {ratio:.2f} (goal ≤ {AT_MOST}: {verdict(ratio, at_most=AT_MOST)}).",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
