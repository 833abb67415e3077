"""How long the steps of a study will take: by the time that they took before, else by a short measured rate."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reasonscope.analysis.studies.lab import Lab
from reasonscope.analysis.studies.state import finished, served
from reasonscope.analysis.studies.steps.base import Work
from reasonscope.data.progress import working
from reasonscope.data.storage.durable import make_folder, write_text_durably
from reasonscope.data.storage.untrusted import parse_json, wrap_errors
from reasonscope.data.trace import Sampling
from reasonscope.probes.generation.decoding import generate

_ROWS, _TOKENS = 16, 12  # of the trial
_LEAST = 2.0  # seconds that any step takes


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Tokens per second.

    Attributes:
        of: The model, its precision and the server that they were measured on.
        written: By the model here.
        read: By the model here, in passes over finished text.
        served: Written by the server; as here without one.
    """

    of: str
    written: float
    read: float
    served: float


def rates(lab: Lab, *, measure: bool = True) -> Rates | None:
    """The rates that are kept, or measured now in a short trial; None if they are not known and not to be measured."""
    path, of = lab.out / "steps" / "rates" / "rates.json", _of(lab)
    known = _read(path)
    if known is not None and known.of == of:
        return known
    if not measure:
        return None
    with working("measuring how fast the model is"):
        found = _measured(lab, of)
    make_folder(path.parent)
    write_text_durably(path, json.dumps(asdict(found), indent=1))
    return found


def seconds_of(lab: Lab, name: str, work: Work, known: Rates | None) -> float | None:
    """How long a step will take at most; None if there is nothing to tell it by."""
    before = finished(lab, name)
    if before is not None and not before.failed:
        return before.seconds * _ratio(work, before.work)
    if known is None:
        return None
    written = known.served if served(lab, lab.plan.steps[name]) else known.written
    return _LEAST + work.written / written + work.read / known.read


def _ratio(now: Work, before: Work) -> float:
    """How much more work a step is now than when it ran before."""
    was, is_now = before.written + before.read, now.written + now.read
    return is_now / was if was and is_now else 1.0


def _of(lab: Lab) -> str:
    told: Mapping[str, Any] = lab.plan.load
    server = lab.server.url if lab.server else "no server"
    return f"{lab.model_identity}, {told.get('dtype') or 'own dtype'} on {told.get('device', 'cpu')}, {server}"


def _read(path: Path) -> Rates | None:
    if not path.exists():
        return None
    with wrap_errors(path):
        return Rates(**parse_json(path.read_bytes(), str(path)))


def _measured(lab: Lab, of: str) -> Rates:
    asked = next(step for step in lab.plan.steps.values() if step.kind == "record")
    how = asked.how()  # type: ignore[attr-defined]  # it records
    model, problems = lab.model(**how), lab.problems(asked.asks)[:_ROWS]
    prompts = [model.encode_prompt(problem) for problem in problems]
    seeds, sampling = range(len(prompts)), Sampling(temperature=0.7, max_new_tokens=_TOKENS)
    reading = _seconds(lambda: generate(model, prompts, replace(sampling, max_new_tokens=1), seeds=seeds))
    writing = _seconds(lambda: generate(model, prompts, sampling, seeds=seeds)) - reading
    written, read = len(prompts) * (_TOKENS - 1) / max(writing, 1e-3), sum(map(len, prompts)) / reading
    writer, fast = lab.writer(model), written
    if writer is not None:
        fast = len(prompts) * _TOKENS / _seconds(lambda: writer.complete(prompts, sampling, seeds))
    return Rates(of=of, written=written, read=read, served=fast)


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
