"""The options of each analysis: a frozen class per analysis, from which the command line is built.

Nothing heavy is imported here, so that `reasonscope --help` is fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_type_hints

from reasonscope.data.errors import InputError
from reasonscope.data.storage.run_folder import RunFolder
from reasonscope.data.variants import AttentionBackend, Gold, Quantise, Region

Told = TypeVar("Told", bound="AnalysisOptions")


def _option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    flag: str = "",
    matters: bool = True,
) -> Any:
    """A field of an options class: its help text, the range of its values, and its flag if that is not its name.

    An option that does not matter changes no result, so that an analysis is resumed under another value of it.
    """
    return field(default=default, metadata={"help": help, "min": least, "max": most, "flag": flag, "matters": matters})


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """The options that every analysis has."""

    figures: bool = _option(
        False, "Also draw each result as a page in RUN/figures, with the library that shows it.", flag="--figures"
    )

    def for_run(self, where: RunFolder) -> Self:
        """The options with the defaults that depend on the run, such as the place of its probe."""
        return self

    def key(self) -> dict[str, Any]:
        """The options that the results depend on."""
        return {told.name: getattr(self, told.name) for told in fields(self) if told.metadata.get("matters", True)}


@dataclass(frozen=True, kw_only=True)
class Seeded(AnalysisOptions):
    """Options of an analysis that draws at random."""

    seed: int = _option(0, "Random seed.")


@dataclass(frozen=True, kw_only=True)
class ReadsSites(AnalysisOptions):
    """Options of an analysis that reads stored activations."""

    sites: str = _option("", "Stored sites to read, separated by commas; a sensible choice if not given.")


@dataclass(frozen=True, kw_only=True)
class LoadsModel(AnalysisOptions):
    """Options of an analysis that loads the model; all but its name are those of `load_model`."""

    model: str | None = _option(None, "The model that wrote the traces, if the run does not say.")
    revision: str | None = _option(None, "Branch, tag or commit of this model on the hub; by default that of the run.")
    device: str = "cpu"
    dtype: str | None = None
    quantise: Quantise | None = None
    threads: int | None = None
    deterministic: bool = False
    float32_compute: bool = False

    def key(self) -> dict[str, Any]:
        """The revision of the run itself is in its store, which the results depend on anyway."""
        known = super().key()
        return known if self.revision else {name: value for name, value in known.items() if name != "revision"}


@dataclass(frozen=True, kw_only=True)
class LoadsBase(LoadsModel):
    """Options of an analysis that compares the model with its base model."""

    base: str = _option("organism-base", "The model before its reasoning training; it must have the same tokenizer.")


@dataclass(frozen=True, kw_only=True)
class Writes(LoadsModel):
    """Options of an analysis that has the model, or a server of it, write continuations."""

    temperature: float = _option(0.7, "Sampling temperature.", least=0.01)
    batch_size: int = _option(32, "Continuations that the model writes at a time.", least=1)
    server: str | None = _option(None, "http://host:port of a server of this model that writes the continuations.")
    served_as: str | None = _option(None, "The server's name for the model; the same as here if not given.")
    server_timeout: float = _option(600.0, "Seconds that a request to the server may take.", least=0.1, matters=False)
    trust_server: bool = _option(
        False,
        "Send a recipe as code to a server of vLLM on another machine, to steer as the run was steered.",
        matters=False,
    )

    def key(self) -> dict[str, Any]:
        """Which server writes makes no difference; whether one does, does."""
        return {**super().key(), "server": self.server is not None}


@dataclass(frozen=True, kw_only=True)
class _ComparesAnswer(LoadsModel, Seeded):
    """Options of an analysis that compares states with the answer's."""

    gold: Gold = _option(
        "reference", "The answer to compare with: the problem's reference solution, or the model's own."
    )
    region: Region = _option("thinking", "The tokens to look at: those of the thinking, or all that were generated.")


@dataclass(frozen=True, kw_only=True)
class MiOptions(ReadsSites, _ComparesAnswer):
    """Options of `mi`."""


@dataclass(frozen=True, kw_only=True)
class MiCompareOptions(_ComparesAnswer, LoadsBase):
    """Options of `mi_compare`."""


@dataclass(frozen=True, kw_only=True)
class AnchorsOptions(Writes, Seeded):
    """Options of `anchors`."""

    rollouts: int = _option(100, "Most rollouts from before a sentence.", least=2)
    half_width: float = _option(0.1, "Stop when a sentence's accuracy is known to within this.", least=0.001)
    max_new_tokens: int = _option(1024, "Most tokens of a rollout.", least=1)


@dataclass(frozen=True, kw_only=True)
class ConfidenceOptions(Writes, Seeded):
    """Options of `confidence`."""

    samples: int = _option(8, "Forced answers at each cut.", least=1)


@dataclass(frozen=True, kw_only=True)
class ReadsThroughModel(LoadsModel, Seeded):
    """Options of an analysis that has the model read the traces: `receivers`, `suppression`, `heads`."""


