"""Recipes, probes and stores go to a fake of the hub and come back as they were, with a card that says what they are."""

import shutil
from pathlib import Path
from types import MappingProxyType

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError
from typer.testing import CliRunner

from reasonscope.app import cli
from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.storage.store import TraceStore
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.generation.recording import record
from reasonscope.steering.recipes.hub import from_hub, push_to_hub


class FakeHub:
    """A hub in a folder: one folder per repository, which `snapshot_download` copies as the real one does."""

    def __init__(self, root: Path):
        self.root, self.made = root, {}

    def folder(self, repo_id, repo_type):
        if (repo_id, repo_type) not in self.made:
            raise HfHubHTTPError(f"404: no {repo_type} {repo_id}\nmore lines", response=_Response())
        return self.root / repo_type / repo_id.replace("/", "--")

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        self.made.setdefault((repo_id, repo_type), private)
        return f"https://hub/{repo_id}"

    def upload_file(self, *, repo_id, repo_type, path_or_fileobj, path_in_repo, commit_message):
        target = self.folder(repo_id, repo_type) / path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        raw = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
        target.write_bytes(raw)

    def upload_folder(self, *, repo_id, repo_type, folder_path, path_in_repo, ignore_patterns, commit_message):
        target = self.folder(repo_id, repo_type) / path_in_repo
        shutil.copytree(folder_path, target, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True)

    def snapshot_download(self, repo_id, *, repo_type, revision, allow_patterns, local_dir, token):
        folder = self.folder(repo_id, repo_type)
        if local_dir is None:
            return str(folder)
        for path in (path for path in folder.rglob("*") if path.is_file()):
            place = path.relative_to(folder)
            if any(
                place.match(pattern.replace("/**", "/*")) or place.parts[0] == pattern.split("/")[0]
                for pattern in allow_patterns
            ):
                (Path(local_dir) / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, Path(local_dir) / place)
        return str(local_dir)


class _Response:
    headers = MappingProxyType({})
    request = None
    status_code = 404


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_recipe_comes_back_with_its_hash_and_a_card(hub, mixed, tmp_path):
    mixed.save(tmp_path / "mixed.recipe.safetensors")
    url = push_to_hub(tmp_path / "mixed.recipe.safetensors", "me/mixed", controls="−24 % tokens, random −2 %")
    assert url == "https://hub/me/mixed" and hub.made == {("me/mixed", "model"): True}
    assert from_hub("me/mixed").hash == mixed.hash
    card = (hub.folder("me/mixed", "model") / "README.md").read_text(encoding="utf-8")
    for heading in ("What it is", "How it was made", "Data", "Controls", "Limits", "Use"):
        assert f"\n## {heading}\n" in card
    for said in (
        mixed.hash,
        "clamp to -2.5",
        "2 problems of runs/mine",
        "−24 % tokens",
        'rs.from_hub("me/mixed")',
        "- recipe",
    ):
        assert said in card


def test_a_card_without_controls_says_so(hub, everywhere, tmp_path):
    everywhere.save(tmp_path / "push.recipe.safetensors")
    push_to_hub(tmp_path / "push.recipe.safetensors", "me/push", private=False)
    card = (hub.folder("me/push", "model") / "README.md").read_text(encoding="utf-8")
    assert "Nothing was given. Do not take an effect for granted" in card and hub.made[("me/push", "model")] is False


def test_a_probe_comes_back(hub, model, tmp_path):
    direction = np.arange(model.d_model, dtype=np.float64)
    probe = LinearProbe(
        site=Site("resid_post", 2),
        task="regression",
        method="ridge",
        coef=direction,
        intercept=1.0,
        model=dict(model.fingerprint),
        provenance={"target": "log(1 + thinking tokens)", "learned_from": ["a", "b", "c"]},
    )
    probe.save(tmp_path / "length.safetensors")
    push_to_hub(tmp_path / "length.safetensors", "me/length")
    again = from_hub("me/length", kind="probe")
    np.testing.assert_array_equal(again.coef, probe.coef)
    card = (hub.folder("me/length", "model") / "README.md").read_text(encoding="utf-8")
    assert "log(1 + thinking tokens)" in card and "3 problems" in card
    with pytest.raises(InputError, match="holds no recipe"):
        from_hub("me/length")


def test_a_steered_run_comes_back_with_its_recipe_and_every_byte(hub, mixed, model, problems, sampling, tmp_path):
    store = record(model, problems, tmp_path / "run" / "store", sites=["resid_post.3"], sampling=sampling, steer=mixed)
    push_to_hub(tmp_path / "run", "me/traces")
    assert not (hub.folder("me/traces", "dataset") / "store" / ".lock").exists()
    again = from_hub("me/traces", kind="store", out=tmp_path / "theirs")
    assert isinstance(again, TraceStore) and list(again) == list(store)
    assert again.path == tmp_path / "theirs" / "store" and again.recipe.exists()
    card = (hub.folder("me/traces", "dataset") / "README.md").read_text(encoding="utf-8")
    assert f"2 reasoning traces, steered by mixed (`{mixed.hash}`" in card
    shard = next((hub.folder("me/traces", "dataset") / "store" / "shards").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(StoreError, match="download it again"):
        from_hub("me/traces", kind="store", out=tmp_path / "damaged")


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    with pytest.raises(InputError, match="me/none was not downloaded: 404: no model me/none; look at") as refused:
        from_hub("me/none")
    assert "\n" not in str(refused.value)
    (tmp_path / "notes.txt").write_text("x" * 40)
    with pytest.raises(InputError, match="is neither a recipe nor a probe"):
        push_to_hub(tmp_path / "notes.txt", "me/notes")
    with pytest.raises(InputError, match="choose from recipe, probe, store"):
        from_hub("me/none", kind="model")
    with pytest.raises(InputError, match="give `out`"):
        from_hub("me/none", kind="store")


def test_the_commands_push_and_pull(hub, everywhere, tmp_path):
    path = tmp_path / "push.recipe.safetensors"
    everywhere.save(path)
    for args in (("push", path, "me/push"), ("pull", "me/push", "--out", tmp_path / "again.recipe.safetensors")):
        said = CliRunner().invoke(cli.app, ["hub", *map(str, args)], catch_exceptions=False)
        assert said.exit_code == 0, said.output
    assert (tmp_path / "again.recipe.safetensors").read_bytes() == path.read_bytes()
