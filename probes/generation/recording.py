"""From problems to a store of traces with activations: generate a batch, replay it once to read activations, store it, resume."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.errors import InputError, SiteError, StoreError
from reasonscope.data.progress import Work, say, working
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import plural
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site, expand_sites
from reasonscope.probes.backends.attached import require_plain
from reasonscope.probes.generation.decoding import BatchProgress, Completion, DecodingStep, generate
from reasonscope.probes.generation.monitored import MONITOR_KEY, EngineReads, Monitor, read_after
from reasonscope.probes.generation.reading_pass import read_traces
from reasonscope.probes.generation.rollout import as_trace, both, check_fits, trace_seed
from reasonscope.probes.generation.steered import KEY, Decisions, Steered, Steers, check_steering
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.server.completions import ServerWriter
from reasonscope.probes.vllm.identity import Watch
from reasonscope.probes.vllm.verified import verified
from reasonscope.probes.vllm.writer import VllmWriter

_SHARD_BYTES = 64 * 2**20  # at most this is lost when the process is killed, and held in memory before it is stored
_BYTES_PER_TOKEN = 64  # of a trace without activations, roughly: id, offsets, text, log-probability, entropy
_ANSWERED = "answered"  # in the `server` of a store's meta


# Traces, and the activations of each.
_Group: TypeAlias = tuple[list[Trace], list[dict[Site, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One completion to write."""

    problem: Problem
    sample: int
    prompt: list[int]

    @property
    def id(self) -> str:
        return f"{self.problem.id}/{self.sample}"


def record(
    model: Prompting,
    problems: Sequence[Problem],
    path: str | Path,
    *,
    sites: str | Sequence[Site | str] = (),
    sampling: Sampling | None = None,
    samples: int = 1,
    batch_size: int = 16,
    shard: tuple[int, int] = (1, 1),
    think: bool | None = None,
    open_tag: bool | None = None,
    resume: bool = True,
    leave_out: Collection[str] = (),
    server: ServerWriter | None = None,
    steer: Steers | None = None,
    monitor: Monitor | EngineReads | None = None,
) -> TraceStore:
    """Let a model answer problems, and store the traces with their activations.

    Every finished batch is kept if the recording is interrupted, and the same call again goes on from there. A recording that fails
    before its first batch leaves no store.

    Args:
        model: The model. With a server and without sites a `Prompting` is enough, which has no weights.
        problems: The problems, with different ids.
        path: The folder of the store.
        sites: Where to record activations: "resid_post.*", or a list such as `["resid_post.20", "z.3"]`. None by default.
        sampling: How to sample; the defaults of `Sampling` if None. The seed of a trace depends on `sampling.seed` and on its id, and
            neither on the order of the problems nor on batches and shards.
        samples: Completions of each problem. The id of a trace is `problem/sample`.
        batch_size: Completions that are written together.
        shard: (i, n) records part i of n of the problems, counted from 1, chosen by a hash of their ids. Give each part its own path.
        think: False closes the thinking block at once; as `model.prompt` says if None.
        open_tag: Append the opening tag to the prompt, for models that forget it; as `model.prompt` says if None.
        resume: Go on with a store that is there; False refuses it.
        leave_out: Ids of traces that are not recorded.
        server: Writes the completions, a batch at a time; `model` then only reads activations.
        steer: A recipe that steers every completion and the pass that reads activations. The store holds a copy of it, and every trace
            its hash.
        monitor: A probe that is read on every token while the model writes, and that may close its thinking; see `ProbeMonitor`, and
            `EngineMonitor` for vLLM.

    Returns:
        The store.

    Raises:
        InputError: If `problems` is empty, an id occurs twice, or a number is out of range.
        ContextError: If a prompt leaves no room in the context.
        SiteError: If the model has no such site, or `attn_probs` is asked for.
        StoreError: If the store in `path` was recorded with other settings, or cannot be written.

    Example:
        model, problems = rs.load_model("organism"), rs.load_problems("ledger", n=20)
        store = rs.record(model, problems, "runs/mine", sites="resid_post.*")
        print(len(store), store.trace(store.ids[0]).text)
    """
    sampling = sampling or Sampling()
    engine = server if isinstance(server, VllmWriter) else None
    if server is not None and (engine or not sites):
        reader = None
    elif isinstance(model, Model):
        reader = model
        require_plain(model.hf, "recording")
    else:
        raise InputError(
            f"{model.name} was loaded without weights; give a server and no sites, or load the model with load_model"
        )
    wanted = _sites(reader, sites) if reader else _engine_sites(engine, sites)
    steered = _steered(reader, steer, server, sampling)
    watches, reads = _monitors(monitor, reader, server)
    prefill = steered.prefill if steered else ""
    batches = list(_batches(_tasks(model, problems, samples, shard, think, open_tag, prefill), batch_size))
    watch = Watch(engine, _answered(Path(path)) if resume else None) if engine else None
    meta = {
        "model": dict(model.fingerprint),
        **asking_settings(model, sampling, think=think, open_tag=open_tag),
        **({"server": _served(server, sampling, watch, Path(path))} if server else {}),
        **({KEY: dict(steered.meta)} if steered else {}),
        **({MONITOR_KEY: dict(monitor.meta)} if monitor and monitor.meta else {}),
    }
    store = _open(Path(path), meta, wanted, problems, resume)
    if steered and store.recipe is not None and not store.recipe.exists():
        steered.write(store.recipe)
    done = {*store.ids, *leave_out}
    n_tasks = sum(map(len, batches))
    left = [rest for batch in batches if (rest := [task for task in batch if task.id not in done])]
    n_left = sum(map(len, left))
    recording = _Recording(
        model=model,
        reader=reader,
        server=server,
        steered=steered,
        monitor=watches,
        reads=reads,
        decisions=Decisions(steered),
        sites=wanted,
        sampling=sampling,
    )
    with _closed(store):
        with working("recording", total=n_tasks, done=n_tasks - n_left, unit="traces") as work:
            progress = BatchProgress(work, n_left, sampling.max_new_tokens)
            groups = (
                recording.streamed(engine, watch, left)
                if engine and watch
                else (recording.written(batch, work, progress) for batch in left)
            )
            recording.store(groups, store, progress)
        for line in recording.decisions.told() if left else ():
            say(line)
    return store


