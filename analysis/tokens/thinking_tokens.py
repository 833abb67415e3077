"""What thinking tokens do: forbid them, feed them twice (Representation Recycling), or add them to think longer
(arXiv 2506.02867)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import SuppressTokensLogitsProcessor

from reasonscope.analysis.results import Axis, Band, Result
from reasonscope.analysis.tokens.arm_results import compare_arms, estimates
from reasonscope.analysis.tokens.mi import THINKING_WORDS
from reasonscope.data.errors import InputError
from reasonscope.data.text.answers import equivalent
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes.generation.branches import Branch, PrefixWriter
from reasonscope.probes.generation.forced_answers import closing_stub, forced_answers
from reasonscope.probes.generation.rollout import as_trace, counting_begun, trace_seed
from reasonscope.probes.models.model import Model
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.experiment import SteeringExperiment

_MOST_TRIES = 50  # per control, to find one that forbids other tokens than those before it


def token_ids_of(model: Model, words: Sequence[str] = THINKING_WORDS) -> list[int]:
    """Every token of the vocabulary that is one of `words`, apart from white space. Raises InputError if none is."""
    wanted = set(words)
    special = set(model.tokenizer.all_special_ids)
    found = [
        index
        for index in range(min(len(model.tokenizer), model.vocabulary))
        if index not in special and model.tokenizer_backend.decode([index], skip_special_tokens=False).strip() in wanted
    ]
    if not found:
        raise InputError(f"no token of {model.name} is one of {', '.join(sorted(wanted))}; give words that it has")
    return found


def _frequency_matched(
    thinking: Sequence[int], traces: Sequence[Trace], *, nearest: int = 5, seed: int = 0
) -> list[int]:
    """The control: for each thinking token that the traces use, another token with about its frequency, drawn from the
    `nearest`.

    Raises InputError if the traces have too few other tokens.
    """
    counts = Counter(int(i) for trace in traces for i in trace.token_ids[trace.n_prompt_tokens : -1])
    rng = np.random.default_rng(seed)
    free = [token for token in counts if token not in set(thinking)]
    chosen: list[int] = []
    for token in sorted((t for t in thinking if counts[t]), key=lambda t: -counts[t]):
        left = [other for other in free if other not in chosen]
        if not left:
            raise InputError(f"the traces use {len(free)} other tokens, too few to match the thinking tokens with")
        ranked = sorted(left, key=lambda other: (abs(np.log(counts[other] / counts[token])), other))
        chosen.append(ranked[int(rng.integers(min(nearest, len(ranked))))])
    return chosen


def _different_controls(thinking: Sequence[int], traces: Sequence[Trace], n: int, seed: int) -> list[list[int]]:
    """At most `n` controls that forbid different tokens."""
    found: dict[frozenset[int], list[int]] = {}
    for draw in range(_MOST_TRIES * n):
        tokens = _frequency_matched(thinking, traces, seed=seed + draw)
        found.setdefault(frozenset(tokens), tokens)
        if len(found) == n:
            break
    return [*found.values()]


def token_suppression(
    model: Model,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    words: Sequence[str] = THINKING_WORDS,
    n_controls: int = 5,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """Accuracy and length when thinking tokens can never be written, against random tokens of equal frequency (arXiv
    2506.02867).

    Args:
        model: The model.
        problems: Problems with gold answers.
        sampling: How to sample.
        words: The thinking tokens.
        n_controls: Random arms, each of which forbids as many tokens of about the same frequency. They are all different; fewer if
            fewer exist.
        batch_size: Prompts per batch.
        seed: Random seed.

    Returns:
        Axes (arm, metric): `base`, `thinking`, `random 1` … with accuracy and tokens. The null of every arm is the
        range of the random ones.

    Raises:
        InputError: If the vocabulary has none of the words, or the base arm too few other tokens to match.

    Departures: control tokens are matched in frequency on the base arm's own traces; the paper's figure 5 takes any
    random tokens.

    Example:
        sampling = rs.Sampling(temperature=0.6, max_new_tokens=2048)
        result = rs.analysis.token_suppression(model, problems, sampling)
        result.at(metric="accuracy")
    """

    experiment = SteeringExperiment(model, problems, sampling, batch_size=batch_size, on_given_text=False)
    ids, base = token_ids_of(model, words), experiment.traces
    forbidden = {"thinking": ids}
    forbidden |= {
        f"random {i}": tokens for i, tokens in enumerate(_different_controls(ids, base, n_controls, seed), start=1)
    }
    conditions = [
        Condition(name=name, processors=(SuppressTokensLogitsProcessor(tokens, device=str(model.device)),))
        for name, tokens in forbidden.items()
    ]
    arms = {"base": experiment.base, **dict(zip(forbidden, experiment.run_all(conditions), strict=True))}
    used = sum(int(np.isin(t.token_ids[t.n_prompt_tokens :], ids).sum()) for t in base)
    return compare_arms("token_suppression", arms, experiment, seed=seed, tokens=len(ids), uses_in_base=used)


def _think_longer(
    model: Model,
    traces: Sequence[Trace],
    word: str,
    sampling: Sampling,
    *,
    rounds: int = 1,
    batch_size: int = 32,
) -> list[str | None]:
    """The answer of each trace after its thinking was extended with `word`, `rounds` times, each time it would have
    closed (TTTS, section 5).

    Each round replaces the closing tag by the word's token and lets the model continue for at most
    `sampling.max_new_tokens`; thinking that is still open then is closed by force. `word` "" adds nothing: the control,
    which only asks for the answer. Raises InputError for a word of several tokens, or a trace without thinking.
    """
    ids = model.tokenizer.encode(f" {word}" if word else "", add_special_tokens=False)
    if len(ids) > 1:
        ids = model.tokenizer.encode(word, add_special_tokens=False)
    if len(ids) > 1:
        raise InputError(f"{word!r} is {len(ids)} tokens of {model.name}; give a word that is one")
    writer = PrefixWriter(model, batch_size=batch_size)
    answers: list[str | None] = []
    for trace in traces:
        if trace.state not in ("closed", "truncated"):
            raise InputError(f"trace {trace.id!r} has no thinking to extend ({trace.state}); leave it out")
        answers.append(_longer(model, writer, trace, tuple(ids), sampling, rounds))
    return answers


def _longer(
    model: Model, writer: PrefixWriter, trace: Trace, stub: tuple[int, ...], sampling: Sampling, rounds: int
) -> str | None:
    current = trace
    for round_ in range(rounds if stub else 0):
        seed = trace_seed(sampling.seed, f"{trace.id}/longer/{round_}")
        branch = Branch(cut=current.tokens.thinking.stop, stub=stub, seed=seed)
        (done,) = writer(current.token_ids.tolist(), [branch], sampling)
        whole = counting_begun(done, trace.n_prompt_tokens)
        current = as_trace(model, trace.problem, trace.sample, whole, replace(sampling, seed=seed))
    if stub and current.state == "closed" and current.final_answer is not None:
        return current.final_answer
    closing = closing_stub(current, model.encode_continuation, thinking=model.thinking)
    forced = forced_answers(writer, current, [current.tokens.thinking.stop], closing, model.decode)
    return forced.answers[0][0]


def time_scaling(
    model: Model,
    traces: Sequence[Trace],
    sampling: Sampling,
    *,
    words: Sequence[str] = ("So", "Wait", "Hmm"),
    controls: Sequence[str] = ("the", "is", "and"),
    rounds: int = 1,
    seed: int = 0,
) -> Result:
    """Accuracy after extending the thinking with each word, with control words that are not thinking words, and with
    none: axes (word, metric).

    Departure: the paper's numbers are those of its best word, chosen on the same problems; here every word is shown,
    the null is the range of the controls, and `numbers` has the mean over words.
    """
    outcomes = {}
    for word in ("", *words, *controls):
        answers = _think_longer(model, traces, word, sampling, rounds=rounds)
        outcomes[word or "(none)"] = np.array(
            [equivalent(a, t.problem.answer or "") for a, t in zip(answers, traces, strict=True)], dtype=np.float64
        )
    groups = [trace.problem.group for trace in traces]
    values, ends = estimates({name: hits[:, None] for name, hits in outcomes.items()}, groups)
    null = np.array([outcomes[word].mean() for word in controls])
    return Result(
        method="time_scaling",
        quantity="accuracy after extending the thinking with a word",
        unit="1",
        axes=(Axis.of("word", outcomes), Axis.of("metric", ("accuracy",))),
        values=values,
        null=Band.of(null.min(), null.max(), values.shape, f"range of the words {', '.join(controls)}"),
        interval=Band.of(ends[0], ends[1], values.shape, "over problems, 95%"),
        numbers={"mean_over_words": float(np.mean([outcomes[w].mean() for w in words])), "rounds": rounds},
        provenance={"traces": len(traces), "seed": seed},
    )
