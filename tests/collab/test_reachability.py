"""Whether others can connect: real peers dial each other back, and what follows from the answer."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hivemind.p2p import PeerID

from collab import reachability
from collab.errors import UserError
from collab.peer import Peer
from collab.reachability import (
    PROBLEMS,
    PROTOCOL,
    Reachability,
    check_reachability,
    serve_dial_back,
    start_or_return,
)
from tests.collab.conftest import LOOPBACK, daemons, ended

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]


@pytest.fixture
def answerer(start_peer) -> Peer:
    """A peer that dials others back."""
    peer = start_peer()
    serve_dial_back(peer)
    return peer


@pytest.fixture
def join(start_peer) -> Iterator[Callable[..., Peer]]:
    """`reachability.start_peer`, with the loopback taken for a network."""
    peers: list[Peer] = []

    def start(**options: Any) -> Peer:
        common = {"host_maddrs": [LOOPBACK], "nat_port_map": False, "startup_timeout": 20.0, "even_on_loopback": True}
        peers.append(reachability.start_peer(**{**common, **options}))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Nothing accepts connections there: they are refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def mute_port() -> Iterator[int]:
    """Connections succeed, and nothing is ever said."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def at(port: int) -> list[str]:
    return [f"/ip4/127.0.0.1/tcp/{port}"]


# ---- the question and its answer ---------------------------------------------------------------------------------


def test_a_peer_that_accepts_connections_is_reachable(start_peer, answerer):
    asker = start_peer(initial_peers=answerer.addresses())
    before = daemons()
    began = time.monotonic()
    found = check_reachability(asker, even_on_loopback=True)
    assert found.verdict == "reachable" and found.asked_peer == answerer.peer_id
    assert [f"{found.address}/p2p/{asker.peer_id}"] == asker.addresses()
    assert time.monotonic() - began < 5, "it would delay every start"
    assert ended([daemon for daemon in daemons() if daemon not in before]), "the daemon that dialed is left behind"


def test_a_closed_port_is_unreachable(start_peer, answerer, closed_port):
    asker = start_peer(initial_peers=answerer.addresses(), announce_maddrs=at(closed_port))
    found = check_reachability(asker, even_on_loopback=True)
    assert found == Reachability("unreachable", PROBLEMS["refused"], at(closed_port)[0], answerer.peer_id)


def test_another_peer_at_the_port_does_not_count(start_peer, answerer):
    """Behind one router two people forward the same port: it leads to one of them only."""
    other = start_peer()
    asker = start_peer(initial_peers=answerer.addresses(), announce_maddrs=[other.addresses()[0].partition("/p2p/")[0]])
    found = check_reachability(asker, even_on_loopback=True)
    assert (found.verdict, found.reason) == ("unreachable", PROBLEMS["stranger"])


def test_one_who_checks_is_busy_and_says_nothing_for_five_seconds_at_most(start_peer, answerer, mute_port):
    slow = start_peer(initial_peers=answerer.addresses(), announce_maddrs=at(mute_port))
    asker = start_peer(initial_peers=answerer.addresses())
    found: list[Reachability] = []
    first = threading.Thread(target=lambda: found.append(check_reachability(slow, even_on_loopback=True)))
    first.start()
    deadline = time.monotonic() + 10
    while len(daemons()) < 4 and time.monotonic() < deadline:  # the answerer has begun to dial
        time.sleep(0.02)
    impatient = check_reachability(asker, timeout=1.5, even_on_loopback=True)
    assert impatient.verdict == "unknown" and "busy" in impatient.reason
    assert check_reachability(asker, even_on_loopback=True).verdict == "reachable", "it asks again"
    first.join(20)
    assert [(each.verdict, each.reason) for each in found] == [("unreachable", PROBLEMS["silence"])]


def test_nobody_can_be_asked(start_peer):
    unable = start_peer()
    asker = start_peer(initial_peers=unable.addresses())
    found = check_reachability(asker, timeout=8.0, even_on_loopback=True)
    assert found.verdict == "unknown" and unable.peer_id[-6:] in found.reason
    assert check_reachability(unable, timeout=8.0, even_on_loopback=True).verdict == "unknown"
    assert "loopback" in check_reachability(asker).reason


def test_the_second_initial_peer_is_asked_if_the_first_one_cannot_tell(start_peer, answerer):
    unable = start_peer(initial_peers=answerer.addresses())
    asker = start_peer(initial_peers=[*unable.addresses(), *answerer.addresses()])
    found = check_reachability(asker, even_on_loopback=True)
    assert (found.verdict, found.asked_peer) == ("reachable", answerer.peer_id)


