"""The step that lets the model answer problems and stores its traces: a run, on which other steps work."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from reasonscope.analysis.figures import answers_by_request, thinking_by_difficulty, write_figure
from reasonscope.analysis.studies.lab import Lab, sites_of
from reasonscope.analysis.studies.steps.base import Outcome, Step, Work
from reasonscope.data.errors import InputError
from reasonscope.data.exchange.summaries import check_summary
from reasonscope.data.intervals import mean_estimate
from reasonscope.data.storage.durable import make_folder
from reasonscope.data.storage.manifest import NAME
from reasonscope.data.storage.run_folder import RunFolder
from reasonscope.data.storage.store import TraceStore
from reasonscope.data.summary import plural
from reasonscope.data.text.behaviour import behaviour
from reasonscope.data.text.think_tags import ThinkTags
from reasonscope.data.text.thinking import Thinking
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.generation.recording import record
from reasonscope.probes.models.prompting import Prompting, PromptOptions
from reasonscope.steering.recipes.files import SUFFIX
from reasonscope.steering.recipes.recipe import Recipe

_NUMBER_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2}  # else 4
_TOKEN_BYTES = 64  # of a trace without activations


@dataclass(frozen=True, kw_only=True)
class RecordStep(Step):
    """Let the model answer problems, and store the traces with activations.

    Attributes:
        problems: Sets of problems, or parts of them (`math.learn`).
        sites: Activations to store, such as `resid_post.*` or, at half of the depth, `resid_post.50%`; none if empty.
        samples: Completions of each problem.
        max_new_tokens: Longest completion.
        temperature: Sampling temperature; 0 is greedy.
        sampling: Further fields of `Sampling`, such as `top_p`.
        batch_size: Completions that are written together.
        think: false closes the thinking block at once.
        open_tag: Append the opening tag to every prompt.
        thinking: How thinking is found: tags, completion or none; by default as the model suggests.
        think_tags: The opening and the closing tag.
        answer_pattern: For thinking in the open: a regular expression in the sentence with the final answer.
        system: A system message for every problem.
        template_args: Variables of the chat template.
        steer: The step whose recipe steers the model.
        folder: `.` for the folder of the study itself.
    """

    kind: ClassVar[str] = "record"

    problems: tuple[str, ...]
    sites: tuple[str, ...] = ()
    samples: int = 1
    max_new_tokens: int = 1024
    temperature: float = 0.7
    sampling: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = field(default=16, metadata={"matters": False})
    think: bool = True
    open_tag: bool = False
    thinking: Literal["tags", "completion", "none"] | None = None
    think_tags: tuple[str, ...] | None = None
    answer_pattern: str | None = None
    system: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    steer: str | None = None
    folder: Literal["."] | None = None

    def how(self) -> dict[str, Any]:
        """The arguments of `load_model` that say how thinking is found and prompts are rendered."""
        tags = ThinkTags(open=self.think_tags[0], close=self.think_tags[1]) if self.think_tags else None
        named = "tags" if tags else "completion" if self.answer_pattern is not None else None
        mode = self.thinking or named
        found = Thinking(mode=mode, tags=tags, answer_pattern=self.answer_pattern) if mode else None  # type: ignore[arg-type]  # one of three
        prompt = PromptOptions(
            system=self.system, template_args=self.template_args, think=self.think, open_tag=self.open_tag
        )
        return {"thinking": found, "prompt": prompt}

    def expanded(self, model: Prompting) -> tuple[Site, ...]:
        """The sites to store."""
        return sites_of(self.sites, model.n_layers)

    def work(self, lab: Lab) -> Work:
        asked, model = lab.problems(self.problems), lab.prompting(**self.how())
        rows = len(asked) * self.samples
        prompts = [len(model.encode_prompt(p)) for p in asked[:20]]
        tokens = rows * (float(np.mean(prompts)) + self.max_new_tokens)
        sites = self.expanded(model)
        width = int(model.config.get_text_config().hidden_size)
        each = width * _NUMBER_BYTES.get(
            str(lab.plan.load.get("dtype") or model.config.dtype).removeprefix("torch."), 4
        )
        return Work(
            written=rows * self.max_new_tokens,
            read=tokens if sites else 0.0,
            disk=tokens * (_TOKEN_BYTES + each * len(sites)),
        )

    def execute(self, lab: Lab, name: str) -> Outcome:
        where = lab.where(name)
        make_folder(where.results)
        asked = lab.problems(self.problems)
        _check_no_others(where, asked)
        steer = None if self.steer is None else Recipe.load(lab.out / "vectors" / f"{self.steer}{SUFFIX}")
        served = lab.server is not None and steer is None
        model: Prompting = lab.model(**self.how()) if self.sites or not served else lab.prompting(**self.how())
        store = record(
            model,
            asked,
            where.store,
            sites=self.expanded(model),
            sampling=self.to_sampling(lab.plan.seed),
            samples=self.samples,
            batch_size=self.batch_size,
            server=lab.writer(model) if served else None,
            steer=steer,
        )
        found = check_summary(str(where.results), store)
        found = replace(
            found, finding=f"{plural(len(store), 'trace')} of {', '.join(self.problems)} in {where.results}."
        )
        graded = [trace for trace in store if trace.correct is not None]
        numbers = {
            "traces": len(store),
            "n_problems": len(_problems(list(store))),
            "sampling": asdict(self.to_sampling(lab.plan.seed)),
            "right": sum(trace.correct is True for trace in graded),
            "graded": len(graded),
            "closed": sum(trace.state == "closed" for trace in store),
            **_means({"accuracy": [(trace, trace.correct is True) for trace in _problems(graded)]}),
            **_means({"thinking_tokens": [(trace, trace.n_thinking_tokens) for trace in _problems(list(store))]}),
        }
        drawn = _drawn(where, list(store))
        return Outcome(summaries=(found,), numbers=numbers, files=(where.store / NAME, *drawn), figures=drawn)

    def to_sampling(self, seed: int) -> Sampling:
        """How it samples."""
        told = {"temperature": self.temperature, **self.sampling}
        return Sampling(**told, max_new_tokens=self.max_new_tokens, seed=seed)


def _check_no_others(where: RunFolder, asked: Sequence[Problem]) -> None:
    """Raise InputError if a run that was begun holds traces of other problems: later steps would read them, too."""
    if not (where.store / NAME).exists():
        return
    ids = {problem.id for problem in asked}
    others = {problem.id for problem in TraceStore.open(where.store).problems()} - ids
    if others:
        raise InputError(
            f"{where.results} holds traces of {plural(len(others), 'problem')} that the plan does not ask for, such as {min(others)!r}; "
            "remove that folder to record the step again"
        )


def _problems(traces: Sequence[Trace]) -> Sequence[Trace]:
    """The traces that solve a problem, without those that answer a request; all of them if there are only requests."""
    return [trace for trace in traces if "harmful" not in trace.problem.meta] or traces


def _means(values: Mapping[str, Sequence[tuple[Trace, float]]]) -> dict[str, Any]:
    """The mean of each with its interval over groups of problems; left out if there are fewer than two."""
    found = {}
    for name, pairs in values.items():
        groups = [trace.problem.group for trace, _ in pairs]
        if len(set(groups)) > 1:
            found[name] = mean_estimate([float(value) for _, value in pairs], groups=groups).to_dict()
    return found


def _drawn(where: RunFolder, traces: Sequence[Trace]) -> tuple[Path, ...]:
    """Thinking by difficulty, if it is known, and the answers to requests, if there are any; written as JSON."""
    levelled = [trace for trace in traces if trace.problem.difficulty is not None]
    requests = [trace for trace in traces if "harmful" in trace.problem.meta]
    found = {}
    if levelled:
        found["thinking_by_difficulty"] = thinking_by_difficulty(levelled)
    if requests:
        found["answers_by_request"] = answers_by_request(_outcomes(requests))
    make_folder(where.figures)
    for name, figure in found.items():
        write_figure(figure, where.figures / f"{name}.json")
    return tuple(where.figures / f"{name}.json" for name in found)


def _outcomes(requests: Sequence[Trace]) -> dict[str, dict[str, int]]:
    """How often harmful and benign requests were refused, complied with, or neither, by the rules."""
    counts: dict[str, dict[str, int]] = {}
    for trace in requests:
        meta = trace.problem.meta
        kind = "benign" if not meta["harmful"] else "harmful, jailbroken" if meta.get("jailbreak") else "harmful"
        by_outcome = counts.setdefault(kind, dict.fromkeys(("refused", "complied", "unclear"), 0))
        by_outcome[behaviour(trace)] += 1
    return counts
