"""Where a run keeps its store, and where what is made from it goes: beside the store, which is append-only and checksummed."""

from dataclasses import dataclass
from pathlib import Path

from reasonscope.data.storage.manifest import NAME


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """`store` is the folder of the traces; `results` the one for probes, scores, numbers and figures, outside of it."""

    store: Path
    results: Path

    @property
    def probes(self) -> Path:
        return self.results / "probes"

    @property
    def scores(self) -> Path:
        return self.results / "scores"

    @property
    def analyses(self) -> Path:
        return self.results / "results"

    @property
    def figures(self) -> Path:
        return self.results / "figures"

    @property
    def numbers(self) -> Path:
        return self.results / "numbers"

    @property
    def vectors(self) -> Path:
        return self.results / "steering"


def run_folder(run: Path) -> RunFolder:
    """The places of `run`: a folder that holds `store`, or a store itself.

    Results go into the folder that holds `store`; for a store of another name into a folder beside it, RUN-results.
    """
    if not (run / NAME).exists():
        return RunFolder(store=run / "store" if (run / "store" / NAME).exists() else run, results=run)
    whole = run.resolve()
    return RunFolder(
        store=run, results=whole.parent if whole.name == "store" else whole.with_name(f"{whole.name}-results")
    )
