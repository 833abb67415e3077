"""How strong steering may be under a bound on the KL divergence that it causes (ASC, arXiv 2507.04742, section 3)."""

import math
from dataclasses import dataclass

from scipy.optimize import brentq

from reasonscope.data.errors import InputError
from reasonscope.data.variants import is_published


@dataclass(frozen=True, kw_only=True)
class KLBound:
    """Strengths γ for which ¼(aγ + ½Lγ²)², the bound on KL in nats, is at most ε, for a direction of length 1.

    Attributes:
        a: ‖∂z/∂γ‖ of the logits z.
        lipschitz: L, a bound of ‖∂²z/∂γ²‖.
        epsilon: ε, the KL that is allowed, in nats.
        gamma_star: The exact strength.
        gamma_raw: The paper's, without the quartic term.
        gamma_max: The paper's correction of it; NaN (undefined) for a = 0.
    """

    a: float
    lipschitz: float
    epsilon: float
    gamma_star: float
    gamma_raw: float
    gamma_max: float

    def bound(self, gamma: float) -> float:
        """¼(aγ + ½Lγ²)², the largest KL that steering by γ may cause, in nats."""
        return (self.a * gamma + self.lipschitz * gamma**2 / 2) ** 2 / 4


def kl_bound(a: float, lipschitz: float, epsilon: float, *, variant: str = "corrected") -> KLBound:
    """γ* = (√(a² + 4L√ε) − a)/L, with the paper's γ_raw and γ_max = max(0, (1 − Lγ_raw/4a)·γ_raw) for comparison.

    γ_raw = (a/L)·x, where x is the positive root of x³ + x² = β with β = 4εL²/a⁴. Departure: the root is found by bisection, since the
    paper's formula with real cube roots (`variant="published"`) is NaN if its discriminant is negative, which is the ordinary case
    (β < 4/27). The formulas avoid cancellation for small L. Raises InputError unless a, L ≥ 0 (not both 0) and ε > 0.
    """
    if not (a >= 0 and lipschitz >= 0 and a + lipschitz > 0 and epsilon > 0 and math.isfinite(a + lipschitz + epsilon)):
        raise InputError(
            f"a = {a}, L = {lipschitz}, ε = {epsilon}: give finite numbers, ε above 0, a and L not negative and not both 0"
        )
    root = math.sqrt(epsilon)
    star = 4 * root / (math.sqrt(a**2 + 4 * lipschitz * root) + a)  # the formula above, multiplied by its conjugate
    if lipschitz == 0:
        raw = largest = 2 * root / a
    elif a == 0:
        raw, largest = (16 * epsilon) ** 0.25 / math.sqrt(lipschitz), math.nan
    else:
        x = _positive_root(4 * epsilon * lipschitz**2 / a**4, variant)
        raw = a / lipschitz * x
        largest = max(0.0, (1 - x / 4) * raw) if not math.isnan(x) else math.nan
    return KLBound(a=a, lipschitz=lipschitz, epsilon=epsilon, gamma_star=star, gamma_raw=raw, gamma_max=largest)


def _discriminant(beta: float) -> float:
    """(q/2)² + (p/3)³ of the depressed cubic y³ + py + q, p = −1/3, q = 2/27 − β; expanded, as it nearly cancels."""
    return beta**2 / 4 - beta / 27


def _positive_root(beta: float, variant: str) -> float:
    """The positive root of x³ + x² = β, which lies in (0, √β]."""
    if is_published(variant):
        q, delta = 2 / 27 - beta, _discriminant(beta)
        if delta < 0:
            return math.nan
        return math.cbrt(-q / 2 + math.sqrt(delta)) + math.cbrt(-q / 2 - math.sqrt(delta)) - 1 / 3
    return float(brentq(lambda x: x**3 + x**2 - beta, 0.0, math.sqrt(beta), xtol=1e-300, rtol=1e-14))
