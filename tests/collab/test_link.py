"""What a link carries: the estimate, what others may claim, and how long silence is waited out."""

import math

import pytest
from hivemind.averaging.load_balancing import load_balance_peers

from collab.link import LEAST, MBIT, MOST, ROUNDS, Link, allreduce_limit, settle_claims, silence_limit


def test_what_the_person_says_comes_first() -> None:
    for given in (0.0, 5.0):
        link = Link(given)
        link.measured = 80.0
        link.after_round(100 * MBIT, 1.0)
        assert link.mbits == given


def test_without_a_measurement_rounds_say_nothing() -> None:
    """Every peer of a round is as slow in it as the slowest one, so each would claim the same."""
    link = Link(None)
    link.after_round(100 * MBIT, 1.0)
    assert link.mbits is None


def test_a_round_can_only_raise_what_was_measured() -> None:
    link = Link(None)
    link.measured = 40.0
    link.after_round(10 * MBIT, 1.0)
    assert link.mbits == 40.0
    link.after_round(180 * MBIT, 2.0)
    assert link.mbits == 90.0


def test_what_a_round_has_shown_is_forgotten_in_time() -> None:
    """A laptop may be carried from the cable to a telephone."""
    link = Link(None)
    link.measured = 40.0
    link.after_round(90 * MBIT, 1.0)
    for _ in range(ROUNDS - 1):
        link.after_round(10 * MBIT, 1.0)
    assert link.mbits == 90.0
    link.after_round(10 * MBIT, 1.0)
    assert link.mbits == 40.0


def test_a_small_round_tells_nothing() -> None:
    link = Link(None)
    link.measured = 1.0
    link.after_round(99_000, 0.001)
    link.after_round(0, 0.0)
    assert link.mbits == 1.0


@pytest.mark.parametrize(("measured", "used"), [(0.0, LEAST), (1e9, MOST)])
def test_a_measurement_that_went_wrong_stays_within_bounds(measured: float, used: float) -> None:
    """0 would mean that this peer averages nothing."""
    link = Link(None)
    link.measured = measured
    assert link.mbits == used


@pytest.mark.parametrize(
    ("claims", "settled"),
    [
        ([None, None], [None, None]),
        ([10.0, None, 30.0, 20], [10.0, 20.0, 30.0, 20.0]),
        ([5.0, None, 6.0, 10_000.0], [5.0, 6.0, 6.0, 10_000.0]),  # the mean would be 3,337
        ([0.0, 10.0, None], [0.0, 10.0, 10.0]),
        ([0.0, 0.0], [None, None]),
        ([0.0, None], [None, None]),
        ([1e30, 10.0], [MOST, 10.0]),
        ([1e-30, 10.0], [LEAST, 10.0]),
        ([math.nan, -3.0, math.inf, "100", True, 10.0], [10.0] * 6),
    ],
)
def test_claims_become_numbers_to_rely_on(claims: list[object], settled: list[float | None]) -> None:
    assert settle_claims(claims) == settled
    assert sum(load_balance_peers(100_000, settle_claims(claims))) == 100_000


def test_work_follows_the_links() -> None:
    slow, *fast = load_balance_peers(100_000, settle_claims([5.0, 100.0, 100.0]))
    assert slow < 1000 and min(fast) > 49_000
    _, least, most = load_balance_peers(1_000_000, settle_claims([MOST, LEAST, MOST]))
    assert least < 1000 and most > 499_000


PART = 2**19


def test_silence_is_short_where_all_links_are_fast() -> None:
    assert silence_limit([100.0] * 10, PART, at_most=15.0) == pytest.approx(5.0 + 3 * 20 * PART * 8e-6 / 100)


@pytest.mark.parametrize("claims", [[100.0, None], [100.0, 0.0], [100.0, math.nan], [100.0, 1.0]])
def test_the_organizers_time_holds_where_a_link_is_slow_or_unknown(claims: list[float | None]) -> None:
    assert silence_limit(claims, PART, at_most=15.0) == 15.0
    assert silence_limit([1000.0] * 2, PART, at_most=1.5) == 1.5


def test_an_all_reduce_may_take_what_the_slowest_link_needs() -> None:
    assert allreduce_limit([100.0, 20.0], 10_000_000, at_most=180.0) == pytest.approx(
        5.0 + 3 * 2 * 10_000_000 * 8e-6 / 20
    )
    assert allreduce_limit([100.0, None], 10_000_000, at_most=180.0) == 180.0
    assert allreduce_limit([100.0, 1.0], 100_000_000, at_most=180.0) == 180.0
