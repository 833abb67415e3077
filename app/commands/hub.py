"""`reasonscope hub`: recipes, probes and runs on the Hugging Face hub."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

hub = typer.Typer(help="Share recipes, probes and runs on the Hugging Face hub.", no_args_is_help=True)
Repository = Annotated[str, typer.Argument(help="The repository, user/name.")]


class _Kind(StrEnum):
    """What can be shared."""

    recipe = "recipe"
    probe = "probe"
    store = "store"


@hub.command("push")
def _push(
    path: Annotated[Path, typer.Argument(help="The file of a recipe or probe, or the folder of a run.")],
    repository: Repository,
    controls: Annotated[str, typer.Option(help="What was measured beside random controls, for the card.")] = "",
    limits: Annotated[str, typer.Option(help="What it is known to fail at, for the card.")] = "",
    public: Annotated[bool, typer.Option("--public", help="Make a new repository that everybody can read.")] = False,
) -> None:
    """Upload a recipe, a probe or a run, with a card that says what it is, how it was made, its controls and its limits."""
    from reasonscope.steering.recipes.hub import push_to_hub

    typer.echo(push_to_hub(path, repository, controls=controls, limits=limits, private=not public))


@hub.command("pull")
def _pull(
    repository: Repository,
    out: Annotated[Path, typer.Option(help="The file to write; for a store, the folder of the new run.")],
    kind: Annotated[_Kind, typer.Option(help="What it holds.")] = _Kind.recipe,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit; the newest by default.")] = None,
) -> None:
    """Download what `hub push` uploaded, and check it."""
    from reasonscope.data.storage.store import TraceStore
    from reasonscope.steering.recipes.hub import from_hub

    found = from_hub(repository, kind=kind.value, out=out if kind is _Kind.store else None, revision=revision)
    if not isinstance(found, TraceStore):
        found.save(out)
    typer.echo(f"a {kind.value} in {out}")
