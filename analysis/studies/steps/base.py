"""What every step of a study has: the options of its kind, what it reads, how much work it is, and what came out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from reasonscope.data.summary import Summary

if TYPE_CHECKING:
    from reasonscope.analysis.studies.lab import Lab


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a step does at most, as far as it can be estimated.

    Attributes:
        written: Tokens that the model writes.
        read: Tokens that it reads, in passes over finished text.
        disk: Bytes that stay on the disk.
    """

    written: float = 0.0
    read: float = 0.0
    disk: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(written=self.written + other.written, read=self.read + other.read, disk=self.disk + other.disk)

    def __mul__(self, times: float) -> "Work":
        return Work(written=self.written * times, read=self.read * times, disk=self.disk * times)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step found.

    Attributes:
        summaries: The findings, for people.
        numbers: Every number, for JSON.
        files: What was written and has to be there for the step to count as done.
        figures: Figures as JSON, for the report.
    """

    summaries: tuple[Summary, ...]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    figures: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One step of a plan.

    Attributes:
        after: Steps whose results this one also reads, as far as they could be measured.
    """

    kind: ClassVar[str]
    after: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps that run before, and whose changes make this one stale."""
        return tuple(dict.fromkeys([*self.reads, *self.after]))

    @property
    def reads(self) -> tuple[str, ...]:
        """The steps without whose results this one cannot run."""
        named = [
            value for name in ("run", "plain", "pairs", "steer", "words_of") if (value := getattr(self, name, None))
        ]
        return tuple(dict.fromkeys(named))

    @property
    def asks(self) -> tuple[str, ...]:
        """The problem sets that it asks, by name."""
        return tuple(getattr(self, "problems", None) or ())

    def settings(self) -> dict[str, Any]:
        """Everything that its results depend on and that is not at its default: an option that a later version adds changes nothing."""
        known = {told.name: told for told in fields(self) if told.metadata.get("matters", True)}
        values = {name: getattr(self, name) for name in known}
        return {name: value for name, value in values.items() if value != _default(known[name])}

    @abstractmethod
    def work(self, lab: "Lab") -> Work:
        """How much it does at most."""

    @abstractmethod
    def execute(self, lab: "Lab", name: str) -> Outcome:
        """Do it, and save what comes out. Raises InputError if it cannot be measured."""


def _default(told: Field[Any]) -> Any:
    return told.default_factory() if told.default_factory is not MISSING else told.default
