"""Controls of the decoding by name, as arms of the same plane as steering vectors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, TypeAlias

import numpy as np
from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.probes.model import Model
from reasonscope.probes.sites import Site
from reasonscope.steering.bench import Arm, Bench
from reasonscope.steering.budget import BudgetGuidance, train_predictor
from reasonscope.steering.decoding import (
    REFLECTION_WORDS,
    SWITCH_WORDS,
    BudgetForcing,
    CloseTag,
    CyclicReflex,
    ForcedClose,
    SuppressTokens,
    ThoughtSwitchPenalty,
    TokenBias,
)
from reasonscope.steering.methods import Source
from reasonscope.steering.prefill import PREFILLS, prefill
from reasonscope.steering.thinking import Thinking, single_tokens
from reasonscope.steering.treatments import Treatment

# What CyclicReflex cycles; the first words of doubt in many models' thinking; those that a model does not have as tokens are left out.
_WAITING = ("Wait", "Let", "Hmm", "But", "However", "Alternatively")

# (thinking, tokens, value) to a processor that acts on the logits of these tokens.
OnTokens: TypeAlias = Callable[[Thinking, tuple[int, ...], float], LogitsProcessor]


@dataclass(frozen=True, kw_only=True)
class Control:
    """`treat` makes the treatment for a value of what is varied: `values` to begin with, in `unit`.

    A control that acts on tokens (`on`, of `words`) has its own control: the same on as many random tokens.
    """

    summary: str
    unit: str
    values: tuple[float, ...]
    treat: Callable[[Source, float], Treatment] | None = None
    on: OnTokens | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ControlResponse:
    """The arms of a control by ascending value; `nulls` those of random tokens in its tokens' place, where it acts on tokens."""

    name: str
    unit: str
    base: Arm
    arms: tuple[Arm, ...]
    nulls: tuple[Arm, ...]
    null_name: ClassVar[str] = "random tokens"

    @property
    def curves(self) -> dict[str, tuple[Arm, ...]]:
        return {self.name: self.arms}