def test_only_the_asker_itself_is_dialed(start_peer, answerer):
    """Else a stranger could send peers against any computer."""
    asker = start_peer(initial_peers=answerer.addresses())
    with socket.socket() as victim:
        victim.bind(("127.0.0.2", 0))
        victim.listen()
        victim.settimeout(1.0)
        elsewhere = f"/ip4/127.0.0.2/tcp/{victim.getsockname()[1]}"
        requests: list[object] = [[elsewhere], [{"ip4": "127.0.0.2"}], [f"/tcp/1{elsewhere}"], elsewhere, {}, None]
        for request in requests:
            answer = asker.dht.run_coroutine(partial(_ask_raw, peer=answerer.peer_id, request=request))
            assert answer == {"verdict": "unknown"}, request
        with pytest.raises(TimeoutError):
            victim.accept()
    with pytest.raises(OSError):
        asker.dht.run_coroutine(partial(_ask_raw, peer=answerer.peer_id, request=["/tcp/1"] * 1000))


async def _ask_raw(_dht, node, peer, request):
    _, reader, writer = await node.p2p.call_binary_stream_handler(PeerID.from_base58(peer), PROTOCOL)
    try:
        await node.p2p.send_raw_data(json.dumps(request).encode(), writer)
        return json.loads(await asyncio.wait_for(node.p2p.receive_raw_data(reader), 10))
    except asyncio.IncompleteReadError as error:
        raise OSError("no answer") from error
    finally:
        writer.close()


# ---- what follows from it ----------------------------------------------------------------------------------------


def test_who_can_be_reached_stays_a_full_peer_and_helps_the_next_one(join, answerer):
    full = join(initial_peers=answerer.addresses())
    assert not full.client_mode and full.proven_address == full.addresses()[0]
    next_one = join(initial_peers=full.addresses())
    assert next_one.proven_address == next_one.addresses()[0]


def test_who_cannot_be_reached_becomes_a_client_and_is_told_why(join, answerer, closed_port, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"content")
    answerer.serve("ours/file", tmp_path / "file")
    identity = str(tmp_path / "identity.key")
    began = time.monotonic()
    client = join(initial_peers=answerer.addresses(), announce_maddrs=at(closed_port), identity_path=identity)
    assert client.client_mode and time.monotonic() - began < 15
    assert client.fetch(answerer.peer_id, "ours/file") == b"content"
    assert client.peer_id == str(PeerID.from_identity((tmp_path / "identity.key").read_bytes()))
    (message,) = [each.getMessage() for each in caplog.records if each.name == "collab.reachability"]
    assert at(closed_port)[0] in message and answerer.peer_id[-6:] in message and "client mode" in message


def test_what_is_not_known_changes_nothing(join, start_peer, caplog):
    caplog.set_level("INFO", "collab.reachability")
    peer = join(initial_peers=start_peer().addresses())
    assert not peer.client_mode and peer.proven_address is None
    messages = [each.getMessage() for each in caplog.records if each.name == "collab.reachability"]
    assert len(messages) == 1 and "is not known" in messages[0]


def test_an_auxiliary_peer_goes_on_and_is_told(join, answerer, closed_port, caplog):
    auxiliary = join(initial_peers=answerer.addresses(), announce_maddrs=at(closed_port), must_accept=True)
    assert not auxiliary.client_mode and "neither join nor average through it" in caplog.text
    with pytest.raises(UserError, match="--client_mode"):
        join(client_mode=True, must_accept=True)


@pytest.mark.parametrize("client_mode", [True, False])
def test_who_says_what_it_is_does_not_ask(join, answerer, closed_port, client_mode, monkeypatch):
    monkeypatch.setattr(reachability, "check_reachability", lambda *_, **__: pytest.fail("it asked"))
    options = dict(initial_peers=answerer.addresses(), announce_maddrs=at(closed_port))
    assert join(client_mode=client_mode, **options).client_mode is client_mode


@pytest.mark.parametrize("content", [b"", b"\xff\xfe/ip4", b"/ip4/127.0.0.1/tcp/33", b"\0" * 100])
def test_who_this_peer_remembers_may_be_damaged(tmp_path, content):
    (tmp_path / "peers.txt").write_bytes(content)
    with contextlib.closing(start_or_return(tmp_path / "peers.txt", host_maddrs=[LOOPBACK])) as peer:
        assert peer.initial_peers == []