def record_written(
    model: Model,
    traces: Sequence[Trace],
    path: str | Path,
    *,
    sites: str | Sequence[Site | str],
    meta: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> TraceStore:
    """Store traces that were written elsewhere, such as imported ones, with the activations that `model` has as it reads them.

    Log-probabilities and entropies of their tokens are measured in the same pass, if they are missing. Every finished shard is kept if
    this is interrupted, and the same call again goes on from there.

    Args:
        model: The model that wrote them, by whose tokenizer they are encoded.
        traces: The traces, with tokens.
        path: The folder of the store.
        sites: The sites to record, as in `record`.
        meta: Fields for the store, in JSON; the model's fingerprint is added.
        batch_size: Traces that are held in memory together.

    Returns:
        The store.

    Raises:
        InputError: If a trace has no tokens, or a token that the model does not know.
        SiteError: If the model has no such site, or `attn_probs` is asked for.
        StoreError: If the store in `path` has other content, or cannot be written.
    """
    require_plain(model.hf, "recording")
    wanted = _sites(model, sites)
    for trace in traces:
        if not len(trace.token_ids):
            raise InputError(f"trace {trace.id!r} has no tokens; encode it with the tokenizer of {model.name}")
    known = {**(meta or {}), "model": dict(model.fingerprint)}
    store = _open(Path(path), known, wanted, [trace.problem for trace in traces], True)
    _check_texts(store, traces)
    done = set(store.ids)
    left = [trace for trace in traces if trace.id not in done]
    writer = _Writer(store, wanted)
    with _closed(store), working("reading activations", total=len(traces), done=len(done), unit="traces") as work:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            writer.append(*read_traces(model, batch, wanted))
            work.advance(len(batch))
        writer.flush()
    return store


@contextmanager
def _closed(store: TraceStore) -> Iterator[None]:
    """Close the store at the end. After an error one without a trace is discarded, so that it does not refuse the next try."""
    try:
        yield
    except BaseException:
        with suppress(StoreError):
            store.discard()
        raise
    finally:
        store.close()


def _in_shard(id: str, shard: tuple[int, int]) -> bool:
    """Whether the problem `id` belongs to part i of n, counted from 1."""
    part, parts = shard
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]) % parts == part - 1


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The values of a tensor as an array, bit by bit; bfloat16 becomes `ml_dtypes.bfloat16`, because numpy has no such type."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The inverse of `as_numpy`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _sites(model: Model, names: str | Sequence[Site | str]) -> tuple[Site, ...]:
    listed = expand_sites(names, model.n_layers) if isinstance(names, str) else map(Site.parse, names)
    sites = tuple(dict.fromkeys(listed))
    for site in sites:
        model.layout.module(model.hf, site)  # raises SiteError if the model has no such site
        if site.point == "attn_probs":
            raise SiteError(
                f"{site} cannot be recorded, because it grows with the square of the length; use run_with_cache on the traces"
            )
    return sites