def control_response(
    bench: Bench,
    source: Source,
    name: str,
    values: Sequence[float] | None = None,
    *,
    nulls: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> ControlResponse:
    """Run a control of CONTROLS at each of `values`, all in one batch. Raises InputError for an unknown name, no values, or values that the
    control cannot take."""
    chosen = control(name)
    wanted = sorted(set(chosen.values if values is None else values))
    if not wanted:
        raise InputError(f"no value for {name}; give at least one ({chosen.unit})")
    treatments = [_treatment(chosen, source, name, value) for value in wanted]
    chance = [
        _on_tokens(chosen, source.model, f"{name}, random tokens {seed + 1}", value, seed)
        for value in wanted
        for seed in range(nulls if chosen.on else 0)
    ]
    arms = bench.arms([*treatments, *chance], say=say)
    n = len(treatments)
    return ControlResponse(
        name=name, unit=chosen.unit, base=bench.base_arm, arms=tuple(arms[:n]), nulls=tuple(arms[n:])
    )


def control(name: str) -> Control:
    """Raises InputError for a name that no control has."""
    if name not in CONTROLS:
        raise InputError(f"no control of the decoding is called {name!r}; there are {', '.join(CONTROLS)}")
    return CONTROLS[name]


def _treatment(chosen: Control, source: Source, name: str, value: float) -> Treatment:
    if chosen.on is not None:
        return _on_tokens(chosen, source.model, name, value, None)
    assert chosen.treat is not None
    treatment = chosen.treat(source, value)
    return Treatment(
        name=name,
        multiplier=value,
        intervention=treatment.intervention,
        processors=treatment.processors,
        prefill=treatment.prefill,
    )


def _on_tokens(chosen: Control, model: Model, name: str, value: float, seed: int | None) -> Treatment:
    """On the tokens of the control's words, or on as many others drawn by `seed`."""
    assert chosen.on is not None
    tokens = known_tokens(model, chosen.words)
    thinking = Thinking.of(model)
    if seed is not None:
        kept = {*tokens, thinking.opens, thinking.closes, *model.stop_ids}
        others = [token for token in range(model.vocabulary) if token not in kept]
        drawn = np.random.default_rng(seed).choice(others, size=len(tokens), replace=False)
        tokens = tuple(int(token) for token in sorted(drawn))
    return Treatment(name=name, multiplier=value, processors=(chosen.on(thinking, tokens, value),))


def known_tokens(model: Model, words: Sequence[str]) -> tuple[int, ...]:
    """The ids of those `words` that are single tokens of the model. Raises InputError where none is."""
    found: set[int] = set()
    for word in words:
        try:
            found.update(single_tokens(model, (word,)))
        except InputError:
            continue
    if not found:
        raise InputError(f"none of {', '.join(map(repr, words))} is a token of {model.name}")
    return tuple(sorted(found))


def _whole(value: float, what: str) -> int:
    if value != int(value) or value < 0:
        raise InputError(f"{value:g} {what}; give a whole number that is not below 0")
    return int(value)


def _processor(make: Callable[[Thinking, float], LogitsProcessor]) -> Callable[[Source, float], Treatment]:
    return lambda source, value: Treatment(name="", processors=(make(Thinking.of(source.model), value),))


def _budget_forcing(source: Source, value: float) -> Treatment:
    forcing = BudgetForcing.of(source.model, rounds=_whole(value, "rounds"))
    return Treatment(name="", processors=(forcing,))


def _budget_guidance(source: Source, value: float) -> Treatment:
    """The predictor learns from the traces of the run, at every layer that it stored."""
    sites = [Site.parse(site) for site in source.store.sites if site.startswith("resid_")]
    if not sites:
        raise InputError(
            "the run stored no residual stream for the predictor to learn from; record it with --sites resid_post.*"
        )
    predictor, _ = train_predictor(source.store, sites, vocabulary=source.model.vocabulary, ids=source.ids)
    temperature = float(source.store.meta.get("sampling", {}).get("temperature", 1.0))
    guidance = BudgetGuidance(source.model, predictor, sites, budget=_whole(value, "tokens"), temperature=temperature)
    return Treatment(name="", intervention=guidance, processors=(guidance,))


def _begun(text: str) -> Control:
    return Control(
        summary=f"the thinking begins as {text} makes it",
        unit="as published",
        values=(1.0,),
        treat=lambda source, _: Treatment(name="", prefill=prefill(text, source.model)),
    )


CONTROLS: Mapping[str, Control] = MappingProxyType(
    {
        "tip": Control(
            summary="a penalty on words that switch thoughts, early in each thought (TIP, arXiv 2501.18585)",
            unit="logits",
            values=(3.0,),
            on=lambda thinking, tokens, value: ThoughtSwitchPenalty(thinking=thinking, tokens=tokens, penalty=value),
            words=SWITCH_WORDS,
        ),
        "cyclic-reflex": Control(
            summary="a triangle wave on words of reflection (CyclicReflex, arXiv 2506.11077), period 100",
            unit="logits",
            values=(3.0,),
            on=lambda thinking, tokens, value: CyclicReflex(
                thinking=thinking, tokens=tokens, amplitude=value, period=100.0
            ),
            words=REFLECTION_WORDS,
        ),
        "reflection-bias": Control(
            summary="a constant on words that open a check or another approach (SEAL's baseline: −3)",
            unit="logits",
            values=(-3.0, -1.0),
            on=lambda thinking, tokens, value: TokenBias(thinking=thinking, tokens=tokens, bias=value),
            words=_WAITING,
        ),
        "suppress": Control(
            summary="words that open a check or another approach cannot be written while thinking (MI-Peaks, arXiv 2506.02867)",
            unit="as published",
            values=(1.0,),
            on=lambda thinking, tokens, _: SuppressTokens(thinking=thinking, tokens=tokens),
            words=_WAITING,
        ),
        "close-bias": Control(
            summary="the closing tag made likelier (TS, arXiv 2505.07961)",
            unit="logits",
            values=(2.0, 4.0, 8.0),
            treat=_processor(lambda thinking, value: CloseTag(thinking=thinking, bias=value)),
        ),
        "forced-close": Control(
            summary="the thinking is closed at a budget (s1, arXiv 2501.19393)",
            unit="tokens",
            values=(60.0, 120.0),
            treat=_processor(lambda thinking, value: ForcedClose(thinking=thinking, budget=_whole(value, "tokens"))),
        ),
        "budget-forcing": Control(
            summary="the first times that it would close, it writes Wait instead (s1, arXiv 2501.19393)",
            unit="rounds",
            values=(1.0,),
            treat=_budget_forcing,
        ),
        "budget-guidance": Control(
            summary="each token weighted by the chance to fit into a budget (arXiv 2506.13752); the predictor learns from the run",
            unit="tokens",
            values=(60.0, 120.0),
            treat=_budget_guidance,
        ),
        **{name: _begun(name) for name in PREFILLS},
    }
)
