"""Recipes, probes and stores on the Hugging Face hub, each with a card that says what it is, how it was made, and what it is not."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from httpx2 import HTTPError
from huggingface_hub.errors import HFValidationError

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.storage.run_folder import run_folder
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.steering.recipes.cards import card_of
from reasonscope.steering.recipes.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How one kind of object is kept on the hub: the type of its repository, and its place there."""

    repo_type: str
    place: str


_KINDS: Mapping[str, _Kind] = {
    "recipe": _Kind(repo_type="model", place="recipe.safetensors"),
    "probe": _Kind(repo_type="model", place="probe.safetensors"),
    "store": _Kind(repo_type="dataset", place="store"),
}
KINDS = tuple(_KINDS)


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    controls: str = "",
    limits: str = "",
    private: bool = True,
    token: str | None = None,
) -> str:
    """Upload a recipe, a probe or a run's store to the Hugging Face hub, with a card.

    Args:
        path: The file of a recipe or probe, or the folder of a run.
        repo_id: `user/name`; it is made if it does not exist: a model repository, and a dataset for a store.
        controls: What was measured against random controls, in a sentence or a table; the card says if nothing is given.
        limits: What it must not be used for, or is known to fail at.
        private: Whether a new repository is private.
        token: A token with write access; by default the one that you logged in with.

    Returns:
        The address of the repository.

    Raises:
        InputError: For another kind of file, a damaged store, or if the hub refuses or cannot be reached.

    Example:
        rs.push_to_hub("runs/mine/steering/seal.recipe.safetensors", "me/seal-qwen3", controls="−24 % tokens, random −2 %")
        recipe = rs.from_hub("me/seal-qwen3")
        print(recipe.summary())
    """
    kind, found = _opened(Path(path))
    card = card_of(found, repo_id, controls=controls, limits=limits)
    place, repo_type = _KINDS[kind].place, _KINDS[kind].repo_type
    api = huggingface_hub.HfApi(token=token)
    with _one_line(f"{path} was not uploaded to {repo_id}"):
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if isinstance(found, TraceStore):
            api.upload_folder(
                repo_id=repo_id,
                repo_type=repo_type,
                folder_path=found.path,
                path_in_repo=place,
                ignore_patterns=[".lock"],
                commit_message=f"Upload a {kind}",
            )
        else:
            _upload(api, repo_id, repo_type, Path(path), place, f"Upload a {kind}")
        _upload(api, repo_id, repo_type, card.encode(), "README.md", "Say what it is and how it was made")
    return str(url)


def from_hub(
    repo_id: str,
    *,
    kind: str = "recipe",
    out: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Recipe | LinearProbe | TraceStore:
    """Download what `push_to_hub` uploaded.

    Args:
        repo_id: `user/name`.
        kind: "recipe", "probe" or "store".
        out: For a store, the folder of the new run; a recipe or probe stays in the cache of the hub.
        revision: A branch, tag or commit; the newest by default.
        token: A token with read access; by default the one that you logged in with.

    Returns:
        The recipe or probe, or the store with every byte checked.

    Raises:
        InputError: For an unknown kind, a repository without such an object, or if the hub refuses or cannot be reached.
        StoreError: If a byte of a store is not as it was.

    Example:
        store = rs.from_hub("me/steered-traces", kind="store", out="runs/theirs")
        probe = rs.from_hub("me/length-probe", kind="probe")
        print(len(store), probe.site)
    """
    if kind not in _KINDS:
        raise InputError(f"{kind!r} cannot be downloaded; choose from {', '.join(_KINDS)}")
    if (kind == "store") != (out is not None):
        raise InputError("give `out`, the folder of the new run, for a store and for nothing else")
    place = _KINDS[kind].place
    with _one_line(f"{repo_id} was not downloaded"):
        folder = huggingface_hub.snapshot_download(
            repo_id,
            repo_type=_KINDS[kind].repo_type,
            revision=revision,
            allow_patterns=[f"{place}/**" if kind == "store" else place],
            local_dir=out,
            token=token,
        )
    found = Path(folder) / place
    if not found.exists():
        raise InputError(f"{repo_id} holds no {kind}: it has no {place}; look at the repository, or name another kind")
    return _loaded(kind, found)


def _loaded(kind: str, path: Path) -> Recipe | LinearProbe | TraceStore:
    if kind == "recipe":
        return Recipe.load(path)
    if kind == "probe":
        return LinearProbe.load(path)
    if problems := check_store(path):
        raise StoreError(f"{problems[0]}; download it again")
    return TraceStore.open(path)


def _opened(path: Path) -> tuple[str, Recipe | LinearProbe | TraceStore]:
    """The kind of what lies at `path`, and itself."""
    if path.is_dir():
        store = run_folder(path).store
        if problems := check_store(store):
            raise InputError(f"{problems[0]}; a damaged store is not uploaded")
        return "store", TraceStore.open(store)
    failed = []
    for kind, load in (("recipe", Recipe.load), ("probe", LinearProbe.load)):
        try:
            return kind, load(path)
        except InputError as error:
            failed.append(str(error))
    raise InputError(failed[0] if not path.is_file() else f"{path} is neither a recipe nor a probe: {failed[0]}")


def _upload(
    api: huggingface_hub.HfApi, repo_id: str, repo_type: str, content: Path | bytes, place: str, message: str
) -> None:
    api.upload_file(
        repo_id=repo_id, repo_type=repo_type, path_or_fileobj=content, path_in_repo=place, commit_message=message
    )


@contextmanager
def _one_line(failed: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        said: Any = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{failed}: {said}; look at the name, the network and `hf auth login`") from error