@dataclass(frozen=True, kw_only=True)
class CliffOptions(LoadsModel, Seeded):
    """Options of `cliff`."""

    probe: Path | None = _option(None, "A refusal probe; RUN/probes/refusal.safetensors if not given.")
    ablate: bool = _option(
        False,
        "Also ask requests without the heads that lower refusal most (writes cliff): half of the run's own, by which the heads are "
        "not chosen.",
        flag="--ablate",
    )
    requests: Path | None = _option(
        None, "With --ablate: ask the requests of this problem file instead, whose meta says whether they are harmful."
    )
    share: float = _option(0.03, "The share of all heads to ablate; at least one is.", least=0.001, most=1)
    at_close: bool = _option(False, "Ablate them in the close window only, not at every token.", flag="--at-close")
    n_controls: int = _option(20, "Random sets of heads to compare with.", least=20)
    asked: int = _option(
        40, "Harmful requests, benign ones and problems with an answer to ask: at most so many of each.", least=2
    )
    max_new_tokens: int = _option(1024, "Most tokens of an answer.", least=1)
    temperature: float = _option(0.7, "Sampling temperature.", least=0.01)

    def for_run(self, where: RunFolder) -> Self:
        return self if self.probe else replace(self, probe=where.probes / "refusal.safetensors")


@dataclass(frozen=True, kw_only=True)
class EmergentHeadsOptions(LoadsBase, Seeded):
    """Options of `emergent_heads`."""


@dataclass(frozen=True, kw_only=True)
class MisalignmentOptions(LoadsBase):
    """Options of `misalignment`."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryOptions(ReadsSites, Seeded):
    """Options of `trajectory`."""

    block: int | None = _option(
        None, "Tokens of a segment. By default 500, or an eighth of the run's median thinking if that is less.", least=1
    )


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(TrajectoryOptions):
    """Options of `selection`."""

    k: int = _option(4, "Samples of a problem to choose from.", least=2, flag="-k")
    probe: Path | None = _option(None, "A correctness probe to stop the thinking by; run `analyse confidence` first.")


@dataclass(frozen=True, kw_only=True)
class ReceiversOptions(ReadsThroughModel):
    """Options of an analysis of attention that vLLM can reduce: `receivers`, and `heads` in part."""

    backend: AttentionBackend = _option(
        "hooks",
        "What reads attention: the model here (hooks), or a server of vLLM with vllm-lens, which gives sums alone.",
    )
    server: str | None = _option(None, "http://host:port of that server, which holds this model.")
    served_as: str | None = _option(None, "The server's name for the model; the same as here if not given.")
    server_timeout: float = _option(600.0, "Seconds that a request to the server may take.", least=0.1, matters=False)
    trust_server: bool = _option(
        False, "Send the code that reduces attention to a server on another machine.", matters=False
    )

    def __post_init__(self) -> None:
        if (self.backend == "vllm") != (self.server is not None):
            raise InputError("attention is read in vLLM by --backend vllm and --server together; give both or neither")

    def key(self) -> dict[str, Any]:
        """Which server reads makes no difference; whether one does, does."""
        return {**super().key(), "server": self.server is not None}


@dataclass(frozen=True, kw_only=True)
class HeadsOptions(ReceiversOptions):
    """Options of `heads`."""

    exact: bool = _option(False, "Take out every head in a pass of its own, even if this takes hours.", flag="--exact")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact and self.server is not None:
            raise InputError(
                "heads are taken out one by one with the weights here; leave out --exact, or --backend vllm and --server"
            )


@dataclass(frozen=True, kw_only=True)
class AlternativesOptions(ReadsThroughModel):
    """Options of `alternatives`."""

    top: int = _option(5, "How many of the likeliest tokens to keep at each place.", least=1)


@dataclass(frozen=True, kw_only=True)
class SteeringShiftOptions(ReadsThroughModel):
    """Options of `steering_shift`."""

    vector: Path | None = _option(
        None, "A recipe of one vector, or a vector; RUN/steering/seal.recipe.safetensors if not given."
    )
    strength: float = _option(1.0, "Multiplier of the vector.")
    everywhere: bool = _option(
        False, "Steer every token of the thinking, not only those where a step begins.", flag="--everywhere"
    )
    n_controls: int = _option(20, "Random vectors of the same norm to compare with.", least=5)

    def for_run(self, where: RunFolder) -> Self:
        if self.vector:
            return self
        old = where.vectors / "seal.safetensors"  # as it was saved before there were recipes
        return replace(self, vector=old if old.exists() else where.vectors / "seal.recipe.safetensors")


@dataclass(frozen=True, kw_only=True)
class AttentionMapOptions(ReadsThroughModel):
    """Options of `attention_map`."""

    keys: int = _option(8, "How many of the tokens that each token looks at most to keep, for each head.", least=1)


def make_options(kind: type[Told], given: Mapping[str, Any]) -> Told:
    """Options of `kind` with the values `given` by name. Raises InputError for a name or a value that it does not take."""
    known = {told.name: told for told in fields(kind)}
    if unknown := sorted(set(given) - set(known)):
        allowed = f"it takes {', '.join(sorted(known))}" if known else "it has no options"
        raise InputError(f"this analysis does not take {unknown[0]!r}; {allowed}")
    hints = get_type_hints(kind)
    return kind(**{name: _checked(name, value, hints[name], known[name].metadata) for name, value in given.items()})


def _checked(name: str, value: Any, hint: Any, told: Mapping[str, Any]) -> Any:
    least, most = told.get("min"), told.get("max")
    if (least is not None and value < least) or (most is not None and value > most):
        limits = f"at least {least}" + (f" and at most {most}" if most is not None else "")
        raise InputError(f"option {name} = {value}: it must be {limits}")
    if (choices := [choice for choice in get_args(hint) if isinstance(choice, str)]) and value not in choices:
        raise InputError(f"option {name} = {value!r}: choose {' or '.join(choices)}")
    return Path(value) if isinstance(value, str) and Path in get_args(hint) else value
