"""What peers' links carry: how the work of averaging is shared by it, and how long silence means nothing."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

MBIT = 125_000  # bytes
LEAST, MOST = 0.1, 10_000.0
"""Mbit/s. What peers claim beyond that counts as that: a wild claim must not get somebody all of the work."""
TELLING_BYTES = 100_000  # smaller rounds are latency, not bandwidth
ROUNDS = 20
HICCUP_SECONDS = 5.0
SAFETY = 3.0


class Link:
    """Mbit/s of this peer's link, the slower direction.

    What a round brought in, over its seconds, is less than the link can carry: all peers wait for the slowest one. With
    one of three behind 20 Mbit/s and two behind 200, all three saw 15 in rounds with equal shares. Taken for the links,
    that made the shares equal again (median 29.3 s a round; equal 28.0 s; by the true links 24.6 s), and once shares
    differ, whoever does more of the work seems to have the better link. So rounds correct a measurement upwards, and
    are no substitute for one.

    :param given: by the person whose computer it is; then nothing that is measured changes it. 0: others are to do all
      of the averaging. None: it is what was `measured`, or more if rounds have shown more.
    """

    def __init__(self, given: float | None) -> None:
        self.given = given
        self.measured: float | None = None
        self._rounds: deque[float] = deque(maxlen=ROUNDS)

    def after_round(self, payload: int, seconds: float) -> None:
        """Note what an all-reduce has shown.

        :param payload: bytes that it brought in, within so many `seconds`.
        """
        if payload >= TELLING_BYTES and seconds > 0:
            self._rounds.append(payload / MBIT / seconds)

    @property
    def mbits(self) -> float | None:
        """None: not known; the others take it for a usual one."""
        if self.given is not None or self.measured is None:
            return self.given
        return min(MOST, max(LEAST, self.measured, *self._rounds))


def settle_claims(claims: Sequence[object]) -> list[float | None]:
    """What the peers of a group say about their links, such that the sharing of the work can rely on it.

    Upstream takes any number (averaging/load_balancing.py): a negative one, NaN or only zeros fail the round for
    everybody, and a peer without a number gets the mean, which one fast server pulls up a thousandfold.

    :param claims: Mbit/s by peer. 0 does none of the work.
    :returns: the same for all peers; all None, which is equal shares, if nobody has a number above 0.
    """
    numbers = [_number(claim) for claim in claims]
    known = [number for number in numbers if number]
    if not known:
        return [None] * len(numbers)
    usual = statistics.median(known)
    return [usual if number is None else number for number in numbers]


def silence_limit(claims: Sequence[object], part_bytes: int, at_most: float) -> float:
    """Seconds after which a peer that sends nothing during an all-reduce has vanished.

    The slowest link carries, in the worst case, one part for and one from each peer at the same time.

    :param claims: Mbit/s by peer; `at_most` holds if anybody's is not known.
    :param part_bytes: what is sent in one piece.
    """
    return _patience(claims, 2 * len(claims) * part_bytes, at_most)


def allreduce_limit(claims: Sequence[object], total_bytes: int, at_most: float) -> float:
    """Seconds that a whole all-reduce may take.

    The slowest link carries all tensors twice in each direction, in the worst case: this peer's own and the averages,
    and, in its share of the work, those of others. Shares follow the links, so it is less where links differ.

    :param claims: Mbit/s by peer; `at_most` holds if anybody's is not known.
    :param total_bytes: of all tensors, not compressed.
    """
    return _patience(claims, 2 * total_bytes, at_most)


def _patience(claims: Sequence[object], slowest_carries: int, at_most: float) -> float:
    numbers = [_number(claim) for claim in claims]
    if not all(numbers):
        return at_most
    seconds = slowest_carries / MBIT / min(number for number in numbers if number)
    return min(at_most, HICCUP_SECONDS + SAFETY * seconds)


def _number(claim: object) -> float | None:
    if isinstance(claim, bool) or not isinstance(claim, int | float) or not math.isfinite(claim) or claim < 0:
        return None
    return min(MOST, max(LEAST, float(claim))) if claim else 0.0
