"""How many rollouts a sentence gets: as many as its accuracy needs, and no more."""

from dataclasses import dataclass

from reasonscope.data.errors import InputError
from reasonscope.data.intervals import wilson_half_width


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """`least` rollouts of each sentence, then `step` more while the 95 % interval of its accuracy is wider than
    ±`half_width`, up to `most`.

    100 rollouts (the paper's number) give an accuracy of one half to ±.096; a sentence that is always right is known
    that well after 16. Looking more than once makes the interval slightly too narrow; `least` keeps this small.
    """

    least: int = 20
    most: int = 100
    step: int = 10
    half_width: float = 0.1

    def __post_init__(self) -> None:
        if not (1 <= self.least <= self.most and self.step >= 1 and self.half_width > 0):
            raise InputError(f"{self}: 1 <= least <= most, step >= 1 and half_width > 0 are required")

    @classmethod
    def fixed(cls, n: int) -> "Allotment":
        """The same number everywhere."""
        return cls(least=n, most=n, step=1)

    def wanted(self, hits: int, n: int) -> int:
        """How many more rollouts a sentence with `hits` right ones among `n` gets now; 0 if its accuracy is known
        well enough."""
        if n < self.least:
            return self.least - n
        if n >= self.most or wilson_half_width(hits, n) <= self.half_width:
            return 0
        return min(self.step, self.most - n)
