"""Why a peer cannot join: every verdict is provoked by a real server, peer, clock or firewall on the loopback."""

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hivemind.dht.protocol
import pytest
from hivemind.p2p import P2P

from collab.diagnosis import Finding, PeerFinding, clock_finding, diagnose_peers, identity_finding
from collab.errors import UserError
from collab.manifest import Manifest
from collab.peer import Peer
from tests.collab.conftest import LOOPBACK, daemons, ended

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]

SOMEBODY = "QmXk1hoyp6R4eRvDFbXPQqRkpV3dNQJ2RDhsiTWRcytnDa"


@pytest.fixture(autouse=True)
def nothing_is_left(guarded: None) -> Iterator[None]:
    before = daemons()
    yield
    assert ended([daemon for daemon in daemons() if daemon not in before]), "a daemon was left behind"


@pytest.fixture
def start_host(start_peer: Callable[..., Peer], tmp_path: Path) -> Callable[..., Peer]:
    """Starts peers that newcomers can join through: they hand out a manifest."""

    def start(**options) -> Peer:
        peer = start_peer(**options)
        manifest = Manifest.found({"run_id": "ours"}, {}, peer.private_key)
        manifest.serve(peer, manifest.unpack(tmp_path))
        return peer

    return start


def address_of(server: socket.socket | ThreadingHTTPServer, peer_id: str = SOMEBODY) -> str:
    name = server.server_address if isinstance(server, ThreadingHTTPServer) else server.getsockname()
    return f"/ip4/127.0.0.1/tcp/{name[1]}/p2p/{peer_id}"


def diagnosis(address: str, timeout: float = 12.0) -> PeerFinding:
    [finding] = diagnose_peers([address], timeout)
    assert address in finding.message and finding.address == address
    assert (finding.verdict == "ok") == (not finding.advice), "whatever is wrong, there is something to do"
    return finding


def test_a_healthy_peer_answers(start_host) -> None:
    finding = diagnosis(start_host().addresses()[0])
    assert finding.verdict == "ok" and "answers in" in finding.message
    assert finding.round_trip is not None and 0 < finding.round_trip < 5 and finding.clock_ahead == pytest.approx(0)
    assert clock_finding([finding]).verdict == "ok"


def test_nobody_listens_there() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        finding = diagnosis(address_of(bound))
        assert finding.verdict == "failed" and "nobody listens on port" in finding.message
        assert clock_finding([finding]).verdict == "unknown"


def test_a_firewall_drops_every_packet() -> None:
    """The queue of a listening socket is full: the kernel drops what comes, like a firewall."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            queued = stack.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(full.getsockname())
        began = time.monotonic()
        finding = diagnosis(address_of(full), timeout=3.0)
    assert time.monotonic() - began < 5
    assert finding.verdict == "failed" and "127.0.0.1 does not answer within" in finding.message
    assert "firewall" in finding.advice


def test_something_takes_the_connection_and_says_nothing() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        began = time.monotonic()
        finding = diagnosis(address_of(mute), timeout=5.0)
    assert time.monotonic() - began < 8
    assert finding.verdict == "failed" and "does not answer as libp2p does" in finding.message


def test_a_forwarded_port_with_nothing_behind_it() -> None:
    """Docker's proxy and tunnels take a connection before they know whether anybody is there."""

    async def meanwhile() -> PeerFinding:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            return await asyncio.to_thread(diagnosis, address_of(server.sockets[0]))

    finding = asyncio.run(meanwhile())
    assert finding.verdict == "failed" and "closes it at once" in finding.message


def test_an_address_without_a_computer() -> None:
    [finding] = diagnose_peers([f"/p2p/{SOMEBODY}"])
    assert finding.verdict == "unknown" and "names no computer" in finding.message


def test_a_web_server_is_another_program() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        finding = diagnosis(address_of(server))
        server.shutdown()
    assert finding.verdict == "failed" and "does not speak libp2p" in finding.message
    assert "another program" in finding.advice


def test_a_name_that_nobody_has() -> None:
    finding = diagnosis(f"/dns4/nobody.invalid/tcp/31337/p2p/{SOMEBODY}")
    assert finding.verdict == "failed" and "nobody.invalid" in finding.message


def test_a_name_is_as_good_as_a_number(start_host) -> None:
    host = start_host().addresses()[0]
    assert diagnosis(host.replace("/ip4/127.0.0.1", "/dns4/localhost")).verdict == "ok"


def test_another_peer_answers_at_the_address(start_host) -> None:
    where, _, who = start_host().addresses()[0].partition("/p2p/")
    finding = diagnosis(f"{where}/p2p/{SOMEBODY}")
    assert finding.verdict == "failed" and f"another peer ({who}) answers there" in finding.message


def test_a_libp2p_peer_without_a_dht_of_hivemind_is_another_network() -> None:
    async def beside_it() -> PeerFinding:
        """Also: the caller may have an event loop of its own."""
        p2p = await P2P.create(host_maddrs=[LOOPBACK], nat_port_map=False, auto_nat=False)
        try:
            return diagnosis(str((await p2p.get_visible_maddrs())[0]))
        finally:
            await p2p.shutdown()

    finding = asyncio.run(beside_it())
    assert finding.verdict == "failed" and "has no DHT of hivemind" in finding.message


