"""Where a study works: its folder, its problems, its model, and the server that writes for it, if there is one."""

import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonscope.data.errors import InputError
from reasonscope.data.exchange.problem_sets import load_problems
from reasonscope.data.progress import working
from reasonscope.data.storage.durable import make_folder, sha256_of, write_text_durably
from reasonscope.data.storage.run_folder import RunFolder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.storage.untrusted import parse_json, wrap_errors
from reasonscope.data.trace import Message, Problem
from reasonscope.probes.architecture.sites import Site, expand_sites
from reasonscope.probes.models.model import Model, load_model, tell_other_weights
from reasonscope.probes.models.prompting import Prompting, as_recorded, load_prompting
from reasonscope.probes.server.completions import ServerWriter, server_writer
from reasonscope.steering.engine.arms import EngineArms

if TYPE_CHECKING:
    from reasonscope.analysis.studies.plan import StudyPlan

HERE = "."  # a run whose folder is that of the study
_SHARE = re.compile(r"(\w+)\.(\d+(?:\.\d+)?)%")
_WEIGHTS = (".safetensors", ".gguf")  # large: their checksums are kept
_SETTINGS = (".json", ".jinja", ".model", ".txt")  # configuration, tokenizer, template, adapter


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that writes text in place of the model here.

    Attributes:
        url: http://host:port.
        served_as: Its name for the model; the same as here if None.
        workers: Requests at a time.
        steers: It is a vLLM with vllm-lens, which also writes the arms of sweeps.
        trusted: Send steering, which travels as code, to a server on another machine.
    """

    url: str
    served_as: str | None = None
    workers: int = 16
    steers: bool = False
    trusted: bool = False

    def options(self) -> dict[str, Any]:
        """Its options on the command line."""
        backend = "vllm" if self.steers else None
        return {
            "server": self.url, "served_as": self.served_as, "backend": backend, "trust_server": self.trusted
        }  # fmt: skip


class Lab:
    """The folder of a study with what its steps share; the model stays loaded from one step to the next."""

    def __init__(self, plan: "StudyPlan", out: Path, server: Served | None = None) -> None:
        self.plan, self.out, self.server = plan, out, server
        self._loaded: tuple[Mapping[str, Any], Model] | None = None
        self._problems: dict[str, list[Problem]] = {}
        self._sources: dict[str, str] = {}
        self.load_seconds = 0.0

    def where(self, run: str) -> RunFolder:
        """The folders of the run that the step `run` records."""
        folder = self.out if getattr(self.plan.steps[run], "folder", None) == HERE else self.out / run
        return RunFolder(store=folder / "store", results=folder)

    def store(self, run: str) -> TraceStore:
        return TraceStore.open(self.where(run).store)

    def problems(self, asked: Sequence[str]) -> list[Problem]:
        """The problems of some sets, or of parts of sets (`set.part`)."""
        return [problem for name in asked for problem in self._of_set(name)]

    def model(self, **how: Any) -> Model:
        """The model of the plan, with other arguments of `load_model` if any are given; one at a time is in memory."""
        told = {**self.plan.load, **{name: value for name, value in how.items() if value}}
        if self._loaded is None or not _is_as_asked(*self._loaded, told):
            self.drop_model()
            began = time.monotonic()
            self._loaded = told, load_model(self.plan.model, **told)
            self.load_seconds += time.monotonic() - began
        return self._loaded[1]

    def drop_model(self) -> None:
        """Forget the model: somebody else needs the memory."""
        self._loaded = None

    def model_of(self, run: str) -> Model:
        """The model, asked and read as the run was recorded."""
        meta = self.store(run).meta
        model = self.model(**as_recorded(meta, self.plan.load, self.plan.model))
        tell_other_weights(meta, model)
        return model

    def prompting(self, **how: Any) -> Prompting:
        """Tokenizer and configuration alone."""
        known = {"revision": self.plan.load.get("revision"), **how}
        return load_prompting(self.plan.model, **{name: value for name, value in known.items() if value is not None})

    def writer(self, prompting: Prompting, keep: Path | None = None) -> ServerWriter | None:
        """What writes with the server; None without one."""
        if self.server is None:
            return None
        return server_writer(
            self.server.url, prompting, served_as=self.server.served_as, workers=self.server.workers, keep=keep
        )

    def arms(self) -> EngineArms | None:
        """What writes the arms of sweeps in vLLM; None if the model here does."""
        if self.server is None or not self.server.steers:
            return None
        how = {"served_as": self.server.served_as}
        return EngineArms(url=self.server.url, workers=self.server.workers, trusted=self.server.trusted, how=how)

    @cached_property
    def model_identity(self) -> str:
        """The name of the model; for a folder also a hash of its configuration and of the sizes of its files."""
        folder = Path(self.plan.model)
        if not folder.is_dir():
            return f"{self.plan.model} {self.plan.load.get('revision', '')}".strip()
        sizes = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
        config = folder / "config.json"
        told = f"{sizes} {sha256_of(config) if config.exists() else ''}"
        return f"{folder.name} {sha256(told.encode()).hexdigest()[:12]}"

    @cached_property
    def model_files(self) -> Mapping[str, str]:
        """The checksums of weights, tokenizer, template, configuration and adapter; empty for a model of the hub."""
        source = Path(self.plan.model)
        found = sorted(source.iterdir()) if source.is_dir() else [source]
        files = [path for path in found if path.is_file() and path.suffix in (*_WEIGHTS, *_SETTINGS)]
        weights = self._digests_of([path for path in files if path.suffix in _WEIGHTS])
        return {path.name: weights.get(path) or sha256_of(path) for path in files}

    def _digests_of(self, weights: Sequence[Path]) -> Mapping[Path, str]:
        """The checksums of files of weights; one of unchanged size and modification time is not read again."""
        kept = self.out / "steps" / "weights" / "checksums.json"
        with wrap_errors(kept):
            known = parse_json(kept.read_bytes(), str(kept)) if kept.exists() else {}
        stamps = {path: f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in weights}
        if new := [path for path in weights if stamps[path] not in known]:
            with working("reading the weights once, to see later whether they changed"):
                known |= {stamps[path]: sha256_of(path) for path in new}
            make_folder(kept.parent)
            write_text_durably(kept, json.dumps({stamp: known[stamp] for stamp in stamps.values()}, indent=1))
        return {path: known[stamp] for path, stamp in stamps.items()}

    def problems_identity(self, asked: Sequence[str]) -> Mapping[str, Any]:
        """What the problems depend on: the sets, the parts up to the one that is asked, and the content of files."""
        found: dict[str, dict[str, Any]] = {}
        for name, part in (name.partition(".")[::2] for name in asked):
            told, source = self.plan.problems[name], self._source_of(name)
            names = list(told.parts)
            known = found.get(name, {}).get("parts", {})
            parts = {of: told.parts[of] for of in names[: names.index(part) + 1]} if part else {}
            before = [vars(turn) for turn in told.before]
            found[name] = {**vars(told), "source": source, "before": before, "parts": {**known, **parts}}
        return found

    def _source_of(self, name: str) -> str:
        """The source of a set, a file by its content when the study first read it: the problems in memory are those."""
        if name not in self._sources:
            source = self.plan.problems[name].source
            self._sources[name] = sha256_of(Path(source))[:12] if Path(source).is_file() else source
        return self._sources[name]

    def _of_set(self, name: str) -> list[Problem]:
        set_name = name.partition(".")[0]
        if name not in self._problems:
            whole = self._whole(set_name)
            self._problems[set_name] = whole
            self._problems |= {f"{set_name}.{of}": found for of, found in self._parts(set_name, whole).items()}
        return self._problems[name]

    def _whole(self, name: str) -> list[Problem]:
        told = self.plan.problems[name]
        self._source_of(name)
        found = load_problems(told.source, split=told.split, n=told.n, seed=told.seed)
        before = tuple(Message(role=turn.role, content=turn.content) for turn in told.before)
        if not before:
            return found
        if plain := next((problem.id for problem in found if not problem.messages), None):
            raise InputError(f"problem {plain!r} of {name} is a plain prompt, before which no messages can be put")
        return [replace(problem, messages=(*before, *problem.messages)) for problem in found]

    def _parts(self, name: str, whole: Sequence[Problem]) -> dict[str, list[Problem]]:
        """The parts of a set, filled one after the other with whole groups in random order."""
        told, groups = self.plan.problems[name], dict[str, list[Problem]]()
        for problem in whole:
            groups.setdefault(problem.group, []).append(problem)
        left = sorted(groups)
        random.Random(told.seed).shuffle(left)
        parts: dict[str, list[Problem]] = {}
        for part, size in told.parts.items():
            parts[part] = []
            while len(parts[part]) < size:
                if not left:
                    raise InputError(
                        f"{name} has {len(whole)} problems in {len(groups)} groups, too few for parts of "
                        f"{', '.join(map(str, told.parts.values()))}; ask for smaller parts"
                    )
                parts[part] += groups[left.pop()]
            parts[part] = parts[part][:size]
        return parts


def sites_of(names: Sequence[str], n_layers: int) -> tuple[Site, ...]:
    """The sites of a plan: as `expand_sites` takes them, or at a share of the depth, such as `resid_post.50%`."""
    found: list[Site] = []
    for name in names:
        share = _SHARE.fullmatch(name.strip())
        at_share = [Site(share[1], round(float(share[2]) / 100 * (n_layers - 1)))] if share else []  # type: ignore[arg-type]  # checked by the model
        found += at_share or expand_sites(name, n_layers)
    return tuple(dict.fromkeys(found))


def _is_as_asked(loaded: Mapping[str, Any], model: Model, told: Mapping[str, Any]) -> bool:
    """Whether `load_model` would load this model again: what was found by default may also be asked for by name."""
    found = {
        "thinking": model.thinking,
        "prompt": model.prompt,
        "revision": model.revision,
        "dtype": str(model.hf.dtype).removeprefix("torch."),
    }
    return all(
        told.get(key) == loaded.get(key) or (key in found and told.get(key) == found[key])
        for key in loaded.keys() | told.keys()
    )
