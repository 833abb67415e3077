"""From problems to a store of traces with activations: generate a batch, replay it once to read activations, store it, resume."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonscope.data.errors import InputError, SiteError, StoreError
from reasonscope.data.progress import Work, say, working
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site, expand_sites
from reasonscope.probes.backends.attached import require_plain
from reasonscope.probes.generation.activations import replay
from reasonscope.probes.generation.decoding import BatchProgress, Completion, DecodingStep, generate
from reasonscope.probes.generation.monitored import MONITOR_KEY, Monitor, read_after
from reasonscope.probes.generation.rollout import as_trace, both, check_fits, trace_seed
from reasonscope.probes.generation.steered import KEY, Decisions, Steered, Steers, check_steering
from reasonscope.probes.models.model import Model
from reasonscope.probes.models.prompting import Prompting
from reasonscope.probes.models.unembedding import Unembedding, token_scores
from reasonscope.probes.server.completions import ServerWriter
from reasonscope.probes.vllm.identity import Watch
from reasonscope.probes.vllm.verified import verified
from reasonscope.probes.vllm.writer import VllmWriter

_SHARD_BYTES = 64 * 2**20  # at most this is lost when the process is killed, and held in memory before it is stored
_BYTES_PER_TOKEN = 64  # of a trace without activations, roughly: id, offsets, text, log-probability, entropy
_ANSWERED = "answered"  # in the `server` of a store's meta
_READ_TOKENS = 4096  # of one pass that reads activations, with padding


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
    think: bool = True,
    open_tag: bool = False,
    resume: bool = True,
    leave_out: Collection[str] = (),
    server: ServerWriter | None = None,
    steer: Steers | None = None,
    monitor: Monitor | None = None,
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
        think: False closes the thinking block at once.
        open_tag: Append the opening tag to the prompt, for models that forget it.
        resume: Go on with a store that is there; False refuses it.
        leave_out: Ids of traces that are not recorded.
        server: Writes the completions, a batch at a time; `model` then only reads activations.
        steer: A recipe that steers every completion and the pass that reads activations. The store holds a copy of it, and every trace
            its hash.
        monitor: A probe that is read on every token while the model writes, and that may close its thinking; see `ProbeMonitor`.

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
    if monitor is not None and (reader is None or server is not None):
        raise InputError(
            "a monitor reads the model that writes, which a server does not show; leave out the server, or the monitor"
        )
    prefill = steered.prefill if steered else ""
    batches = list(_batches(_tasks(model, problems, samples, shard, think, open_tag, prefill), batch_size))
    watch = Watch(engine, _answered(Path(path)) if resume else None) if engine else None
    meta = {
        "model": dict(model.fingerprint),
        "sampling": asdict(sampling),
        "prompt": {"think": think, "open_tag": open_tag, **model.prompt.to_dict()},
        "thinking": model.thinking.to_dict(),
        **({"server": _served(server, sampling, watch, Path(path))} if server else {}),
        **({KEY: dict(steered.meta)} if steered else {}),
        **({MONITOR_KEY: dict(monitor.meta)} if monitor and monitor.meta else {}),
    }
    store = _open(Path(path), meta, [str(site) for site in wanted], resume)
    if steered and store.recipe is not None and not store.recipe.exists():
        steered.write(store.recipe)
    done = {*store.ids, *leave_out}
    n_tasks = sum(map(len, batches))
    left = [rest for batch in batches if (rest := [task for task in batch if task.id not in done])]
    n_left = sum(map(len, left))
    writer, decisions = _Writer(store, wanted), Decisions(steered)
    try:
        with working("recording", total=n_tasks, done=n_tasks - n_left, unit="traces") as work:
            progress = BatchProgress(work, n_left, sampling.max_new_tokens)
            groups = (
                _streamed(model, engine, watch, steered, left, wanted, sampling)
                if engine and watch
                else (
                    _run(model, reader, server, steered, monitor, decisions, batch, wanted, sampling, work, progress)
                    for batch in left
                )
            )
            try:
                for traces, seen in groups:
                    writer.append(traces, seen)
                    progress.batch_done(len(traces))
            finally:
                # Finished batches are kept, whatever stopped the run. If that was a full disk, the same error is raised again.
                writer.flush()
                decisions.save(store)
        for line in decisions.told() if left else ():
            say(line)
    except BaseException:
        with suppress(StoreError):
            store.discard()  # without a trace: an empty store must not refuse the next try
        raise
    finally:
        store.close()
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
    store = _open(Path(path), known, [str(site) for site in wanted], True)
    done = set(store.ids)
    left = [trace for trace in traces if trace.id not in done]
    writer = _Writer(store, wanted)
    try:
        with working("reading activations", total=len(traces), done=len(done), unit="traces") as work:
            for start in range(0, len(left), batch_size):
                batch = left[start : start + batch_size]
                writer.append(*_read(model, batch, wanted))
                work.advance(len(batch))
            writer.flush()
    except BaseException:
        with suppress(StoreError):
            store.discard()  # without a trace: an empty store must not refuse the next try
        raise
    finally:
        store.close()
    return store


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
    think: bool,
    open_tag: bool,
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


def _run(
    model: Prompting,
    reader: Model | None,
    server: ServerWriter | None,
    steered: Steered | None,
    monitor: Monitor | None,
    decisions: Decisions,
    tasks: Sequence[_Task],
    sites: Sequence[Site],
    sampling: Sampling,
    work: Work,
    progress: BatchProgress,
) -> tuple[list[Trace], list[dict[Site, Tensor]]]:
    """Generate without recording, which is fast, then read the activations of the finished sequences in one pass."""
    seeds = [trace_seed(sampling.seed, task.id) for task in tasks]
    prompts = [task.prompt for task in tasks]
    if server is not None:
        completions = server.complete(prompts, sampling, seeds)
    else:
        assert reader is not None  # without a server there are weights
        completions = (
            _written(reader, prompts, sampling, steered, monitor, seeds=seeds, on_step=progress.on_step)
            if steered or monitor
            else generate(reader, prompts, sampling, seeds=seeds, on_step=progress.on_step)
        )
        ids = [task.id for task in tasks]
        decisions.note(ids, [completion.token_ids for completion in completions])
        if monitor:
            monitor.finish(ids)
    traces = [
        _trace(model, server, steered, task, completion, replace(sampling, seed=seed))
        for task, completion, seed in zip(tasks, completions, seeds, strict=True)
    ]
    if not sites or reader is None:
        return traces, [{} for _ in traces]
    work.detail = "reading activations"
    traces, seen = _read(reader, traces, sites, steered)
    work.detail = ""
    return traces, seen


def _streamed(
    model: Prompting,
    engine: VllmWriter,
    watch: Watch,
    steered: Steered | None,
    batches: Sequence[Sequence[_Task]],
    sites: Sequence[Site],
    sampling: Sampling,
) -> Iterator[tuple[list[Trace], list[dict[Site, Tensor]]]]:
    """What an engine writes, with the activations that it had meanwhile, as it is finished: no batch waits for its longest trace."""
    tasks = [task for batch in batches for task in batch]
    seeds = [trace_seed(sampling.seed, task.id) for task in tasks]
    for group in verified(engine, watch, [task.prompt for task in tasks], sampling, seeds, sites):
        traces = [
            _trace(model, engine, steered, tasks[i], completion, replace(sampling, seed=seeds[i]))
            for i, completion, _ in group
        ]
        yield traces, [states for _, _, states in group]


def _trace(
    model: Prompting,
    server: ServerWriter | None,
    steered: Steered | None,
    task: _Task,
    completion: Completion,
    sampling: Sampling,
) -> Trace:
    trace = as_trace(model, task.problem, task.sample, completion, sampling)
    more: dict[str, Any] = {KEY: dict(steered.meta)} if steered else {}
    more |= {"unseeded": True} if server is not None and not server.seeded(sampling) else {}
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


def _steered_in_engine(engine: VllmWriter, steer: Steers | None) -> Steered | None:
    there, wanted = engine.steering, None if steer is None else steer.meta
    if (there and there.meta["hash"]) != (wanted and wanted["hash"]):
        raise InputError("the writer is steered otherwise than the run; make it with steering=recipe.in_engine(model)")
    if steer is None or there is None:
        return None
    return Steered(meta=steer.meta, write=steer.save, prefill=there.prefill)


def _written(
    reader: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    steered: Steered | None,
    monitor: Monitor | None,
    *,
    seeds: Sequence[int],
    on_step: Callable[[DecodingStep], None],
) -> list[Completion]:
    """What the steered or monitored model writes."""
    edits = steered.edits if steered else None
    write = edits.edits if edits else None
    follow = both(edits.on_step if edits else None, on_step)
    return generate(
        reader,
        prompts,
        sampling,
        seeds=seeds,
        write=read_after(write, monitor) if monitor else write,
        on_step=both(monitor.on_step if monitor else None, follow),
        processors=(*(steered.processors if steered else ()), *(monitor.processors if monitor else ())),
    )


def _read(
    reader: Model, traces: Sequence[Trace], sites: Sequence[Site], steered: Steered | None = None
) -> tuple[list[Trace], list[dict[Site, Tensor]]]:
    """Read traces of similar length together, and so few that neither padding nor memory grows with the batch.

    A steered model is steered as it was while it wrote: it sees the same tokens, so the same ones are edited. Traces that were written
    elsewhere come back with the log-probabilities and entropies that `reader` has at their tokens.
    """
    edits = steered.edits if steered else None
    found: dict[int, tuple[Trace, dict[Site, Tensor]]] = {}

    def read(group: Sequence[int]) -> None:
        chosen = [traces[j] for j in group]
        if edits:
            edits.begin([trace.n_prompt_tokens for trace in chosen])
        with _final_states(reader, [] if edits else chosen) as kept:
            seen = replay(
                reader,
                [trace.token_ids.tolist() for trace in chosen],
                sites,
                write=edits.edits if edits else None,
            )
        scored = _scored(reader, chosen, kept)
        found.update(zip(group, zip(scored, seen, strict=True), strict=True))

    group: list[int] = []
    for i in sorted(range(len(traces)), key=lambda i: len(traces[i].token_ids)):
        if group and (len(group) + 1) * len(traces[i].token_ids) > _READ_TOKENS:
            read(group)
            group = []
        group.append(i)
    read(group)
    return [found[i][0] for i in range(len(traces))], [found[i][1] for i in range(len(traces))]


@contextmanager
def _final_states(reader: Model, traces: Sequence[Trace]) -> Iterator[list[Tensor]]:
    """Inside, keep what the last norm gives (batch, token, d_model) and the last logits (batch, vocab) of the pass.

    Nothing is kept if the traces have the scores of their tokens already, or if the weights are elsewhere.
    """
    kept: list[Tensor] = []
    norm = reader.layout.final_norm
    scored = all(trace.entropies is not None and np.isfinite(trace.entropies).all() for trace in traces)
    if scored or norm is None or reader.backend.name != "hooks":
        yield kept
        return
    with ExitStack() as hooks:
        for module in (reader.hf.get_submodule(norm), reader.hf):
            handle = module.register_forward_hook(
                lambda _module, _given, out: kept.append(out if isinstance(out, Tensor) else out.logits[:, -1])
            )
            hooks.callback(handle.remove)
        yield kept


@torch.inference_mode()
def _scored(reader: Model, traces: Sequence[Trace], kept: Sequence[Tensor]) -> list[Trace]:
    """The traces with log-probabilities and entropies of their tokens; unchanged if the model does more than unembed (a scale)."""
    if not kept:
        return list(traces)
    states, logits = kept
    unembedding = Unembedding.of(reader)
    if not torch.allclose(unembedding.logits(states[:, -1]), logits.float(), rtol=1e-2, atol=1e-2):
        return list(traces)
    return [_with_scores(unembedding, trace, row) for trace, row in zip(traces, states, strict=True)]


def _with_scores(unembedding: Unembedding, trace: Trace, states: Tensor) -> Trace:
    ids = torch.as_tensor(trace.token_ids[trace.n_prompt_tokens :], device=states.device)
    if not len(ids):
        return trace
    temperature = trace.sampling.temperature if trace.sampling else 1.0
    before = states[trace.n_prompt_tokens - 1 : len(trace.token_ids) - 1]  # `replay` pads after the tokens
    logprobs, entropies = token_scores(unembedding, before, ids, temperature=temperature)
    return replace(trace, logprobs=logprobs.numpy(force=True), entropies=entropies.numpy(force=True))


def _open(path: Path, meta: Mapping[str, Any], sites: Sequence[str], resume: bool) -> TraceStore:
    if not resume or not (path / NAME).exists():
        return TraceStore.create(path, meta=meta, sites=sites)
    store = TraceStore.open(path)
    if not len(store):  # an earlier try failed before its first trace
        return TraceStore.create(path, meta=meta, sites=sites)
    check_steering(store, meta.get(KEY))
    different = list(_differences(_completed(store.meta, meta), json.loads(json.dumps(meta))))
    if store.sites != tuple(sites):
        different.append(f"sites: {', '.join(store.sites) or 'none'} (now {', '.join(sites) or 'none'})")
    if different:
        raise StoreError(
            f"{path} was recorded with other settings: {'; '.join(different)}. Use the same settings, or another folder"
        )
    return store


def _completed(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The `meta` of a store with the settings that did not exist when it was recorded: thinking between tags, and their defaults."""
    by_tags = {"thinking": now["thinking"]} if now["thinking"]["mode"] == "tags" else {}
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
