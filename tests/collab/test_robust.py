"""What a minority can do to a figure, whatever it claims."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab.robust import FLOOR, WIDTH, leveled, weighted_mean, winsorized

losses = st.floats(0.0, 20.0)
claims = st.floats(0.0, 1e4)
weights = st.integers(0, 4096)


@st.composite
def honest_and_liars(draw):
    honest = draw(st.lists(st.tuples(losses, weights), min_size=2, max_size=12))
    liars = draw(st.lists(st.tuples(claims, weights), max_size=len(honest) - 1))
    return honest, liars, draw(st.permutations([*honest, *liars]))


@given(honest_and_liars())
def test_a_minority_moves_the_mean_by_a_few_times_the_honest_range_at_most(case):
    honest, _, everybody = case
    values = [loss for loss, _ in honest]
    reach = max(WIDTH * (max(values) - min(values)), WIDTH * FLOOR * max(values)) + 1e-9
    if len(everybody) < 3:
        return
    mean = weighted_mean(winsorized([loss for loss, _ in everybody]), [weight for _, weight in everybody])
    assert math.isnan(mean) or min(values) - reach <= mean <= max(values) + reach


@given(st.lists(st.tuples(st.floats(1.9, 2.1), st.integers(1, 4096)), min_size=1, max_size=30))
def test_honest_peers_that_agree_within_a_tenth_give_nearly_the_plain_mean(peers):
    values, weights = [loss for loss, _ in peers], [float(weight) for _, weight in peers]
    assert weighted_mean(winsorized(values), weights) == pytest.approx(weighted_mean(values, weights), rel=0.05)


def test_one_or_two_stay_as_they_are():
    assert winsorized([3.0]) == [3.0] and winsorized([1.0, 9.0]) == [1.0, 9.0]
    assert winsorized([2.0, 2.1, 1e4])[2] < 2.5


@given(st.lists(st.floats(0, 1e15), max_size=20), st.floats(0, 1e6))
def test_leveling_keeps_the_total_and_the_order_and_takes_from_the_largest_only(values, total):
    result = leveled(values, total)
    assert math.fsum(result) <= max(total, 0.0) * (1 + 1e-9) + 1e-6 or result == values
    assert all(after <= before for before, after in zip(values, result, strict=True))
    lowered = [after for before, after in zip(values, result, strict=True) if after < before]
    assert all(after == max(lowered) for after in lowered)
    if lowered:
        assert max(result) == pytest.approx(max(lowered)) and math.fsum(result) == pytest.approx(total, abs=1e-6)


def test_a_liar_gets_no_more_than_those_who_claim_most_beside_it():
    assert leveled([100.0, 100.0, 1e15], 220.0) == pytest.approx([220 / 3] * 3)
    assert leveled([10.0, 60.0, 1e15], 130.0) == pytest.approx([10.0, 60.0, 60.0])
