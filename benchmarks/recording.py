"""What a store costs: recording to disk compared with memory, a kill halfway, and its files compared with plain ones.

W3 records the organism's residual stream after every block to disk, in a process that may take 1 GiB more than after loading the model
(RLIMIT_DATA), and captures the same while decoding into memory, as in W2. A shard is filled before it is written, so memory is compared
for many traces, which fill more than one full shard: it is flat if twice as many traces take at most a tenth more. W7 kills the process
(SIGKILL) once half of the traces are stored, and starts it again; seconds are processor seconds, from when a process begins to record.

W12 writes arrays as a store and as plain safetensors files, both flushed to the disk. It then reads single traces at one site in random
order after the page cache was told to drop the files, compared with plain reads of as many bytes (the speed of the disk), and reads
everything once.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from reasonscope.data.errors import StoreError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.durable import write_durably
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.text.parse import build_trace
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import expand_sites
from reasonscope.probes.generation.decoding import generate
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import load_prompting

sys.path.insert(0, str(Path(__file__).parent))
from goals import quartiles, verdict
from tools.serve import status

BUILD = Path(__file__).parents[1] / "build" / "recording"
SAMPLING = Sampling(temperature=0.7, max_new_tokens=512, seed=0)
CAP = 2**30
PARTS = {
    "generate": "writing tokens",
    "as_trace": "making traces",
    "replay": "reading the sites",
    "append": "the store",
}
SITES, WIDTH, ROWS = ("resid_post.0", "resid_post.1", "resid_post.2", "resid_post.3"), 1_024, 512


def child(mode: str, n: int, path: Path | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--child", mode, "--problems", str(n), "--path", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    text, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a process of this benchmark ended with {process.returncode}")
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def run_child(mode: str, n: int, path: Path) -> None:
    """In a process of its own: capture into memory, or record to `path`; seconds and extra memory to stdout."""
    torch.set_num_threads(1)
    model = load_model("organism")
    problems = load_problems("ledger", n=n)
    sites = expand_sites("resid_post.*", model.n_layers)
    assert model.fingerprint  # hashed once, as both sides would
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + CAP, -1))
    parts = clocked()
    before, began = status("VmHWM"), time.process_time()
    sys.stdout.write(json.dumps({"began": began}) + "\n")
    sys.stdout.flush()
    if mode == "record":
        tokens = sum(len(t.token_ids) for t in record(model, problems, path, sites=sites, sampling=SAMPLING))
    else:
        prompts = sorted((model.encode_prompt(problem) for problem in problems), key=len)
        tokens = 0
        for start in range(0, n, 16):
            batch = prompts[start : start + 16]
            done = generate(model, batch, SAMPLING, seeds=range(len(batch)), read=sites)
            tokens += sum(len(one.token_ids) for one in done)
    spent = {"cpu": time.process_time() - began, "extra": status("VmHWM") - before, "tokens": tokens, "parts": parts}
    sys.stdout.write(json.dumps(spent) + "\n")


def clocked() -> dict[str, float]:
    """Puts a clock around the parts of `record`; their processor seconds, which grow as it runs."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def clock(owner: Any, name: str) -> None:
        run = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            started = time.process_time()
            found = run(*given, **named)
            seconds[name] += time.process_time() - started
            return found

        setattr(owner, name, timed)

    for name in ("generate", "as_trace", "replay"):
        clock(sys.modules[record.__module__], name)
    clock(TraceStore, "append")
    return seconds


def shares(runs: Sequence[dict[str, Any]]) -> str:
    """Of the processor seconds of recording, over all runs."""
    whole = sum(run["cpu"] for run in runs)
    return ", ".join(f"{label} {sum(run['parts'][part] for run in runs) / whole:.0%}" for part, label in PARTS.items())


