"""Decoding methods by name, measured as steering vectors are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from transformers import LogitsProcessor

from reasonscope.data.errors import InputError
from reasonscope.data.random_sets import Pool, distinct_sets
from reasonscope.data.summary import Summary
from reasonscope.probes.architecture.sites import Site
from reasonscope.probes.models.model import Model
from reasonscope.steering.decoding.budget import BudgetGuidance, train_predictor
from reasonscope.steering.decoding.prefills import PREFILLS, prefill
from reasonscope.steering.decoding.processors import (
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
from reasonscope.steering.experiments.conditions import Condition
from reasonscope.steering.experiments.experiment import Arm, SteeringExperiment
from reasonscope.steering.experiments.summaries import ArmRow, response_summary
from reasonscope.steering.methods.registry import ExtractionData
from reasonscope.steering.vectors.thinking import WrittenThinking, single_tokens

# Words that often open a check or another approach; those that are not tokens of a model are left out.
_WAITING = ("Wait", "Let", "Hmm", "But", "However", "Alternatively")

# Makes a processor that changes the logits of tokens, from (thinking, tokens, value).
OnTokens: TypeAlias = Callable[[WrittenThinking, tuple[int, ...], float], LogitsProcessor]
# Makes a condition from the value of the method and a seed: its random control, or the method itself without a seed.
ConditionFactory: TypeAlias = Callable[[float, int | None], Condition]
_RANDOM_TOKENS = "random tokens"


@dataclass(frozen=True, kw_only=True)
class _DecodingMethod:
    """A way to change the thinking by decoding alone: logits, forced tokens or a prefill.

    Attributes:
        summary: What it does, in one line, with its paper.
        unit: The unit of its value.
        values: The default values.
        of_model: Makes the conditions by value and seed for a model; None for a method that learns from a run.
        of_run: The same for a method that learns from a run.
        chance: What its random control is, mostly as many random tokens; empty if it has none.
    """

    summary: str
    unit: str
    values: tuple[float, ...]
    of_model: Callable[[Model], ConditionFactory] | None = None
    of_run: Callable[[ExtractionData], ConditionFactory] | None = None
    chance: str = _RANDOM_TOKENS

    def prepare(self, source: ExtractionData) -> ConditionFactory:
        """Makes the conditions by value and seed, from what the method may learn from."""
        if self.of_model is not None:
            return self.of_model(source.model)
        assert self.of_run is not None  # a method has one of the two
        return self.of_run(source)


@dataclass(frozen=True, kw_only=True)
class DecodingResponse:
    """What a decoding method did at each of its values.

    Attributes:
        name: The method.
        unit: The unit of its value (`Arm.multiplier`).
        base: The unchanged model.
        arms: The method, by ascending value.
        controls: Its random controls, at each value; empty if it has none.
        control_name: What these are.
    """

    name: str
    unit: str
    base: Arm
    arms: tuple[Arm, ...]
    controls: tuple[Arm, ...]
    control_name: str = _RANDOM_TOKENS

    @property
    def curves(self) -> dict[str, tuple[Arm, ...]]:
        """The arms to draw as one line."""
        return {self.name: self.arms}

    def to_dict(self) -> dict[str, Any]:
        """Every arm with its measures, for JSON."""
        return {
            "unit": self.unit,
            "n_problems": self.base.n_problems,
            "base": self.base.to_dict(),
            "arms": [arm.to_dict() for arm in self.arms],
            "random": [arm.to_dict() for arm in self.controls],
            "control_name": self.control_name,
        }

    @classmethod
    def from_dict(cls, name: str, known: Mapping[str, Any]) -> "DecodingResponse":
        """The response of the method `name` that `to_dict` wrote."""
        return cls(
            name=name,
            unit=known["unit"],
            base=Arm.from_dict(known["base"]),
            arms=tuple(map(Arm.from_dict, known["arms"])),
            controls=tuple(map(Arm.from_dict, known["random"])),
            control_name=known["control_name"],
        )

    def summary(self) -> Summary:
        """What the method does at each value, beside the unchanged model and its random controls."""
        rows = [
            ArmRow(arm=arm, controls=tuple(one for one in self.controls if one.multiplier == arm.multiplier))
            for arm in self.arms
        ]
        return response_summary(self.name, self.base, rows, control=self.control_name, unit=self.unit)


def decoding_response(
    experiment: SteeringExperiment,
    source: ExtractionData,
    name: str,
    values: Sequence[float] | None = None,
    *,
    n_controls: int = 5,
) -> DecodingResponse:
    """Run a decoding method at several values, with random controls, all in one batch.

    Args:
        experiment: The problems and seeds.
        source: What the method may learn from, for instance the traces of a run; most need only its model.
        name: A name of DECODING_METHODS.
        values: The values to try; by default the method's own.
        n_controls: Random controls per value.

    Returns:
        Length, accuracy and side effects at each value, with those of the random controls.

    Raises:
        InputError: For an unknown name, no values, or values that the method cannot take.

    Example:
        experiment = SteeringExperiment(model, problems, sampling)
        source = ExtractionData(model=model, store=store, ids=store.ids)
        response = decoding_response(experiment, source, "forced-close", [60, 120])
    """
    chosen = decoding_method(name)
    wanted = sorted(set(chosen.values if values is None else values))
    if not wanted:
        raise InputError(f"no values for {name}; give at least one ({chosen.unit})")
    make = chosen.prepare(source)
    return response_at(experiment, name, wanted, make, unit=chosen.unit, chance=chosen.chance, n_controls=n_controls)


def response_at(
    experiment: SteeringExperiment,
    name: str,
    values: Sequence[float],
    make: ConditionFactory,
    *,
    unit: str,
    chance: str,
    n_controls: int,
) -> DecodingResponse:
    """Run what `make` makes at each value, with `n_controls` random controls of it if it has any (`chance` names them), in one batch."""
    conditions = [replace(make(value, None), name=name, multiplier=value) for value in values]
    random = [
        replace(make(value, seed), name=f"{name}, {chance} {seed + 1}", multiplier=value)
        for value in values
        for seed in range(n_controls if chance else 0)
    ]
    arms = experiment.arms([*conditions, *random])
    n = len(conditions)
    return DecodingResponse(
        name=name,
        unit=unit,
        base=experiment.base_arm,
        arms=tuple(arms[:n]),
        controls=tuple(arms[n:]),
        control_name=chance,
    )


def decoding_method(name: str) -> _DecodingMethod:
    """A method by name. Raises InputError for an unknown one."""
    if name not in DECODING_METHODS:
        raise InputError(f"no decoding method is called {name!r}; choose from {', '.join(DECODING_METHODS)}")
    return DECODING_METHODS[name]


def other_tokens(model: Model, tokens: Sequence[int], seed: int) -> tuple[int, ...]:
    """As many random tokens as `tokens`, none of them among these or among the think tags and stop tokens; others for each seed.

    Raises InputError if there are not so many different sets.
    """
    if not tokens:
        return ()
    thinking = WrittenThinking.of(model)
    tags = {token for token in (thinking.opens, thinking.closes) if token is not None}
    kept = {*tokens, *tags, *model.stop_ids}
    others = [token for token in range(model.vocabulary) if token not in kept]
    drawn = distinct_sets([Pool(members=others, size=len(tokens))], seed + 1)
    if len(drawn) <= seed:
        raise InputError(f"{len(others)} other tokens make {len(drawn)} random controls; ask for fewer")
    return tuple(sorted(drawn[seed]))


def _whole(value: float, what: str) -> int:
    if value != int(value) or value < 0:
        raise InputError(f"{value:g} {what}; give a whole number, at least 0")
    return int(value)


def _on(words: Sequence[str], make: OnTokens) -> Callable[[Model], ConditionFactory]:
    def prepare(model: Model) -> ConditionFactory:
        tokens, thinking = single_tokens(model, words, skip_longer=True), WrittenThinking.of(model)

        def condition(value: float, seed: int | None) -> Condition:
            chosen = tokens if seed is None else other_tokens(model, tokens, seed)
            return Condition(name="", processors=(make(thinking, chosen, value),))

        return condition

    return prepare


def _close_bias(model: Model) -> ConditionFactory:
    thinking = WrittenThinking.of(model)

    def condition(value: float, seed: int | None) -> Condition:
        if seed is None:
            return Condition(name="", processors=(CloseTag(thinking=thinking, bias=value),))
        token = other_tokens(model, (thinking.closing_token("close_bias"),), seed)
        return Condition(name="", processors=(TokenBias(thinking=thinking, tokens=token, bias=value),))

    return condition


def _forced_close(model: Model) -> ConditionFactory:
    def condition(value: float, _: int | None) -> Condition:
        forced = ForcedClose(thinking=WrittenThinking.of(model), budget=_whole(value, "tokens"))
        return Condition(name="", processors=(forced,))

    return condition


def _budget_forcing(model: Model) -> ConditionFactory:
    def condition(value: float, seed: int | None) -> Condition:
        forcing = BudgetForcing.of(model, rounds=_whole(value, "rounds"))
        if seed is not None:
            forcing = replace(forcing, wait=other_tokens(model, forcing.wait, seed))
        return Condition(name="", processors=(forcing,))

    return condition


def _budget_guidance(source: ExtractionData) -> ConditionFactory:
    """The predictor learns from the traces of the run, at every stored layer; sample at the run's temperature."""
    sites = [Site.parse(site) for site in source.store.sites if site.startswith("resid_")]
    if not sites:
        raise InputError(
            "the run stored no residual stream for the predictor to learn from; record it with --sites resid_post.*"
        )
    predictor, _ = train_predictor(source.store, sites, vocabulary=source.model.vocabulary, ids=source.ids)
    temperature = float(source.store.meta.get("sampling", {}).get("temperature", 1.0))

    def condition(value: float, seed: int | None) -> Condition:
        chosen = predictor if seed is None else predictor.with_tokens_exchanged(seed)
        budget = _whole(value, "tokens")
        guidance = BudgetGuidance(source.model, chosen, sites, budget=budget, temperature=temperature)
        return Condition(name="", intervention=guidance, processors=(guidance,))

    return condition


