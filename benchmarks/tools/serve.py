"""One tool in one process: reads jobs as JSON lines, runs each, and answers with seconds, peak memory and where its results lie.

    python benchmarks/tools/serve.py TOOL MODEL_FOLDER THREADS

Needs torch, numpy and the tool alone: it runs in environments that hold no reasonscope.
"""

import json
import resource
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@dataclass(frozen=True)
class Job:
    """`ids` and `mask` (batch, token), left-padded; `new` tokens to write; `vector` (d_model,) to add after block `layer`."""

    ids: torch.Tensor
    mask: torch.Tensor
    new: int
    layer: int
    vector: np.ndarray


def main():
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a tool prints is not an answer
    tool = import_module(f"tools.{name}")
    state = tool.load(folder)
    say(answers, {"workloads": sorted(tool.WORKLOADS), "versions": versions(), "memory": peak()})
    for line in sys.stdin:
        asked = json.loads(line)
        job = read_job(folder, asked)
        try:
            say(answers, (hold if "hold" in asked else run)(tool, state, job, asked))
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is its result
            say(answers, {"error": f"{type(error).__name__}: {error}"[:200]})


def run(tool, state, job, asked):
    """Seconds of one run and the memory that it needed."""
    forget_peak()
    before = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(asked["times"]):
        found = tool.WORKLOADS[asked["workload"]](state, job)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    spent = {kind: seconds / asked["times"] for kind, seconds in spent.items()}
    if asked.get("keep"):
        np.savez(asked["keep"], **plain(found, job))
    return {**spent, "extra": peak() - before}


def hold(tool, state, job, asked):
    """How many of `hold` passes' activations can be kept within `cap` bytes more than are held now."""
    forget_peak()
    before, kept, error = peak(), [], None
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + asked["cap"], limits[1]))
    try:
        for _ in range(asked["hold"]):
            kept.append(tool.WORKLOADS[asked["workload"]](state, job)["activations"])
    except (MemoryError, RuntimeError) as found:  # torch raises the latter
        error = f"{type(found).__name__}: {found}".splitlines()[0][:200]
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    return {"passes": len(kept), "extra": peak() - before, "error": error}


def read_job(folder, asked):
    rng = np.random.default_rng(0)
    lengths, config = asked["lengths"], json.loads((folder / "config.json").read_text())
    ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for row, n in enumerate(lengths):
        ids[row, -n:] = rng.integers(5, config["vocab_size"], size=n)
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    vector = (asked.get("strength", 1.0) * rng.standard_normal(config["hidden_size"])).astype(np.float32)
    return Job(
        torch.from_numpy(ids),
        torch.from_numpy(mask.astype(np.int64)),
        asked["new"],
        config["num_hidden_layers"] // 2,
        vector,
    )


def plain(found, job):
    """Arrays to compare: the tokens written (batch, token), and the last row of the last block of each sequence."""
    kept = {}
    if "tokens" in found:
        kept["tokens"] = np.stack([np.asarray(row)[-job.new :] for row in found["tokens"]])
    if "activations" in found:
        last = found["activations"][-1]  # of the last block (batch, token, d_model), or of the last sequence too
        fed = job.ids.shape[1] + max(job.new - 1, 0)  # some tools feed the last token too
        kept["last"] = (last if last.ndim == 2 else last[-1])[:fed][-1].float().numpy()
    return kept


def peak():
    """The most memory that this process has held since `forget_peak`, in bytes."""
    return status("VmHWM")


def status(name):
    """Memory of this process in bytes by the name that Linux gives it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def versions():
    wanted = (
        "torch",
        "transformers",
        "transformer-lens",
        "nnsight",
        "interp-engine",
        "steering-vectors",
        "repeng",
        "reasonscope",
    )
    return {
        d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"].lower().replace("_", "-") in wanted
    }


def say(answers, value):
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
