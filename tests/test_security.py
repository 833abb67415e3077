"""What comes from outside does no harm: pickles, paths that lead out, links, and files that say they are larger than they are."""

import ast
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reasonscope.analysis.figures import read_figure
from reasonscope.analysis.results import Result, result_path
from reasonscope.analysis.runs.saved_numbers import read_numbers
from reasonscope.app import cli
from reasonscope.app.page_parts.runs import confined, find_runs
from reasonscope.data.errors import InputError, MissingExtraError, ModelLoadError, ReasonscopeError, StoreError
from reasonscope.data.exchange import dump_files
from reasonscope.data.exchange.export import export_thought_anchors
from reasonscope.data.exchange.importers import import_inspect, import_jsonl, import_thought_anchors
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.storage.manifest import NAME, _seal
from reasonscope.data.storage.soundness import check_store
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.token_scores import read_scores
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.trace import Message, Problem
from reasonscope.probes.fitting.linear_probes import LinearProbe
from reasonscope.probes.models.model import load_model
from reasonscope.probes.models.prompting import load_prompting
from reasonscope.steering.vectors.vector import SteeringVector

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "probes", "steering", "analysis", "app")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
# It writes hooks for a trusted server, which takes them so: it may call `dumps` and no more.
WRITES_PICKLES = ROOT / "probes" / "vllm" / "steering.py"


