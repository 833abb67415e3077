"""How far each tool gets if it may take 1 GiB more than after loading the model.

Every tool reads the residual stream after each block of the organism, for batches of 16 sequences of 512 tokens one after another (as in
W1), and keeps what it read in its usual place: the tools in memory, the store of this project on disk. Everything together is 1.5 times
what it may take. W3 is the same with a model that generates.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from goals import verdict
from peers import BUILD, TOOLS, Tool, Workload, children, organism_folder

CAP = 2**30
OURS = Tool(module="reasonscope_store", label="**reasonscope, to disk**")
CAPTURING = ("raw_hooks", "reasonscope_", "transformer_lens_", "nnsight_", "interp_engine_")
WORKLOAD = Workload(name="W1", label="16 sequences of 512 tokens", lengths=(512,) * 16, new=0, goal=1)
BYTES = 16 * 512 * 6 * 128 * 4  # that one batch reads
PASSES = 3 * CAP // (2 * BYTES)


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    folder = organism_folder()
    lines = [
        "## What fits under a cap of memory",
        "",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        "",
        f"| | batches read, of {PASSES} | extra memory | then | goal: all | |",
        "|---|---|---|---|---|---|",
    ]
    for tool in (OURS, *(tool for tool in TOOLS if tool.module in CAPTURING)):
        with children(folder, 1, 1.0, [tool]) as (child,):
            found = child.run(WORKLOAD, hold=PASSES, cap=CAP)
        judged = verdict(found["passes"], at_least=PASSES) if tool is OURS else ""
        said = found["error"] or "all were read"
        said = "out of memory" if "allocate memory" in said or said.startswith("MemoryError") else said
        lines.append(
            f"| {tool.label} | {found['passes']} | {found['extra'] / 2**20:,.0f} MiB | {said} | {PASSES} | {judged} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