def _begun(name: str, chance: str = _RANDOM_TOKENS) -> _DecodingMethod:
    def prepare(model: Model) -> ConditionFactory:
        text = prefill(name, model)
        return lambda _, seed: Condition(name="", prefill=text if seed is None else _other_words(model, text, seed))

    return _DecodingMethod(
        summary=f"the thinking begins as {name} makes it",
        unit="as published",
        values=(1.0,),
        of_model=prepare,
        chance=chance,
    )


def _other_words(model: Model, text: str, seed: int) -> str:
    """`text` with its first line replaced by as many random tokens; the rest stays, the closing tag above all."""
    line = text.partition("\n")[0]
    drawn = other_tokens(model, model.tokenizer.encode(line, add_special_tokens=False), seed)
    return model.tokenizer_backend.decode(list(drawn), skip_special_tokens=False) + text[len(line) :]


DECODING_METHODS: Mapping[str, _DecodingMethod] = MappingProxyType(
    {
        "tip": _DecodingMethod(
            summary="a penalty on words that switch thoughts, early in each thought (TIP, arXiv 2501.18585)",
            unit="logits",
            values=(3.0,),
            of_model=_on(
                SWITCH_WORDS,
                lambda thinking, tokens, value: ThoughtSwitchPenalty(thinking=thinking, tokens=tokens, penalty=value),
            ),
        ),
        "cyclic-reflex": _DecodingMethod(
            summary="a triangle wave on words of reflection (CyclicReflex, arXiv 2506.11077), period 100",
            unit="logits",
            values=(3.0,),
            of_model=_on(
                REFLECTION_WORDS,
                lambda thinking, tokens, value: CyclicReflex(
                    thinking=thinking, tokens=tokens, amplitude=value, period=100.0
                ),
            ),
        ),
        "reflection-bias": _DecodingMethod(
            summary="a constant on words that open a check or another approach (SEAL's baseline: −3)",
            unit="logits",
            values=(-3.0, -1.0),
            of_model=_on(
                _WAITING, lambda thinking, tokens, value: TokenBias(thinking=thinking, tokens=tokens, bias=value)
            ),
        ),
        "suppress": _DecodingMethod(
            summary="words that open a check or another approach cannot be written while thinking (MI-Peaks, arXiv 2506.02867)",
            unit="as published",
            values=(1.0,),
            of_model=_on(_WAITING, lambda thinking, tokens, _: SuppressTokens(thinking=thinking, tokens=tokens)),
        ),
        "close-bias": _DecodingMethod(
            summary="the closing tag made likelier (TS, arXiv 2505.07961)",
            unit="logits",
            values=(2.0, 4.0, 8.0),
            of_model=_close_bias,
        ),
        "forced-close": _DecodingMethod(
            summary="the thinking is closed at a budget (s1, arXiv 2501.19393)",
            unit="tokens",
            values=(60.0, 120.0),
            of_model=_forced_close,
            chance="",
        ),
        "budget-forcing": _DecodingMethod(
            summary="the first times that it would close, it writes Wait instead (s1, arXiv 2501.19393)",
            unit="rounds",
            values=(1.0,),
            of_model=_budget_forcing,
        ),
        "budget-guidance": _DecodingMethod(
            summary="each token weighted by the chance to fit into a budget (arXiv 2506.13752); the predictor learns from the run",
            unit="tokens",
            values=(60.0, 120.0),
            of_run=_budget_guidance,
            chance="its weights on other tokens",
        ),
        **{name: _begun(name) for name in PREFILLS if name != "zerothink"},
        "zerothink": _begun("zerothink", chance=""),  # closes at once and says nothing
    }
)
