"""A peer with a wrong clock is told so, by how much, and how to set it. The other peers' clocks are shifted here."""

import logging
import multiprocessing
import time
from typing import Any

import hivemind.dht.protocol
import pytest

from collab.clock import check_clock, offset_in
from collab.errors import UserError
from collab.peer import Peer
from collab.selftest import self_test
from tests.collab.conftest import LOOPBACK

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]


class Organizer:
    """A peer with a clock that can be set while it runs."""

    def __init__(self, start_peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = ahead = multiprocessing.Value("d", 0.0)
        with monkeypatch.context() as patch:  # its DHT's process is forked with the clock as it is here
            patch.setattr(hivemind.dht.protocol, "get_dht_time", lambda: time.time() + ahead.value)
            self.peer: Peer = start_peer()

    def set_clock(self, ahead: float) -> None:
        self.ahead.value = ahead


@pytest.fixture
def organizer(start_peer, monkeypatch) -> Organizer:
    return Organizer(start_peer, monkeypatch)


def peers_of(peer: Peer) -> list[str]:
    return [address.rpartition("/")[2] for address in peer.initial_peers]


@pytest.mark.parametrize(("ahead", "words"), [(-4.0, "4.0 seconds ahead of"), (100.0, "100.0 seconds behind")])
def test_hivemind_refuses_to_join_and_the_reason_is_told(organizer, ahead: float, words: str) -> None:
    organizer.set_clock(ahead)
    with pytest.raises(UserError) as caught:
        Peer(host_maddrs=[LOOPBACK], nat_port_map=False, initial_peers=organizer.peer.addresses())
    assert words in str(caught.value) and "timedatectl" in str(caught.value) and "sntp" in str(caught.value)
    assert "could not be joined" not in str(caught.value)


def test_the_self_test_refuses_warns_or_says_nothing(organizer, start_peer, caplog) -> None:
    for client_mode in (False, True):
        peer = start_peer(initial_peers=organizer.peer.addresses(), client_mode=client_mode)
        for ahead in (-3.5, 3.5):
            organizer.set_clock(ahead)
            with pytest.raises(UserError, match=f"3.[45] seconds {'behind' if ahead > 0 else 'ahead of'} its peers'"):
                self_test(["none"], peer)
        assert not caplog.records
        organizer.set_clock(2.0)
        self_test(["none"], peer)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "seconds behind its peers'" in caplog.text and "timedatectl" in caplog.text
        caplog.clear()
        organizer.set_clock(0.5)
        self_test(["none"], peer)
        organizer.set_clock(0.0)
        assert not caplog.records


def test_most_of_the_peers_decide(organizer, start_peer, caplog) -> None:
    first = organizer.peer
    others = [start_peer(initial_peers=first.addresses()) for _ in range(2)]
    peer = start_peer(initial_peers=[address for each in (first, *others) for address in each.addresses()])
    organizer.set_clock(1000.0)
    check_clock(peer.dht, peers_of(peer))
    assert not caplog.records


def test_without_an_answer_nothing_is_known(organizer, start_peer, caplog, capfd) -> None:
    peer = start_peer(initial_peers=organizer.peer.addresses())
    organizer.set_clock(1000.0)
    organizer.peer.close()
    with caplog.at_level(logging.WARNING):
        check_clock(peer.dht, peers_of(peer))
        check_clock(peer.dht, [])
    assert not caplog.records and "Traceback" not in capfd.readouterr().err


def test_other_refusals_are_not_about_the_clock() -> None:
    assert offset_in("none of the initial_peers responded to a ping") is None
    told = "local time must be within 3 seconds  of others(local: 1700000005.50000, peer: 1700000000.00000)"
    assert offset_in(told) == 5.5
