"""One holder at a time: taken by the first, given back by a goodbye, taken over when it dies."""

import time
from collections.abc import Callable

import pytest
from hivemind.utils import ValueWithExpiration, get_dht_time

from collab.lease import Lease, claims_in
from collab.peer import Peer

LIFETIME = 2.0


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def test_what_strangers_write_is_no_claim(start_peer: Callable[..., Peer]) -> None:
    later = get_dht_time() + 10
    key = start_peer().signature_key
    for value in (None, "now", [1.0], float("nan"), float("-inf"), True):
        assert not claims_in(ValueWithExpiration({key: ValueWithExpiration(value, later)}, later))
    assert not claims_in(ValueWithExpiration({b"no key": ValueWithExpiration(1.0, later)}, later))
    assert not claims_in(ValueWithExpiration("no records", later)) and not claims_in(None)


@pytest.mark.swarm
def test_one_peer_holds_it_until_it_dies_and_another_takes_over(start_peer: Callable[..., Peer]) -> None:
    first = start_peer()
    second, third = (start_peer(initial_peers=first.addresses()) for _ in range(2))
    leases: list[Lease] = []
    try:
        for peer in (first, second, third):
            leases.append(Lease(peer, "run", "publishing", LIFETIME))
            # The next one is younger, even if it says so first.
            assert wait_for(lambda: all(lease.holder == first.peer_id for lease in leases))
        assert [lease.is_mine for lease in leases] == [True, False, False]

        leases[0]._stopped.set()  # it dies: no goodbye, its record runs out
        assert wait_for(lambda: leases[1].is_mine)
        assert wait_for(lambda: leases[2].holder == second.peer_id)
        assert wait_for(lambda: not leases[0].is_mine)

        began = time.monotonic()
        leases[1].stop()
        assert wait_for(lambda: leases[2].is_mine)
        assert not leases[1].is_mine and time.monotonic() - began < 30
        # Who comes back waits its turn.
        again = Lease(first, "run", "publishing", LIFETIME)
        leases.append(again)
        assert wait_for(lambda: again.holder == third.peer_id) and not again.is_mine
    finally:
        for lease in leases:
            lease.stop()
    assert not any(lease.failures for lease in leases)


@pytest.mark.swarm
def test_a_peer_without_the_dht_holds_nothing(start_peer: Callable[..., Peer]) -> None:
    peer = start_peer()
    lease = Lease(peer, "run", "publishing", LIFETIME)
    try:
        assert wait_for(lambda: lease.is_mine)
        peer.dht.shutdown()
        assert wait_for(lambda: not lease.is_mine)
    finally:
        lease._stopped.set()
