"""How sure one can be of a share that was counted."""

from __future__ import annotations

from numbers import Integral
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion.

    All shares ``p`` that a two-sided score test does not reject, that is, the two roots of

        ``(successes/trials − p)² = z² · p(1 − p)/trials``

    with ``z`` the normal quantile of ``(1 + confidence)/2``. Unlike the interval ``share ± z·error`` it lies within
    ``[0, 1]`` and says something where nothing, or everything, was a success.

    Args:
        successes: how often it happened, ``0 ≤ successes ≤ trials``.
        trials: out of how many. Of 0 trials nothing is known: the interval is ``(0, 1)``.
        confidence: how often such intervals cover the true share, between 0 and 1.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: when an argument is outside of its range, or a count is not a whole number.

    Example:
        >>> lower, upper = wilson_interval(3, 60)
        >>> f"{lower:.3f} to {upper:.3f}"
        '0.017 to 0.137'
        >>> wilson_interval(0, 0)
        (0.0, 1.0)
    """
    check_confidence(confidence)
    if not isinstance(trials, Integral) or trials < 0:
        raise ValueError(f"`trials`: expected a whole number ≥ 0, but got {trials!r}.")
    if not isinstance(successes, Integral) or not 0 <= successes <= trials:
        raise ValueError(f"`successes`: expected a whole number from 0 to `trials` ({trials}), but got {successes!r}.")
    if trials == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1.0 + confidence) / 2.0) ** 2
    centre = (successes + z2 / 2.0) / (trials + z2)
    half = (z2 * (successes * (trials - successes) / trials + z2 / 4.0)) ** 0.5 / (trials + z2)
    # At the ends one root is 0 or 1 exactly; rounding would put it beside.
    lower = 0.0 if successes == 0 else centre - half
    upper = 1.0 if successes == trials else centre + half
    return lower, upper


def check_confidence(confidence: float) -> None:
    """Raise ``ValueError`` unless ``confidence`` lies between 0 and 1."""
    if not (isinstance(confidence, (int, float)) and 0.0 < confidence < 1.0):
        raise ValueError(f"`confidence`: expected a number between 0 and 1 such as 0.95, but got {confidence!r}.")
