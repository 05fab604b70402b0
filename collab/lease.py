"""Which of several peers does what only one at a time should do, such as publishing."""

import contextlib
import logging
import math
import time

from hivemind.utils import MPFuture, ValueWithExpiration, get_dht_time

from collab.background import Background
from collab.peer import Peer, signed_entries

logger = logging.getLogger(__name__)

LIFETIME = 30.0
LOOKS_PER_LIFETIME = 4
LOOK_SECONDS = 10.0


class Lease(Background):
    """Says whether this peer holds the lease of a duty, in the background until `stop`.

    Everybody who can do it says in the DHT, signed, since when; who has said so for longest holds the lease. If it
    dies, its record ends after `lifetime` seconds and the next one takes over, at once if it says goodbye. A peer that
    has lost the DHT holds nothing. While the DHT falls apart two peers can hold it, and a liar can for ever: what it
    guards has to be harmless if it is done twice, and somebody else has to do it if it is not done.

    :param duty: what it is for: peers with the same one and the same `swarm_id` take turns.
    :param lifetime: seconds for which a record counts; a dead holder is replaced within 1.25 times as long.
    """

    def __init__(self, peer: Peer, swarm_id: str, duty: str, lifetime: float = LIFETIME) -> None:
        super().__init__(f"Holding the lease for {duty}", lifetime / LOOKS_PER_LIFETIME)
        self.holder: str | None = None
        """The peer id of who holds it, as far as this peer knows."""
        self._peer, self._lifetime = peer, lifetime
        self._key = f"{swarm_id}_{duty}"
        self._since = get_dht_time()
        self._looked = -math.inf
        self.start()

    @property
    def is_mine(self) -> bool:
        """Whether this peer holds it now."""
        return self.holder == self._peer.peer_id and time.monotonic() - self._looked < self._lifetime

    def stop(self, timeout: float = 1.0) -> None:
        """Give it back: the next one takes over when it looks. Takes twice `timeout` seconds at most."""
        super().stop(timeout)
        self.holder = None
        with contextlib.suppress(TimeoutError):
            self._publish(None).result(timeout)

    def _take_a_turn(self) -> None:
        self._publish(self._since).result(LOOK_SECONDS)
        claims = claims_in(self._peer.dht.get(self._key, latest=True, return_future=True).result(LOOK_SECONDS))
        self.holder = min(claims, key=lambda peer: (claims[peer], peer), default=None)
        self._looked = time.monotonic()

    def _publish(self, since: float | None) -> MPFuture:
        return self._peer.publish(self._key, since, self._lifetime)


def claims_in(answer: ValueWithExpiration | None) -> dict[str, float]:
    """Since when each peer is ready, by peer id; those that have said goodbye are left out."""
    said = signed_entries(answer)
    return {peer: since for peer, since in said.items() if isinstance(since, float) and math.isfinite(since)}