def _tasks(
    model: Prompting,
    problems: Sequence[Problem],
    samples: int,
    shard: tuple[int, int],
    think: bool | None,
    open_tag: bool | None,
    prefill: str,
) -> list[_Task]:
    if not problems:
        raise InputError("no problems to record; give at least one")
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"invalid shard {shard[0]}/{shard[1]}: write i/n with i from 1 to n")
    if samples < 1:
        raise InputError(f"invalid samples {samples}: give at least 1 per problem")
    ids = [problem.id for problem in problems]
    if len(set(ids)) < len(ids):
        raise InputError(
            f"the problem id {next(id for id in ids if ids.count(id) > 1)!r} occurs twice; give every problem its own id"
        )
    tasks = []
    for problem in (problem for problem in problems if _in_shard(problem.id, shard)):
        prompt = model.encode_prompt(problem, think=think, open_tag=open_tag, prefill=prefill)
        check_fits(model, problem, prompt)
        tasks += [_Task(problem=problem, sample=sample, prompt=prompt) for sample in range(samples)]
    return tasks


def _batches(tasks: Sequence[_Task], size: int) -> Iterator[list[_Task]]:
    """Prompts of similar length together, to save padding. The order of the problems does not change the batches."""
    if size < 1:
        raise InputError(f"invalid batch size {size}: at least 1 is needed")
    ordered = sorted(tasks, key=lambda task: (len(task.prompt), task.problem.id, task.sample))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """Who writes the traces of a run, what happens to the model meanwhile, and what is read of it."""

    model: Prompting
    reader: Model | None
    server: ServerWriter | None
    steered: Steered | None
    monitor: Monitor | None
    reads: EngineReads | None
    decisions: Decisions
    sites: tuple[Site, ...]
    sampling: Sampling

    def store(self, groups: Iterable[_Group], store: TraceStore, progress: BatchProgress) -> None:
        """Keep finished groups, whatever stops the run. If that is a full disk, the same error is raised again."""
        writer = _Writer(store, self.sites)
        try:
            for traces, seen in groups:
                writer.append(traces, seen)
                progress.batch_done(len(traces))
        finally:
            writer.flush()
            self.decisions.save(store)

    def written(self, tasks: Sequence[_Task], work: Work, progress: BatchProgress) -> _Group:
        """Generate without recording, which is fast, then read the activations of the finished sequences in one pass."""
        seeds, prompts = self._seeds(tasks), [task.prompt for task in tasks]
        if self.server is not None:
            completions = self.server.complete(prompts, self.sampling, seeds)
        else:
            completions = self._generated(prompts, seeds, progress.on_step)
            ids = [task.id for task in tasks]
            self.decisions.note(ids, [completion.token_ids for completion in completions])
            if self.monitor:
                self.monitor.finish(ids)
        traces = [self._trace(*one) for one in zip(tasks, completions, seeds, strict=True)]
        if not self.sites or self.reader is None:
            return traces, [{} for _ in traces]
        work.detail = "reading activations"
        traces, seen = read_traces(self.reader, traces, self.sites, self.steered)
        work.detail = ""
        return traces, seen

    def streamed(self, engine: VllmWriter, watch: Watch, batches: Sequence[Sequence[_Task]]) -> Iterator[_Group]:
        """What an engine writes, with the activations that it had meanwhile, as it is finished: no batch waits for its longest trace."""
        tasks = [task for batch in batches for task in batch]
        seeds = self._seeds(tasks)
        for group in verified(engine, watch, [task.prompt for task in tasks], self.sampling, seeds, self.sites):
            traces = [self._trace(tasks[i], completion, seeds[i]) for i, completion, _ in group]
            if self.reads is not None:
                for i, completion, _ in group:
                    self.reads.note(tasks[i].id, completion)
            yield traces, [states for _, _, states in group]

    def _seeds(self, tasks: Sequence[_Task]) -> list[int]:
        return [trace_seed(self.sampling.seed, task.id) for task in tasks]

    def _generated(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], on_step: Callable[[DecodingStep], None]
    ) -> list[Completion]:
        """What the model writes, steered and monitored if it is."""
        assert self.reader is not None  # without a server there are weights
        steered, monitor = self.steered, self.monitor
        edits = steered.edits if steered else None
        write = edits.edits if edits else None
        follow = both(edits.on_step if edits else None, on_step)
        return generate(
            self.reader,
            prompts,
            self.sampling,
            seeds=seeds,
            write=read_after(write, monitor) if monitor else write,
            on_step=both(monitor.on_step if monitor else None, follow),
            processors=(*(steered.processors if steered else ()), *(monitor.processors if monitor else ())),
        )

    def _trace(self, task: _Task, completion: Completion, seed: int) -> Trace:
        sampling = replace(self.sampling, seed=seed)
        trace = as_trace(self.model, task.problem, task.sample, completion, sampling)
        more: dict[str, Any] = {KEY: dict(self.steered.meta)} if self.steered else {}
        more |= {"unseeded": True} if self.server is not None and not self.server.seeded(sampling) else {}
        return replace(trace, meta={**trace.meta, **more}) if more else trace


