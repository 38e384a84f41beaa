"""Wilson's interval against the equation that defines it, published values, and what must hold for any counts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csulora_callback import wilson_interval

COUNTS = st.integers(0, 2000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials)))
CONFIDENCES = st.floats(0.01, 0.999)


def quantile(probability: float) -> float:
    """Of the normal distribution, by bisection of its distribution function."""
    return bisect(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)) - probability, -10.0, 10.0)


def bisect(function, low: float, high: float) -> float:
    """The root of a function that is negative at ``low`` and positive at ``high``."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def by_bisection(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """The two shares at which the score test just rejects."""
    z, share = quantile((1 + confidence) / 2), successes / trials

    def rejected(p: float) -> float:
        return (share - p) ** 2 - z**2 * p * (1 - p) / trials

    return bisect(lambda p: -rejected(p), 0.0, share), bisect(rejected, share, 1.0)


@pytest.mark.parametrize(
    ("successes", "trials", "confidence", "expected"),
    [  # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
        (81, 263, 0.95, (0.2553, 0.3662)),
        (15, 148, 0.95, (0.0624, 0.1605)),
        (0, 20, 0.95, (0.0, 0.1611)),
        (1, 29, 0.95, (0.0061, 0.1718)),
    ],
)
def test_published_values(successes, trials, confidence, expected):
    assert wilson_interval(successes, trials, confidence) == pytest.approx(expected, abs=5e-5)


@given(COUNTS.filter(lambda counts: counts[1] > 0), CONFIDENCES)
def test_the_ends_are_where_the_score_test_rejects(counts, confidence):
    assert wilson_interval(*counts, confidence) == pytest.approx(by_bisection(*counts, confidence), abs=1e-9)


@given(COUNTS, CONFIDENCES)
def test_it_holds_the_share_within_0_and_1_and_mirrors(counts, confidence):
    successes, trials = counts
    lower, upper = wilson_interval(successes, trials, confidence)
    assert 0.0 <= lower < upper <= 1.0
    if trials:
        assert lower <= successes / trials <= upper
    mirrored = wilson_interval(trials - successes, trials, confidence)
    assert mirrored == pytest.approx((1 - upper, 1 - lower), abs=1e-12)


@given(COUNTS, st.floats(0.01, 0.9))
def test_more_confidence_or_fewer_trials_widen_it(counts, confidence):
    def width(successes: int, trials: int, confidence: float) -> float:
        lower, upper = wilson_interval(successes, trials, confidence)
        return upper - lower

    assert width(*counts, confidence + 0.05) >= width(*counts, confidence)
    assert width(2 * counts[0], 2 * counts[1], confidence) <= width(*counts, confidence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2), r"`successes`: expected a whole number from 0 to `trials` \(2\), but got 3"),
        ((-1, 2), "`successes`: .*but got -1"),
        ((0.5, 2), "`successes`: expected a whole number .*but got 0.5"),
        ((0, -1), "`trials`: expected a whole number ≥ 0, but got -1"),
        ((0, 1, 95), "`confidence`: expected a number between 0 and 1 such as 0.95, but got 95"),
        ((0, 1, 1.0), "`confidence`: .*but got 1.0"),
        ((0, 1, math.nan), "`confidence`: .*but got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(*arguments)
