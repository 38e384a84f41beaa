"""The smallest strength that keeps enough, against what all strengths that were tried say, and a closed form."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csulora_callback.method.search import STRONGEST, WEAKEST, smallest_strength


@given(st.floats(WEAKEST, STRONGEST), st.floats(0.05, 0.99))
def test_of_a_rising_share_the_strength_is_within_a_fifth_of_the_exact_one(half, target):
    exact = half * target / (1 - target)  # where s / (s + half) = target
    found = smallest_strength(lambda s: s / (s + half), target)
    assert len(found.tried) <= 8
    if exact > STRONGEST * (1 + 1e-9):
        assert (found.strength, found.is_enough) == (STRONGEST, False)
    elif exact < STRONGEST * (1 - 1e-9):
        assert found.is_enough
        assert max(exact, WEAKEST) * (1 - 1e-9) <= found.strength <= max(exact, WEAKEST) * 1.2


@given(st.lists(st.floats(0, 1) | st.just(math.nan), min_size=8, max_size=8), st.floats(0.01, 1))
def test_whatever_is_measured_the_strength_is_enough_and_the_one_tried_below_it_is_not(shares, target):
    said = iter(shares)
    found = smallest_strength(lambda _: next(said), target)
    assert found.kept is found.tried[found.strength]
    assert found.is_enough == (found.tried[found.strength] >= target)
    below = [s for s in found.tried if s < found.strength]
    if found.is_enough and below:
        assert not found.tried[max(below)] >= target
    if not found.is_enough:  # the strongest that there is a correction of
        assert found.strength == max((s for s in found.tried if not math.isnan(found.tried[s])), default=STRONGEST)


@pytest.mark.parametrize(("always", "strength", "trials"), [(1.0, 0.0, 1), (0.0, STRONGEST, 2)])
def test_what_no_strength_changes_is_seen_at_once(always, strength, trials):
    found = smallest_strength(lambda _: always, 0.9)
    assert (found.strength, len(found.tried)) == (strength, trials)


def test_where_the_strong_ones_cannot_be_made_a_weaker_one_is_found():
    """As where factors would overflow their dtype."""
    most = smallest_strength(lambda strength: math.nan if strength > 20 else strength / (strength + 1), 0.99)
    assert (most.is_enough, 14 < most.strength <= 20) == (False, True)
    enough = smallest_strength(lambda strength: math.nan if strength > 20 else strength / (strength + 1), 0.9)
    assert (enough.is_enough, 9 <= enough.strength < 11) == (True, True)