def _served(server: ServerWriter, sampling: Sampling, watch: Watch | None, path: Path) -> dict[str, Any]:
    """What the store says of its server: the model, and whether it drew at random without the seeds of the traces."""
    unseeded = {} if server.seeded(sampling) else {"unseeded": True}
    return {"model": server.model, **unseeded, **({_ANSWERED: _answered(path) or watch.states} if watch else {})}


def _answered(path: Path) -> list[float] | None:
    """What the model of an engine made of a fixed sequence when the store in `path` was begun."""
    if not (path / NAME).exists():
        return None
    found = TraceStore.open(path).meta.get("server", {}).get(_ANSWERED)
    return [float(value) for value in found] if isinstance(found, list) else None


def _engine_sites(engine: VllmWriter | None, names: str | Sequence[Site | str]) -> tuple[Site, ...]:
    if engine is None or not names:
        return ()
    listed = expand_sites(names, engine.n_layers) if isinstance(names, str) else map(Site.parse, names)
    sites = tuple(dict.fromkeys(listed))
    engine.layers(sites)  # raises SiteError for a site that it does not read
    return sites


def _steered(
    reader: Model | None, steer: Steers | None, server: ServerWriter | None, sampling: Sampling
) -> Steered | None:
    if isinstance(server, VllmWriter):
        return _steered_in_engine(server, steer)
    if steer is None:
        return None
    if reader is None or server is not None:
        raise InputError(
            "this server cannot be steered; use vLLM with vllm-lens (--backend vllm), or leave out the server or the recipe"
        )
    return steer.steered(reader, sampling)


def _monitors(
    monitor: Monitor | EngineReads | None, reader: Model | None, server: ServerWriter | None
) -> tuple[Monitor | None, EngineReads | None]:
    """The monitor as one that follows a model here, or one that an engine reads."""
    there = server.look if isinstance(server, VllmWriter) else None
    if isinstance(monitor, EngineReads):
        if there is not monitor.look:
            raise InputError("vLLM reads this monitor if it writes; make the writer with look=monitor.look")
        return None, monitor
    if there is not None:
        raise InputError("the writer reads along, and nobody takes what it reads; give record its monitor as well")
    if monitor is not None and (reader is None or server is not None):
        raise InputError(
            "this monitor reads a model of this process; with --backend vllm use EngineMonitor, or leave out the server, or the monitor"
        )
    return monitor, None


def _steered_in_engine(engine: VllmWriter, steer: Steers | None) -> Steered | None:
    there, wanted = engine.steering, None if steer is None else steer.meta
    if (there and there.meta["hash"]) != (wanted and wanted["hash"]):
        raise InputError("the writer is steered otherwise than the run; make it with steering=recipe.in_engine(model)")
    if steer is None or there is None:
        return None
    return Steered(meta=steer.meta, write=steer.save, prefill=there.prefill)


def asking_settings(
    model: Prompting, sampling: Sampling, *, think: bool | None, open_tag: bool | None
) -> dict[str, Any]:
    """What the meta of a store says of how its model was asked, in JSON."""
    return {
        "sampling": {**asdict(sampling), "stop": list(sampling.stop)},
        "prompt": {"think": True, "open_tag": False, **model.prompt.begun(think, open_tag).to_dict()},
        "thinking": model.thinking.to_dict(),
    }