def test_a_swarm_without_a_manifest_is_another_network(start_peer) -> None:
    finding = diagnosis(start_peer().addresses()[0])
    assert finding.verdict == "failed" and "hands out no run manifest" in finding.message
    assert finding.round_trip is not None


@pytest.fixture
def start_untimely(start_host, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Peer]:
    """Starts a host whose clock is so many seconds ahead of this one's."""

    def start(ahead: float) -> Peer:
        with monkeypatch.context() as patch:  # its DHT's process is forked with the clock as it is here
            patch.setattr(hivemind.dht.protocol, "get_dht_time", lambda: time.time() + ahead)
            return start_host()

    return start


def seconds_in(message: str) -> float:
    """What is said is at least so much: the answer's way takes some time, on a busy machine more."""
    found = re.search(r"([\d.]+) seconds", message)
    assert found is not None, message
    return float(found[1])


@pytest.mark.parametrize(("ahead", "words"), [(5.0, "seconds behind"), (-5.0, "seconds ahead of")])
def test_clocks_that_are_too_far_apart(start_untimely, ahead: float, words: str) -> None:
    finding = diagnosis(start_untimely(ahead).addresses()[0])
    clock = clock_finding([finding])
    assert finding.verdict == "failed" and "seconds apart" in finding.message
    assert clock.verdict == "failed" and words in clock.message
    assert seconds_in(finding.message) == seconds_in(clock.message) == pytest.approx(5.0, abs=1.0)
    assert "timedatectl" in finding.advice and "timedatectl" in clock.advice


def test_a_clock_that_is_almost_wrong_is_mentioned(start_untimely) -> None:
    finding = diagnosis(start_untimely(2.0).addresses()[0])
    clock = clock_finding([finding])
    assert finding.verdict == "ok" and clock.verdict == "warning"
    assert seconds_in(clock.message) == pytest.approx(2.0, abs=0.5) and "timedatectl" in clock.advice


def test_if_another_peer_agrees_with_this_clock_the_peer_with_the_wrong_one_is_to_blame(
    start_host, start_untimely
) -> None:
    good, untimely = diagnose_peers([start_host().addresses()[0], start_untimely(100.0).addresses()[0]])
    assert good.verdict == "ok" and clock_finding([good, untimely]).verdict == "ok"
    assert untimely.verdict == "failed", "hivemind refuses to join although the other one is fine"
    assert "leave that address out" in untimely.advice


def test_dead_addresses_beside_a_good_one_are_warnings(start_host) -> None:
    where, _, who = start_host().addresses()[0].partition("/p2p/")
    dead = [f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEBODY}", f"{where}/p2p/{SOMEBODY}", f"/ip4/127.0.0.1/tcp/1/p2p/{who}"]
    findings = diagnose_peers([*dead, f"{where}/p2p/{who}"])
    assert [finding.verdict for finding in findings] == ["warning", "warning", "warning", "ok"]


def test_an_identity_in_use(start_host, tmp_path: Path) -> None:
    path = str(tmp_path / "identity.key")
    host = start_host()
    other = start_host(initial_peers=host.addresses(), identity_path=path)
    taken = identity_finding(path, host.addresses())
    assert taken.verdict == "failed" and path in taken.message and "another running peer" in taken.message
    assert "--identity_path" in taken.advice
    other.close()
    assert identity_finding(path, host.addresses()).verdict == "ok"


# ---- the same words when joining fails ---------------------------------------------------------------------------


def joining_fails(*addresses: str) -> str:
    with pytest.raises(UserError) as caught:
        Peer(host_maddrs=[LOOPBACK], nat_port_map=False, initial_peers=addresses, startup_timeout=20.0)
    return str(caught.value)


def test_a_peer_that_cannot_join_says_of_each_address_what_became_of_it(start_peer) -> None:
    where = start_peer().addresses()[0].partition("/p2p/")[0]
    addresses = [f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEBODY}", f"{where}/p2p/{SOMEBODY}"]
    message = joining_fails(*addresses)
    for finding in diagnose_peers(addresses):
        assert finding.message in message and finding.advice in message
    assert "nobody listens" in message and "another peer" in message and "scripts/doctor.py" in message


def test_a_single_wrong_clock_among_the_peers_is_named(start_host, start_untimely) -> None:
    good, untimely = start_host().addresses()[0], start_untimely(100.0).addresses()[0]
    message = joining_fails(good, untimely)
    assert f"{untimely}: it answers" in message and "seconds apart" in message
    assert "leave that address out" in message and "The clock of this computer" not in message


# ---- words -------------------------------------------------------------------------------------------------------


def test_an_error_is_told_with_its_first_sentence_and_the_rest_is_advice() -> None:
    finding = Finding.of_error("disk", UserError("Cannot write /a.b/c: No space left. Free some. Then start again."))
    assert finding.message == "Cannot write /a.b/c: No space left."
    assert finding.advice == "Free some. Then start again."
    assert Finding.of_error("disk", UserError("It broke")) == Finding("disk", "failed", "It broke")
