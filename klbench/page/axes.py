"""Where things stand on the axes of a figure, and their order: for what draws with matplotlib and for what hands data to scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence


def root(x: float) -> float:
    """sqrt(max(x, 0)): where a figure of x nats stands on the axis."""
    return math.sqrt(max(x, 0.0))


def ticks(top: float, gap: float = 0.2) -> list[float]:
    """0 and round numbers (1, 2, 5 times a power of ten) up to `top`, at least `gap` of the square-root axis apart."""
    if not top > 0:
        return [0.0]
    power = math.floor(math.log10(top))
    chosen: list[float] = []
    last = math.inf
    for digits in (5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        x = digits * 10.0**power
        at = root(x / top)
        if at <= 1.0 and last - at >= gap and at >= gap * 0.8:
            chosen.append(float(f"{x:.6g}"))
            last = at
    return [0.0, *reversed(chosen)]


def keys_of(curve: Sequence[dict[str, float]]) -> list[str]:
    """What a training curve holds beside its step: reward and kl_prior first, the rest by name."""
    found = {key for point in curve for key in point} - {"step"}
    return [*(k for k in ("reward", "kl_prior") if k in found), *sorted(found - {"reward", "kl_prior"})]