def sources():
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_of_ours_unpickles_or_runs_text():
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name.split(".")[0] for alias in node.names] if isinstance(node, ast.Import) else []
            names += [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else []
            allowed = {"pickle"} if path == WRITES_PICKLES and isinstance(node, ast.Import) else set()
            found += [(path.name, name) for name in names if name in UNSAFE_MODULES - allowed]
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = called in UNSAFE_CALLS or called in ("yaml.load", "os.system")
            unsafe |= called.startswith("pickle.") and called != "pickle.dumps"
            unsafe |= called == "torch.load" and keywords.get("weights_only") != "True"
            unsafe |= keywords.get("allow_pickle") == "True" or keywords.get("shell") == "True"
            unsafe |= keywords.get("trust_remote_code") == "True"
            if unsafe:
                found.append((path.name, called))
    assert sources() and found == []


class Bomb:
    """A pickle that leaves a file behind where it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def readers(folder):
    """Everything that opens a file of others, by name."""
    return {
        "vector": SteeringVector.load, "probe": LinearProbe.load, "result": Result.load, "scores": read_scores,
        "figure": read_figure, "numbers": read_numbers, "jsonl": import_jsonl, "log": import_inspect, "problems": load_problems,
        "store": lambda path: TraceStore.open(path.parent), "anchors": lambda path: import_thought_anchors(path.parent),
        "model": lambda path: load_model(str(path.parent)),
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [0, 2, 5, "zip"])
@pytest.mark.parametrize("name", readers(None))
def test_a_pickle_is_read_by_nobody(name, protocol, tmp_path):
    went_off = tmp_path / "went off"
    raw = pickle.dumps(Bomb(went_off), protocol=2 if protocol == "zip" else protocol)
    if protocol == "zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", raw)
        raw = file.getvalue()
    folder = tmp_path / "given"
    folder.mkdir()
    file = {"store": NAME, "anchors": "base_solution.json", "model": "pytorch_model.bin"}.get(name, "x.safetensors")
    (folder / file).write_bytes(raw)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ReasonscopeError):
        readers(folder)[name](folder / file)
    assert not went_off.exists()
    pickle.loads(raw) if protocol in (0, 2, 5) else None  # noqa: S301 - it would have gone off
    assert went_off.exists() or protocol == "zip"


def test_pickled_weights_are_named_and_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "no")))
    with pytest.raises(ModelLoadError, match="pickles, which can run code"):
        load_model(str(tmp_path))
    assert not (tmp_path / "no").exists()


def test_code_that_a_checkpoint_brings_is_not_run_and_the_risk_is_named(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((Path(str(files("reasonscope.data.organism"))) / "organism" / file).read_bytes())
    with pytest.raises(ModelLoadError, match="could do anything on this machine, so it is never run"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def a_model(folder, **changes):
    """A copy of the shipped model in `folder`, with other entries in its config.json."""
    shutil.copytree(Path(str(files("reasonscope.data.organism"))) / "organism", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "paged|evil/kernel@main:run", {"": "evil/kernel"}])
def test_a_kernel_of_the_hub_is_not_fetched_and_the_risk_is_named(key, value, tmp_path):
    with pytest.raises(ModelLoadError, match="code from the hub"):
        load_model(a_model(tmp_path / "m", **{key: value}))
    with pytest.raises(ModelLoadError, match="code from the hub"):
        load_model(a_model(tmp_path / "n", text_config={key: value}))


def test_a_known_architecture_that_names_code_of_its_own_is_loaded_without_it(tmp_path):
    source = a_model(tmp_path / "m", auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"})
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    assert type(load_model(source).hf).__module__.startswith("transformers.models.")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"head_dim": 0}, {"dtype": "evil"}, {"hidden_size": "x"},
        {"vocab_size": 0}, {"quantization_config": []}, {"attn_implementation": "flash_attention_2"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, {"rope_scaling": {"type": "evil"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_is_wrong_is_one_error_that_names_the_folder(changes, tmp_path):
    source = a_model(tmp_path / "m", **changes)
    with pytest.raises((ModelLoadError, MissingExtraError), match=f"cannot load '{source}'"):
        load_model(source)


def test_a_configuration_that_is_nested_too_deep_is_one_error(tmp_path):
    source = a_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[" * 100_000, encoding="utf-8")
    for load in (load_model, load_prompting):
        with pytest.raises(ModelLoadError, match="RecursionError"):
            load(source)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ a.b.c }}", "{% if", "{{ [].pop() }}"]
)
def test_a_chat_template_that_fails_is_one_error_that_names_it(template):
    prompting = load_prompting("organism")
    prompting.tokenizer.chat_template = template
    with pytest.raises(InputError, match="the chat template of organism fails on problem 'p'"):
        prompting.encode_prompt(Problem(id="p", messages=(Message(role="user", content="Q"),)))


def trace(id):
    return trace_from_text(id=id, problem=Problem(id="p", prompt="Q"), prompt="Q", completion="<think>a. b.</think>c")


HOSTILE = ("../out", "/tmp/reasonscope-out", "a/../../out", "..", "", "nul\0l")


@pytest.mark.parametrize("id", HOSTILE)
def test_an_id_leads_out_of_no_folder(id, tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(InputError, match="cannot be the name"):
        export_thought_anchors([trace(id)], folder)
    place = result_path(folder, "mi", id)
    assert place.parent == folder / "mi"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "000000.parquet/../../x", "000001"])
def test_a_manifest_names_no_file_elsewhere(name, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"x")
    with TraceStore.create(tmp_path / "run") as store:
        store.append([trace("t")])
    file = tmp_path / "run" / NAME
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("checksum")
    [shard] = values["shards"]
    [content] = shard["files"].values()
    for changed in (
        {**shard, "name": name, "files": {f"{name}.parquet": content}},
        {**shard, "files": {name: content}},
    ):
        file.write_bytes(_seal({**values, "shards": [changed]}))
        with pytest.raises(StoreError):
            TraceStore.open(tmp_path / "run")
        assert len(check_store(tmp_path / "run")) == 1


def linked(path, target):
    """`path` becomes a link to `target`, where it is moved to if it is there."""
    if path.exists():
        path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["shards", ".lock", NAME, "shards/000000.parquet", "shards/000000.safetensors"])
def test_a_link_in_a_run_leads_nowhere(name, tmp_path):
    with TraceStore.create(tmp_path / "run", sites=["z.0"]) as store:
        store.append([trace("t")], {"z.0": [np.zeros((0, 2), dtype=np.float32)]})
        assert store.ids
    out = tmp_path / "outside"
    linked(tmp_path / "run" / name, out)
    if out.is_dir():
        (out / "precious.tmp").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*")), out.stat().st_mtime_ns
    assert [f"{name} is a link" in problem for problem in check_store(tmp_path / "run")] == [True]
    if name != ".lock":
        with pytest.raises(StoreError, match="is a link"):
            TraceStore.open(tmp_path / "run")
    if name.startswith("shards/"):
        with pytest.raises(StoreError, match="is a link"):
            store.trace("t") if name.endswith("parquet") else store.activations("t", "z.0")
    else:
        with pytest.raises(StoreError):
            store.append([trace("u")], {"z.0": [np.zeros((0, 2), dtype=np.float32)]})
    assert (sorted(tmp_path.rglob("*")), out.stat().st_mtime_ns) == before


def test_a_lock_that_is_a_link_makes_no_file_elsewhere(tmp_path):
    TraceStore.create(tmp_path / "run").close()
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "outside")
    with TraceStore.open(tmp_path / "run") as store, pytest.raises(StoreError, match="cannot write"):
        store.append([trace("t")])
    assert not (tmp_path / "outside").exists() and "is a link" in check_store(tmp_path / "run")[0]


def test_a_run_may_be_reached_by_a_link_and_a_part_with_a_link_is_not_taken(tmp_path):
    with TraceStore.create(tmp_path / "part") as store:
        store.append([trace("t")])
    (tmp_path / "link").symlink_to(tmp_path / "part")
    part = TraceStore.open(tmp_path / "link")
    assert part.ids == ("t",) and part.check() == []
    linked(tmp_path / "part" / "shards" / "000000.parquet", tmp_path / "outside")
    with TraceStore.create(tmp_path / "whole") as whole, pytest.raises(StoreError, match="is a link"):
        whole.adopt(part)
    assert check_store(tmp_path / "whole") == []


def test_links_lead_the_app_nowhere(tmp_path):
    (tmp_path / "runs").mkdir()
    TraceStore.create(tmp_path / "elsewhere").close()
    TraceStore.create(tmp_path / "runs" / "mine").close()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    assert find_runs(tmp_path / "runs") == ["mine"]
    for name in ("link", "../elsewhere", str(tmp_path / "elsewhere"), "mine/../../elsewhere"):
        with pytest.raises(InputError, match="outside"):
            confined(tmp_path / "runs", name)


def test_names_in_an_archive_are_not_paths_and_a_bomb_is_not_unpacked(tmp_path):
    sample = {"id": "s", "input": "Q", "output": {"choices": [{"message": {"role": "assistant", "content": "4"}}]}}
    log = tmp_path / "in" / "log.eval"
    log.parent.mkdir()
    with zipfile.ZipFile(log, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/../../../out.json", json.dumps(sample))
        archive.writestr("samples/s.json", json.dumps(sample))
    assert len(import_inspect(log)) == 1
    with zipfile.ZipFile(log, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/s.json", b" " * (65 * 2**20))
    assert log.stat().st_size < 2**20
    with pytest.raises(InputError, match="more than 64 MiB"):
        import_inspect(log)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "log.eval"]


def test_an_archive_is_unpacked_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(dump_files, "_LARGEST_LOG", 2**20)
    sample = {"id": "s", "input": "Q", "output": {"choices": [{"message": {"role": "assistant", "content": "4"}}]}}
    for n in (3, 5):
        with zipfile.ZipFile(tmp_path / "log.eval", "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(n):
                archive.writestr(f"samples/{i}.json", json.dumps({**sample, "epoch": i, "pad": " " * 2**18}))
        if n == 3:
            assert len(import_inspect(tmp_path / "log.eval")) == 3
    with pytest.raises(InputError, match=r"3\.json: .* split the log"):
        import_inspect(tmp_path / "log.eval")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_an_archive_is_one_error(compression, tmp_path):
    log = tmp_path / "log.eval"
    with zipfile.ZipFile(log, "w", compression) as archive:
        archive.writestr("samples/s.json", json.dumps({"id": "s" * 200}))
    raw = log.read_bytes()
    for at in range(44, 100):
        log.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        with pytest.raises(InputError):
            import_inspect(log)


def test_an_archive_whose_names_are_not_text_is_one_error(tmp_path):
    log = tmp_path / "log.eval"
    with zipfile.ZipFile(log, "w") as archive:
        archive.writestr("samples/é.json", "{}")
    log.write_bytes(log.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(InputError, match="not a readable Inspect log"):
        import_inspect(log)


@pytest.mark.parametrize("length", [2**63, 2**40, 200_000_000])
def test_a_header_that_says_it_is_huge_is_refused(length, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    for read in (SteeringVector.load, LinearProbe.load, Result.load, read_scores):
        with pytest.raises(InputError):
            read(path)
    tensor = {"coef": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}}
    text = json.dumps(tensor).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(InputError):
        LinearProbe.load(path)


@pytest.mark.parametrize("at", [8, 16])
def test_counts_in_a_gguf_beyond_the_file_are_refused(at, tmp_path):
    directions = {next(iter_sites()): np.ones(4, dtype=np.float32)}
    path = tmp_path / "v.gguf"
    SteeringVector(directions=directions, method="m").save(path)
    raw = bytearray(path.read_bytes())
    raw[at : at + 8] = struct.pack("<Q", 2**60)
    path.write_bytes(raw)
    with pytest.raises(InputError):
        SteeringVector.load(path)


@pytest.mark.parametrize("kind", [0, 8, 9])  # of bytes, of texts, of arrays
def test_an_array_in_a_gguf_beyond_the_file_is_refused(kind, tmp_path):
    path = tmp_path / "v.gguf"
    key = b"general.architecture"
    array = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, kind, 2**40)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array + bytes(40))
    with pytest.raises(InputError, match="is damaged"):
        SteeringVector.load(path)


def iter_sites():
    from reasonscope.probes.architecture.sites import Site

    yield Site("resid_post", 1)


def test_another_address_without_a_token_of_its_own_gets_one_drawn(tmp_path, monkeypatch):
    from reasonscope.app.commands import browser
    from reasonscope.app.server import access

    started = []
    monkeypatch.setattr(
        browser.subprocess, "run", lambda arguments, env: started.append(env) or type("Done", (), {"returncode": 0})
    )
    TraceStore.create(tmp_path / "run").close()
    for host in ("0.0.0.0", "192.168.0.1", "::"):
        CliRunner().invoke(cli.app, ["app", str(tmp_path / "run"), "--host", host])
    tokens = [env[access.VARIABLE] for env in started]
    assert len(set(tokens)) == 3 and min(map(len, tokens)) >= 20