def to_disk(n: int, turns: int) -> list[str]:
    """W3."""
    memory, disk = [], []
    for turn in range(turns):
        for mode, kept in sorted((("memory", memory), ("record", disk)), reverse=bool(turn % 2)):
            shutil.rmtree(BUILD / "w3", ignore_errors=True)
            kept.append(answer(child(mode, n, BUILD / "w3")))
    shutil.rmtree(BUILD / "w3")
    extra = []
    for many in (4 * n, 8 * n):
        extra.append(answer(child("record", many, BUILD / "w3"))["extra"])
        shutil.rmtree(BUILD / "w3")
    ratios = [
        one["cpu"] / one["tokens"] / (other["cpu"] / other["tokens"]) for one, other in zip(disk, memory, strict=True)
    ]
    return [
        f"| W3 record {n} traces to disk, 1 GiB more at most | ≤ 1.15 × capture into memory, per token | {quartiles(ratios)} "
        f"| {verdict(ratios, at_most=1.15)} |",
        f"| W3 where these seconds go | | {shares(disk)} | |",
        f"| W3 extra memory, {4 * n} and {8 * n} traces | flat, ≤ 1.1 × | {mib(extra[0])} and {mib(extra[1])} "
        f"| {verdict(extra[1] / extra[0], at_most=1.1)} |",
    ]


def killed(n: int) -> list[str]:
    """W7."""
    whole, cut = BUILD / "w7-whole", BUILD / "w7-cut"
    for folder in (whole, cut):
        shutil.rmtree(folder, ignore_errors=True)
    plain = answer(child("record", n, whole))
    spent_before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = child("record", n, cut)
    assert process.stdout is not None
    began = json.loads(process.stdout.readline())["began"]
    while stored(cut) < n / 2:
        if process.poll() is not None:
            raise RuntimeError("the run ended before it was killed; give more problems")
        time.sleep(0.05)
    there = stored(cut)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    first = spent.ru_utime + spent.ru_stime - spent_before.ru_utime - spent_before.ru_stime - began
    ratio = (first + answer(child("record", n, cut))["cpu"]) / plain["cpu"]
    equal = same(whole, cut)
    return [
        f"| W7 killed with {there} of {n} traces stored, and resumed | ≤ 1.05 × uninterrupted | {ratio:.3f} "
        f"| {verdict(ratio, at_most=1.05)} |",
        f"| W7 the two stores | the same | {'the same' if equal else 'DIFFERENT'} | {verdict(equal, at_least=True)} |",
    ]


def stored(path: Path) -> int:
    try:
        return len(TraceStore.open(path))
    except StoreError:
        return 0


def same(one: Path, other: Path) -> bool:
    """Trace by trace, every bit."""
    a, b = TraceStore.open(one), TraceStore.open(other)
    return sorted(a.ids) == sorted(b.ids) and all(
        np.array_equal(a.activations(id, site), b.activations(id, site)) and a.trace(id) == b.trace(id)
        for id in a.ids
        for site in a.sites
    )


