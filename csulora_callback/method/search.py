"""The smallest strength that is strong enough: found by trying, as nobody knows it beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WEAKEST, STRONGEST = 0.01, 1000.0
"""What is searched, beside 0. Below, no preset changes an update by more than some percent; above, by
little more, but for the content-aware one on some models."""

HALVINGS = 6
"""With 0 and the strongest that makes eight trials, and a strength within a factor of 1.2 of the smallest."""


@dataclass(frozen=True)
class Found:
    """What :func:`smallest_strength` found.

    Attributes:
        strength: the smallest of those tried that keeps enough, or where none does the strongest that can be made.
        kept: what it keeps.
        is_enough: whether that is enough.
        tried: what each strength keeps, in the order of the trials.
    """

    strength: float
    kept: float
    is_enough: bool
    tried: dict[float, float]


def smallest_strength(kept: Callable[[float], float], target: float) -> Found:
    """Search for the smallest strength with ``kept(strength) ≥ target``: by bisection, on a logarithmic scale.

    First 0 is tried, then ``STRONGEST``; where the one is not enough and the other is, the bracket between ``WEAKEST``
    and it is halved ``HALVINGS`` times. So what is found is enough, and the strength tried next below it, or 0 where
    that would be ``WEAKEST``, is not, also where ``kept`` does not rise everywhere.

    Args:
        kept: the share that is kept at a strength; NaN, where there is no correction of this strength, is not enough.
        target: the share that is wanted.

    Example:
        >>> found = smallest_strength(lambda strength: strength / (1 + strength), target=0.9)
        >>> 9 <= found.strength < 9 * 1.2, found.is_enough, len(found.tried)
        (True, True, 8)
        >>> smallest_strength(lambda strength: 1.0, target=0.9).strength
        0.0
        >>> smallest_strength(lambda strength: 0.5, target=0.9).is_enough
        False
    """
    tried: dict[float, float] = {}

    def is_enough(strength: float) -> bool:
        tried[strength] = kept(strength)
        return tried[strength] >= target

    if is_enough(0.0):
        return Found(0.0, tried[0.0], True, tried)
    if not is_enough(STRONGEST) and not math.isnan(tried[STRONGEST]):
        return Found(STRONGEST, tried[STRONGEST], False, tried)
    low, high = math.log(WEAKEST), math.log(STRONGEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_weak = not is_enough(math.exp(middle)) and not math.isnan(tried[math.exp(middle)])
        low, high = (middle, high) if too_weak else (low, middle)
    enough = [strength for strength, share in tried.items() if share >= target]
    if enough:
        return Found(min(enough), tried[min(enough)], True, tried)
    strongest = max((strength for strength, share in tried.items() if not math.isnan(share)), default=STRONGEST)
    return Found(strongest, tried[strongest], False, tried)
