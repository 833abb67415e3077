"""Calls the functions that a user calls, on tiny random models, where every head, direction and answer is as good as any other."""

from functools import cache

import numpy as np
import torch
from null_of_probes import p_of_noise
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from reasonscope.analysis import mi_of_trace, receiver_scores, signal_agreement, steering_shift, trajectory_of_trace
from reasonscope.analysis.tokens.mi import find_peaks, representations
from reasonscope.analysis.tokens.nocco import mutual_information
from reasonscope.data.arrays import Values
from reasonscope.data.sentence_cut import cut_trace
from reasonscope.data.text.parse import trace_from_text
from reasonscope.data.text.steps_and_sentences import sentence_of_each
from reasonscope.data.trace import Problem, Sampling, Trace
from reasonscope.probes import Head, Model, Site, load_model, replay
from reasonscope.steering import (
    Ablation,
    Scope,
    SteeringExperiment,
    SteeringVector,
    VectorUse,
    ablation_effect,
    dose_response,
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_D_HEAD, _WIDTH, _SITE = 4, 16, Site("resid_post", 0)


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, a stop, a blank and a new line, and the think tags; the template opens the thinking."""
    words = ["<pad>", "<s>", "</s>", "Ġ", "Ċ", ".", *_LETTERS, *_LETTERS.upper()]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<s>", "</s>"])
    inner.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


@cache
def _model(n_layers: int, n_heads: int) -> Model:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(_tokenizer()), hidden_size=32, intermediate_size=32, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=n_heads, head_dim=_D_HEAD, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return load_model(AutoModelForCausalLM.from_config(config).eval(), tokenizer=_tokenizer())


def random_model(rng: np.random.Generator, n_layers: int, n_heads: int) -> Model:
    """A model whose weights are drawn again, so that nothing tells its heads or directions apart."""
    model, random = _model(n_layers, n_heads), torch.Generator().manual_seed(_seed(rng))
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1 if "lm_head" in name else 0.4, generator=random)
    return model


def random_trace(rng: np.random.Generator, name: str = "one", *, sentences: int = 8, letters: int = 5) -> Trace:
    """Sentences of random letters, closed thinking and an answer of four letters."""
    thinking = " ".join(f"{_word(rng, letters).capitalize()}." for _ in range(sentences))
    return trace_from_text(
        id=f"{name}/0",
        problem=Problem(id=name, prompt="q"),
        prompt="q<think>\n",
        completion=f"{thinking}\n</think>\n\n{_word(rng, 4)}",
        tokenizer=_tokenizer().backend_tokenizer,
    )


def one_of_heads(n_heads: int, rng: np.random.Generator) -> float:
    """`ablation_effect` of one head, drawn at random, among the others of its block."""
    return _ablated(rng, n_heads, Ablation(name="a head", heads=_drawn_heads(rng, n_heads, 1)))


def several_heads(n_heads: int, n: int, rng: np.random.Generator) -> float:
    """The same of `n` heads at once."""
    return _ablated(rng, n_heads, Ablation(name="heads", heads=_drawn_heads(rng, n_heads, n)))


def one_of_mlps(rng: np.random.Generator) -> float:
    """`ablation_effect` of one MLP of eight, drawn at random."""
    return _ablated(rng, 2, Ablation(name="an MLP", mlps=(int(rng.integers(8)),)), n_layers=8)


def one_of_layers(rng: np.random.Generator) -> float:
    """`ablation_effect` of one layer of eight, drawn at random."""
    return _ablated(rng, 2, Ablation(name="a layer", layers=(int(rng.integers(8)),)), n_layers=8)


def share_of_information(rng: np.random.Generator) -> float:
    """The share of tokens that `mi_of_trace` puts above the answers of 39 other problems, if all answers are random letters."""
    model, trace = random_model(rng, 2, 4), random_trace(rng)
    hidden = replay(model, [trace.token_ids.tolist()], [_SITE])[0]
    answer, *others = representations(model, [_word(rng, 5) for _ in range(40)], [_SITE])
    found = mi_of_trace(trace, {site: rows.numpy() for site, rows in hidden.items()}, answer, others)
    return float(found.numbers[str(_SITE)]["share_above_null"]["value"])


def share_of_receivers(rng: np.random.Generator) -> float:
    """The share of sentences that a random head attends to more than `receiver_scores` expects of 20 other heads."""
    model, trace = random_model(rng, 1, 28), random_trace(rng, sentences=12)
    found = receiver_scores(model, trace, _drawn_heads(rng, 28, 1), seed=_seed(rng))
    assert found.null is not None
    scored = np.isfinite(found.values)
    return float((found.values > found.null.high)[scored].mean())


def share_of_shift(rng: np.random.Generator) -> float:
    """The share of tokens at which `steering_shift` puts a random vector outside of 20 others of its norm."""
    model, trace = random_model(rng, 2, 4), random_trace(rng, sentences=4)
    found = steering_shift(model, trace, _vector(rng, model), 1.0, Scope(), n_controls=20, seed=_seed(rng))
    return float(found.numbers["share_outside_null"]["value"])


def random_vector_beyond_random(rng: np.random.Generator) -> bool:
    """Whether `dose_response` calls a random vector beyond five random ones, on twelve problems that the model writes itself."""
    model = random_model(rng, 2, 4)
    problems = [Problem(id=str(i), prompt=f"{_word(rng, 6)}<think>\n") for i in range(12)]
    sampling = Sampling(temperature=1.0, max_new_tokens=40, seed=_seed(rng))
    experiment = SteeringExperiment(model, problems, sampling, on_given_text=False)
    response = dose_response(experiment, [VectorUse(vector=_vector(rng, model), scope=Scope())], [1.0])
    return response.doses[0].beyond_random


def signals_that_agree(rng: np.random.Generator) -> bool:
    """Whether `signal_agreement` finds any of three pairs of unrelated signals alike, after its correction."""
    trace = random_trace(rng, sentences=20)
    sentences = cut_trace(trace).sentences
    signals = {name: rng.normal(size=len(sentences)) for name in ("one", "two", "three")}
    found = signal_agreement(trace, sentences, signals, n_permutations=20, seed=_seed(rng))
    return any(pair["holm"] <= 0.05 for pair in found.numbers["agreement"].values())


def length_of_path(rng: np.random.Generator, _: int) -> tuple[float, float]:
    """The interval that `trajectory_of_trace` gives the length of a walk of ten steps."""
    trace = random_trace(rng, sentences=3, letters=1)
    steps = rng.normal(size=(len(trace.token_ids) - 1, 16)) * rng.lognormal(
        sigma=0.4, size=(len(trace.token_ids) - 1, 1)
    )
    found = trajectory_of_trace(trace, lambda _: np.cumsum(steps, axis=0), [_SITE], block=1, n_controls=2)
    n = int(found.numbers["segments"]) - 1
    assert found.interval is not None
    return float(found.interval.low[1, 0]) / n, float(found.interval.high[1, 0]) / n


def number_of_information(name: str, rng: np.random.Generator, _: int) -> tuple[float, float]:
    """The interval that `mi_of_trace` gives a number of 30 sentences whose states are alike, less what it is of very many."""
    trace = random_trace(rng, sentences=30, letters=10)
    sentences = cut_trace(trace).sentences
    owner = sentence_of_each(sentences, len(trace.token_ids))[1:]  # a row emits the next token
    answer, others = _answers()
    found = mi_of_trace(trace, {_SITE: _alike(rng, owner + 1)}, answer, others, sentences=sentences, seed=_seed(rng))
    low, high = found.numbers[str(_SITE)][name]["ci"]
    return low - _long_run()[name], high - _long_run()[name]


@cache
def _answers() -> tuple[dict[Site, Values], list[dict[Site, Values]]]:
    """An answer and five of other problems, the same in all runs."""
    rows = np.random.default_rng(0).normal(size=(6, _WIDTH))
    return {_SITE: rows[0]}, [{_SITE: row} for row in rows[1:]]


def _alike(rng: np.random.Generator, owner: NDArray[np.int64]) -> Values:
    """States (row, width), half of whose variance is that of their sentence."""
    return rng.normal(size=(owner.max() + 1, _WIDTH))[owner] + rng.normal(size=(len(owner), _WIDTH))


@cache
def _long_run() -> dict[str, float]:
    """The numbers of 5,000 sentences."""
    states = _alike(np.random.default_rng(1), np.repeat(np.arange(5000), 12))
    answer, others = _answers()
    line, *foreign = mutual_information(states, np.stack([answer[_SITE], *(other[_SITE] for other in others)])).T
    return {
        "mean": float(line.mean()),
        "median": float(np.median(line)),
        "share_peaks": float(find_peaks(line).mean()),
        "share_above_null": float((line > np.max(foreign, axis=0)).mean()),
    }


def probe_of_noise(probe: str, n_layers: int, rng: np.random.Generator) -> float:
    """The p-value of `rs.probes.length`, `refusal` or `correctness` on states that know nothing."""
    return p_of_noise(probe, n_layers, _seed(rng))


def _ablated(rng: np.random.Generator, n_heads: int, ablation: Ablation, *, n_layers: int = 1) -> float:
    model = random_model(rng, n_layers, n_heads)
    traces = [random_trace(rng, name, sentences=2) for name in ("one", "two")]
    return ablation_effect(model, traces, ablation, seed=_seed(rng)).p_value


def _drawn_heads(rng: np.random.Generator, n_heads: int, n: int) -> tuple[Head, ...]:
    return tuple(Head(layer=0, index=int(i)) for i in sorted(rng.permutation(n_heads)[:n]))


def _vector(rng: np.random.Generator, model: Model) -> SteeringVector:
    """A random direction, long enough to change what the model writes."""
    return SteeringVector(directions={_SITE: 0.5 * rng.normal(size=model.d_model).astype(np.float32)}, method="random")


def _word(rng: np.random.Generator, n: int) -> str:
    return "".join(rng.choice(list(_LETTERS), size=n))


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
