"""The folders of a run: its store, and next to the store (which is append-only and checksummed) everything made from
it."""

from dataclasses import dataclass
from pathlib import Path

from reasonscope.data.storage.manifest import NAME


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folders of a run.

    Attributes:
        store: Folder of the traces and activations.
        results: Folder of probes, scores, numbers, figures and vectors, outside the store.

    Example:
        folder = rs.open_run("runs/mine").where
        sorted(folder.numbers.glob("*.json"))
        folder.vectors / "seal.recipe.safetensors"
    """

    store: Path
    results: Path

    @property
    def probes(self) -> Path:
        """Folder of the fitted probes."""
        return self.results / "probes"

    @property
    def scores(self) -> Path:
        """Folder of the token scores."""
        return self.results / "scores"

    @property
    def analyses(self) -> Path:
        """Folder of the results of analyses."""
        return self.results / "results"

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.results / "figures"

    @property
    def numbers(self) -> Path:
        """Folder of the numbers, as JSON."""
        return self.results / "numbers"

    @property
    def vectors(self) -> Path:
        """Folder of the recipes and steering vectors."""
        return self.results / "steering"


def run_folder(run: Path) -> RunFolder:
    """The folders of `run`, which is either a folder that holds `store` or a store itself.

    Results go into the folder that holds `store`; for a store with another name they go into RUN-results next to it.
    """
    if not (run / NAME).exists():
        return RunFolder(store=run / "store" if (run / "store" / NAME).exists() else run, results=run)
    whole = run.resolve()
    return RunFolder(
        store=run, results=whole.parent if whole.name == "store" else whole.with_name(f"{whole.name}-results")
    )