def _open(
    path: Path, meta: Mapping[str, Any], sites: Sequence[Site], problems: Sequence[Problem], resume: bool
) -> TraceStore:
    names = [str(site) for site in sites]
    if not resume or not (path / NAME).exists():
        return TraceStore.create(path, meta=meta, sites=names)
    store = TraceStore.open(path)
    if not len(store):  # an earlier try failed before its first trace
        return TraceStore.create(path, meta=meta, sites=names)
    check_settings(store, meta, names)
    check_problems(store, problems)
    return store


def check_settings(store: TraceStore, meta: Mapping[str, Any], sites: Sequence[str]) -> None:
    """Raise StoreError if the traces of a store were recorded with other settings than these."""
    check_steering(store, meta.get(KEY))
    different = list(_differences(_completed(store.meta, meta), json.loads(json.dumps(meta))))
    if store.sites != tuple(sites):
        different.append(f"sites: {', '.join(store.sites) or 'none'} (now {', '.join(sites) or 'none'})")
    if different:
        raise StoreError(
            f"{store.path} was recorded with other settings: {'; '.join(different)}. Use the same settings, or another folder"
        )


def check_problems(store: TraceStore, problems: Sequence[Problem]) -> None:
    """Raise StoreError if a store has traces of one of `problems` with another text or answer; say how many other problems it has."""
    asked, others = {problem.id: problem for problem in problems}, set[str]()
    for there in store.problems():
        if there.id not in asked:
            others.add(there.id)
        elif changes := list(_changes(_asked(there), _asked(asked[there.id]))):
            raise StoreError(
                f"{store.path} has traces of problem {there.id!r} from before it was changed: {'; '.join(changes)}. Give another folder "
                "(--out), or remove this one to record it again"
            )
    if others:
        say(
            f"{store.path} also has traces of {plural(len(others), 'problem')} not asked for now, such as {min(others)!r}; if they "
            "come from another file, give another folder (--out)"
        )


def _asked(problem: Problem) -> dict[str, Any]:
    """What a model is asked and graded by; the rest of a problem may change while a run lasts."""
    messages = [(message.role, message.content) for message in problem.messages]
    return {"messages": messages, "prompt": problem.prompt, "answer": problem.answer}


def _changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs, from shortly before the first difference: texts may be long."""
    for name, value in there.items():
        if value != now[name]:
            old, new = str(value), str(now[name])
            at = next((i for i, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), 0)
            shown = slice(max(0, at - 20), at + 60)
            yield f"{name}: {old[shown]} (now {new[shown]})"


def _check_texts(store: TraceStore, traces: Sequence[Trace]) -> None:
    """Raise StoreError if a store has one of the traces with another text."""
    texts = {trace.id: trace.text for trace in traces}
    for there in store:
        if texts.get(there.id, there.text) != there.text:
            raise StoreError(
                f"{store.path} has trace {there.id!r} with another text. Give another folder (--out), or remove this one to read it again"
            )


def _completed(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The `meta` of a store with the settings that did not exist when it was recorded: thinking between tags, and their defaults."""
    by_tags = {"thinking": now["thinking"]} if now.get("thinking", {}).get("mode") == "tags" else {}
    sampling = {**json.loads(json.dumps(asdict(Sampling()))), **there.get("sampling", {})}
    return {**by_tags, **there, **({"sampling": sampling} if "sampling" in there else {})}


def _differences(there: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(there.keys() | now.keys()):
        old, new = there.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {old} (now {new})"


class _Writer:
    """Collects finished traces until they make a shard."""

    def __init__(self, store: TraceStore, sites: Sequence[Site]) -> None:
        self._store, self._sites = store, sites
        self._traces: list[Trace] = []
        self._arrays: dict[str, list[NDArray[Any]]] = {str(site): [] for site in sites}
        self._bytes = 0

    def append(self, traces: Sequence[Trace], activations: Sequence[Mapping[Site, Tensor]]) -> None:
        for trace, seen in zip(traces, activations, strict=True):
            self._traces.append(trace)
            self._bytes += _BYTES_PER_TOKEN * len(trace.token_ids)
            for site in self._sites:
                array = as_numpy(seen[site])
                self._arrays[str(site)].append(array)
                self._bytes += array.nbytes
        if self._bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        traces, arrays = self._traces, self._arrays
        self._traces, self._arrays, self._bytes = [], {site: [] for site in arrays}, 0
        self._store.append(traces, arrays)