def files(gigabytes: float) -> list[str]:
    """W12."""
    shutil.rmtree(BUILD / "w12", ignore_errors=True)
    rows = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    per_shard, any_trace = 8, some_trace()
    shards = max(2, int(gigabytes * 2**30 / (per_shard * len(SITES) * rows.nbytes)))
    plain, store = BUILD / "w12" / "plain", BUILD / "w12" / "store"
    plain.mkdir(parents=True)
    seconds = {"plain": 0.0, "store": 0.0}
    with TraceStore.create(store, sites=SITES) as ours:
        for shard in range(shards):
            arrays = [rows + np.float32(shard * per_shard + i) for i in range(per_shard)]
            traces = [replace(any_trace, id=f"{shard}/{i}") for i in range(per_shard)]
            started = time.perf_counter()
            joined = {site: np.concatenate(arrays) for site in SITES}
            write_durably(plain / f"{shard}.safetensors", lambda path, joined=joined: save_file(joined, path))
            middle = time.perf_counter()
            ours.append(traces, dict.fromkeys(SITES, arrays))
            seconds["plain"] += middle - started
            seconds["store"] += time.perf_counter() - middle
    opened = TraceStore.open(store)
    ids = opened.ids
    forget(store)
    rng, waits = np.random.default_rng(1), []
    for id in rng.choice(ids, size=min(200, len(ids)), replace=False):
        started = time.perf_counter()
        opened.activations(str(id), SITES[1])
        waits.append(1_000 * (time.perf_counter() - started))
    forget(plain)
    chosen = rng.choice(shards * per_shard * len(SITES), size=len(waits), replace=False)
    raw = [plain_read(plain / f"{i % shards}.safetensors", i // shards * rows.nbytes, rows.nbytes) for i in chosen]
    forget(store)
    started = time.perf_counter()
    for id in ids:
        for site in SITES:
            opened.activations(id, site)
    scan = time.perf_counter() - started
    forget(plain)
    started = time.perf_counter()
    for shard in range(shards):
        for array in load_file(plain / f"{shard}.safetensors").values():
            array.sum()  # touched, as the store's checksums touch theirs
    by_files = time.perf_counter() - started
    size = shards * per_shard * len(SITES) * rows.nbytes / 2**30
    written, scanned = seconds["plain"] / seconds["store"], by_files / scan
    shutil.rmtree(BUILD / "w12")
    return [
        f"| W12 write {size:.1f} GiB | ≥ 0.8 × the speed of safetensors files | {written:.2f} "
        f"| {verdict(written, at_least=0.8)} |",
        f"| W12 read one trace at one site ({rows.nbytes / 2**20:.0f} MiB), median and 95 % | ≤ 5 ms, the median "
        f"| {np.median(waits):.1f} and {np.quantile(waits, 0.95):.1f} ms | {verdict(float(np.median(waits)), at_most=5)} |",
        f"| W12 the same by a plain read | | {np.median(raw):.1f} and {np.quantile(raw, 0.95):.1f} ms | |",
        f"| W12 read everything, checksums compared | ≥ 0.8 × the speed of safetensors files | {scanned:.2f} "
        f"| {verdict(scanned, at_least=0.8)} |",
    ]


def plain_read(path: Path, offset: int, size: int) -> float:
    """Milliseconds for `size` bytes of a file."""
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.pread(file.fileno(), size, offset)
    return 1_000 * (time.perf_counter() - started)


def some_trace() -> Trace:
    """A trace of ROWS rows; what it says does not matter here."""
    tokenizer = load_prompting("organism").tokenizer_backend
    ids = tokenizer.encode("One and one makes two. " * ROWS).ids[: ROWS + 1]
    problem = Problem(id="any", prompt="?")
    return build_trace(id="any", problem=problem, token_ids=ids, n_prompt_tokens=1, tokenizer=tokenizer)


def forget(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def mib(n: float) -> str:
    return f"{n / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few problems, one turn, 1 GiB of files")
    parser.add_argument("--part", choices=["runs", "files"], help="both by default")
    parser.add_argument("--child", choices=["memory", "record"], help=argparse.SUPPRESS)
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run_child(given.child, given.problems, given.path)
        return
    n, turns, gigabytes = (24, 1, 1.0) if given.small else (given.problems, given.turns, given.gigabytes)
    BUILD.mkdir(parents=True, exist_ok=True)
    _, runs_doc, files_doc = __doc__.strip().split("\n\n")
    if given.part != "files":
        _table("## What a store costs", runs_doc, (lambda: to_disk(n, turns), lambda: killed(4 * n)))
    if given.part != "runs":
        _table("## Files of a store", files_doc, (lambda: files(gigabytes),))


def _table(heading: str, told: str, parts: Sequence[Callable[[], list[str]]]) -> None:
    sys.stdout.write(f"{heading}\n\n{told}\n\n| | goal | measured | |\n|---|---|---|---|\n")
    for part in parts:
        sys.stdout.write("\n".join(part()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
