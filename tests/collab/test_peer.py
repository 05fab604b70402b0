"""A computer's place in the swarm: identity, addresses, files from hand to hand, signed records, clear refusals."""

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
from functools import partial
from typing import Any

import pytest
from hivemind import DHT
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time

import collab.peer
from collab.errors import UserError
from collab.lookout import addresses_in
from collab.manifest import PROTOCOL, Manifest, fetch_manifest, join_command
from collab.metrics import (
    AuxRecord,
    OneForEachPeer,
    PeerRecord,
    announce_saved,
    ask_for_auxiliaries,
    auxiliaries_in,
    publish_auxiliary,
    publish_record,
    read_records,
    run_validators,
    wait_until_saved,
)
from collab.peer import HEADER_BYTES, Peer, _visible_addresses, peer_id_in, peer_id_of_key
from collab.processes import StopSignal
from tests.collab.conftest import LOOPBACK, daemons, ended

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]

SOMEBODY = "QmXk1hoyp6R4eRvDFbXPQqRkpV3dNQJ2RDhsiTWRcytnDa"
ANYBODY = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def refusal(action, *args, **options) -> str:
    """The message for the person; and nothing may run on after it."""
    with pytest.raises(UserError) as caught:
        action(*args, **options)
    assert ended(daemons()), "a daemon was left behind"
    return str(caught.value)


@pytest.fixture
def pair(start_peer):
    """Two peers that know each other; both check records of the run `ours`."""
    first = start_peer()
    second = start_peer(initial_peers=first.addresses())
    for peer in (first, second):
        peer.dht.add_validators(run_validators("ours", "ours_1", 30.0))
    return first, second


def wait_for(condition, seconds: float = 10.0):
    """What `condition` gives, as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


# ---- identity and addresses --------------------------------------------------------------------------------------


def test_an_identity_is_made_and_kept(start_peer, tmp_path):
    path = tmp_path / "new" / "identity.key"
    first = start_peer(identity_path=str(path))
    assert path.exists() and path.stat().st_mode & 0o077 == 0, "nobody else may read a private key"
    content = path.read_bytes()
    first.close()
    second = start_peer(identity_path=str(path))
    assert second.peer_id == first.peer_id and second.signature_key == first.signature_key
    assert path.read_bytes() == content


def test_without_a_file_every_session_is_somebody_else(start_peer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = start_peer(), start_peer()
    assert first.peer_id != second.peer_id
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_the_join_command_leads_back_to_this_peer(start_peer):
    peer = start_peer()
    words = join_command(peer, run_of(peer)).split()
    assert words[:3] == ["python", "run_trainer.py", "--initial_peers"] and words[3:] == peer.addresses()
    assert all(address.startswith("/ip4/127.0.0.1/tcp/") for address in words[3:])
    assert peer_id_in(words[3]) == peer.peer_id
    other = start_peer(initial_peers=words[3:])
    assert other.initial_peers == words[3:]


def test_the_first_address_is_the_one_that_works_from_outside(start_peer, monkeypatch):
    monkeypatch.setattr("collab.peer.own_ips", lambda: {"127.0.0.1", "192.168.1.5"})
    inside, public = "/ip4/192.168.1.5/tcp/31337", "/ip4/93.184.216.34/tcp/31337"
    peer = start_peer(announce_maddrs=[inside, public])
    assert peer.addresses() == [f"{each}/p2p/{peer.peer_id}" for each in (public, inside)]
    own = start_peer(announce_maddrs=[inside])
    own.proven_address = f"{public}/p2p/{own.peer_id}"
    assert own.addresses() == [f"{each}/p2p/{own.peer_id}" for each in (public, inside)]


def test_an_address_through_a_relay_names_the_peer_behind_it():
    address = f"/ip4/93.184.216.34/tcp/31337/p2p/{SOMEBODY}/p2p-circuit/p2p/{ANYBODY}"
    assert peer_id_in(address) == ANYBODY


def test_options_of_the_network_reach_the_daemon(start_peer):
    relay = start_peer().addresses()
    before = daemons()
    start_peer(use_auto_relay=True, trusted_relays=relay)
    (daemon,) = [each for each in daemons() if each not in before]
    assert {"-relay=1", "-autoRelay=1", f"-trustedRelays={relay[0]}"} <= set(daemon.cmdline())
    start_peer(use_relay=False)
    assert sum("-relay=0" in each.cmdline() for each in daemons()) == 1


def test_ipfs_is_asked_for_peers_by_their_ids(monkeypatch, start_peer):
    """The network itself is not here; what is asked of hivemind is, and what it says then."""
    asked = {}

    class Offline:
        def __init__(self, **options):
            asked.update(options)

        def run_in_background(self, **_):
            raise RuntimeError("Daemon failed to start: failed to connect to bootstrap peers")

        def join(self, timeout):
            pass

        def is_alive(self):
            return False

    monkeypatch.setattr("collab.peer.DHT", Offline)
    with pytest.raises(UserError, match="IPFS' public network"):
        start_peer(use_ipfs=True, initial_peers=[f"/p2p/{SOMEBODY}"])
    assert asked["use_ipfs"] is True and asked["initial_peers"] == [f"/p2p/{SOMEBODY}"]
    place = f"/ip4/93.184.216.34/tcp/31337/p2p/{SOMEBODY}"
    with pytest.raises(UserError, match=f"--initial_peers /p2p/{SOMEBODY}"):
        start_peer(use_ipfs=True, initial_peers=[place])
    with pytest.raises(UserError, match="--use_ipfs true"):
        start_peer(initial_peers=[f"/p2p/{SOMEBODY}"])


def test_the_garbage_collector_does_not_end_a_question_to_the_daemon(start_peer, monkeypatch):
    """Nothing but the question itself refers to a task that waits for p2pd's answer; stock hivemind's are lost."""
    monkeypatch.setattr(collab.peer, "DAEMON_SECONDS", 600.0)  # a loaded machine collects slowly
    peer = start_peer()
    (daemon,) = daemons()
    daemon.suspend()
    try:
        answer = peer.dht.run_coroutine(_visible_addresses, return_future=True)
        peer.dht.run_coroutine(_collect_garbage)
        assert not answer.done()
    finally:
        daemon.resume()
    assert [str(address) for address in answer.result(10)] == peer.addresses()


async def _collect_garbage(_dht, _node):
    for _ in range(20):  # turns of the event loop: more than it takes to put the question
        gc.collect()
        await asyncio.sleep(0)


def test_the_signature_key_belongs_to_the_peer_id(start_peer, tmp_path):
    path = tmp_path / "identity.key"
    peer = start_peer(identity_path=str(path))
    assert peer_id_of_key(peer.signature_key) == peer.peer_id == str(PeerID.from_identity(path.read_bytes()))
    for other in (b"", b"[owner:ssh-rsa AAAA]", b"[owner:ssh-dss AAAA]", b"x" + peer.signature_key):
        with pytest.raises(ValueError):
            peer_id_of_key(other)


# ---- files from hand to hand -------------------------------------------------------------------------------------


def test_a_file_of_some_megabytes_goes_from_peer_to_peer(pair, tmp_path):
    content = os.urandom(3 * 10**6)
    (tmp_path / "file").write_bytes(content)
    first, second = pair
    first.serve("ours/file", tmp_path / "file")
    assert second.fetch(first.peer_id, "ours/file") == content
    (tmp_path / "file").write_bytes(b"")
    assert second.fetch(first.peer_id, "ours/file") == b"", "it is read anew each time"


def test_a_file_that_is_not_there_yet_is_no_answer_and_no_harm(pair, tmp_path):
    first, second = pair
    first.serve("ours/file", tmp_path / "file")
    with pytest.raises(OSError):
        second.fetch(first.peer_id, "ours/file", timeout=5.0)
    (tmp_path / "file").write_bytes(b"content")
    assert second.fetch(first.peer_id, "ours/file") == b"content"


def test_a_peer_in_client_mode_can_fetch(start_peer, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    first = start_peer()
    first.serve("ours/file", tmp_path / "file")
    client = start_peer(initial_peers=first.addresses(), client_mode=True)
    assert client.client_mode and client.fetch(first.peer_id, "ours/file") == b"content"


def test_what_nobody_serves_is_an_os_error(pair):
    first, second = pair
    began = time.monotonic()
    with pytest.raises(OSError):
        second.fetch(first.peer_id, "ours/nothing", timeout=8.0)
    assert time.monotonic() - began < 15


def test_a_file_that_went_away_is_an_os_error(pair, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    first, second = pair
    first.serve("ours/file", tmp_path / "file")
    (tmp_path / "file").unlink()
    with pytest.raises(OSError):
        second.fetch(first.peer_id, "ours/file", timeout=8.0)
    (tmp_path / "file").write_bytes(b"again")
    assert second.fetch(first.peer_id, "ours/file") == b"again", "one failure ends nothing"


def test_a_peer_that_went_away_is_an_os_error_in_time(pair, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    first, second = pair
    first.serve("ours/file", tmp_path / "file")
    first.close()
    began = time.monotonic()
    with pytest.raises(OSError):
        second.fetch(first.peer_id, "ours/file", timeout=3.0)
    assert time.monotonic() - began < 8 + 1


async def _serve_slowly(_dht: DHT, node: DHTNode, name: str, parts: int, announced: int) -> None:
    async def handler(_info: object, _reader: object, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            writer.write(announced.to_bytes(HEADER_BYTES, "big"))
            for _ in range(parts):
                await asyncio.sleep(0.4)
                writer.write(b"part")
                await writer.drain()
            await asyncio.sleep(30 if 4 * parts < announced else 0)

    await node.p2p.add_binary_stream_handler(name, handler)


def test_a_slow_link_is_waited_for_and_a_silent_peer_is_not(pair):
    first, second = pair
    first.dht.run_coroutine(partial(_serve_slowly, name="ours/slow", parts=10, announced=40))
    first.dht.run_coroutine(partial(_serve_slowly, name="ours/silent", parts=1, announced=40))
    assert second.fetch(first.peer_id, "ours/slow", timeout=60.0, patience=3.0) == 10 * b"part"
    with pytest.raises(OSError, match="no answer within 3 seconds"):
        second.fetch(first.peer_id, "ours/silent", timeout=60.0, patience=3.0)


# ---- looking for lost peers --------------------------------------------------------------------------------------


def test_two_swarms_become_one_when_a_single_peer_dials_across(start_peer):
    ours, theirs = start_peer(), start_peer()
    friends = [start_peer(initial_peers=ours.addresses()), start_peer(initial_peers=theirs.addresses())]
    theirs.dht.store("greeting", value="hello", expiration_time=get_dht_time() + 60)
    assert ours.dht.get("greeting", latest=True) is None, "they are apart"
    assert ours.rejoin({theirs.peer_id: theirs.addresses()}) == {theirs.peer_id}
    for peer in (ours, *friends):
        assert wait_for(lambda: peer.dht.get("greeting", latest=True))  # noqa: B023
    friends[0].dht.store("answer", value="hello too", expiration_time=get_dht_time() + 60)
    assert wait_for(lambda: friends[1].dht.get("answer", latest=True))


def test_only_those_that_answer_are_counted_and_the_others_cost_no_more_than_the_timeout(pair):
    first, second = pair
    gone = {SOMEBODY: [f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEBODY}"], str(PeerID(bytes([0x12, 32]) + bytes(32))): []}
    began = time.monotonic()
    assert second.rejoin({first.peer_id: first.addresses(), **gone}, timeout=6.0) == {first.peer_id}
    assert second.rejoin({}) == set()
    assert time.monotonic() - began < 12
    with socket.socket() as mute:  # a firewall, or a port that belongs to something else
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{SOMEBODY}"
        began = time.monotonic()
        assert second.rejoin({SOMEBODY: [address]}, timeout=3.0) == set()
        assert time.monotonic() - began < 6
    assert second.rejoin({first.peer_id: []}) == {first.peer_id}, "connected is connected, without any address"


# ---- the manifest over the wire ----------------------------------------------------------------------------------


def run_of(organizer: Peer, **settings) -> Manifest:
    return Manifest.found({"run_id": "ours", **settings}, {"spiece.model": b"\x00\xff"}, organizer.private_key)


def test_a_volunteer_fetches_the_manifest(pair, tmp_path):
    first, second = pair
    sent = Manifest.found({"run_id": "ours"}, {"spiece.model": os.urandom(10**6)}, first.private_key)
    sent.serve(first, sent.unpack(tmp_path / "first"))
    assert fetch_manifest(second, tmp_path / "second") == sent
    assert join_command(first, sent).endswith(first.peer_id)


def test_the_manifest_of_the_next_address_is_taken_if_the_first_has_none(start_peer, tmp_path):
    without = start_peer()
    holder = start_peer(initial_peers=without.addresses())
    sent = run_of(holder)
    sent.serve(holder, sent.unpack(tmp_path / "holder"))
    newcomer = start_peer(initial_peers=[*without.addresses(), *holder.addresses()])
    assert fetch_manifest(newcomer, tmp_path, timeout=5.0) == sent


def test_addresses_of_different_runs_are_refused_by_name(start_peer, tmp_path):
    hosts = [start_peer(), start_peer()]
    sent = [run_of(host, seed=seed) for host, seed in zip(hosts, (1, 2), strict=True)]
    for host, manifest in zip(hosts, sent, strict=True):
        manifest.serve(host, manifest.unpack(tmp_path / "hosts"))
    addresses = [address for host in hosts for address in host.addresses()]
    with pytest.raises(UserError) as caught:
        fetch_manifest(start_peer(initial_peers=addresses), tmp_path)
    message = str(caught.value)
    for address, manifest in zip(addresses, sent, strict=True):
        assert address in message and manifest.fingerprint[:12] in message
    assert "They differ in organizer, seed." in message and "spiece.model" not in message


def test_of_several_addresses_of_one_run_the_newest_manifest_counts(start_peer, tmp_path):
    hosts = [start_peer(), start_peer()]
    old = run_of(hosts[0], seed=1)
    new = old.changed(10, {"seed": 2}, hosts[0].private_key)
    for number, manifest in enumerate((old, new)):
        manifest.serve(hosts[number], manifest.unpack(tmp_path / str(number)))
    newcomer = start_peer(initial_peers=[address for host in hosts for address in host.addresses()])
    assert fetch_manifest(newcomer, tmp_path) == new
    new.unpack(tmp_path)
    late = start_peer(initial_peers=hosts[0].addresses())
    assert fetch_manifest(late, tmp_path) == new, "what this computer knows is newer than what is handed out"


def test_a_run_whose_organizer_nobody_vouches_for_is_refused(pair, start_peer, tmp_path):
    """Any peer hands the manifest on, and a stranger could hand out one of his own making."""
    first, second = pair
    organizer = start_peer()
    sent = run_of(organizer)
    sent.serve(first, sent.unpack(tmp_path / "first"))
    with pytest.raises(UserError) as caught:
        fetch_manifest(second, tmp_path)
    assert f"--organizer {sent.organizer}" in str(caught.value) and first.addresses()[0] in str(caught.value)
    assert join_command(first, sent).endswith(f"{first.peer_id} --organizer {organizer.peer_id}")
    assert fetch_manifest(second, tmp_path, organizer=organizer.peer_id) == sent
    sent.unpack(tmp_path)
    assert fetch_manifest(second, tmp_path) == sent, "it has taken part before"


@pytest.mark.parametrize("content", [None, b"", b"no manifest"])
def test_a_peer_that_hands_out_no_manifest_is_named(pair, tmp_path, content):
    first, second = pair
    if content is not None:
        (tmp_path / "file").write_bytes(content)
        first.serve(PROTOCOL, tmp_path / "file")
    with pytest.raises(UserError) as caught:
        fetch_manifest(second, tmp_path, timeout=5.0)
    assert first.addresses()[0] in str(caught.value) and "manifest" in str(caught.value)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "address"),
    [
        ("initial_peers", "hello"),
        ("initial_peers", ""),
        ("initial_peers", "203.0.113.7:31337"),
        ("initial_peers", "/ip4/203.0.113.7/tcp/31337"),
        ("initial_peers", f"/ip4/203.0.113.777/tcp/31337/p2p/{SOMEBODY}"),
        ("initial_peers", "/ip4/203.0.113.7/tcp/31337/p2p/QmNobody"),
        ("trusted_relays", "/ip4/203.0.113.7/tcp/31337"),
        ("host_maddrs", "/ip4/0.0.0.0/tcp/99999"),
        ("host_maddrs", "0.0.0.0"),
        ("announce_maddrs", "/ip4/example.org/tcp/1"),
    ],
)
def test_a_malformed_address_is_refused_before_anything_starts(option, address):
    before = daemons()
    began = time.monotonic()
    message = refusal(Peer, **{"host_maddrs": [LOOPBACK], option: [address]})
    assert repr(address) in message and "/ip4/203.0.113.7/tcp/31337" in message
    assert time.monotonic() - began < 1 and daemons() == before


@pytest.mark.parametrize("listening", [True, False])
def test_a_port_in_use_is_refused(listening):
    """Bound is enough: libp2p would share a port that another program has asked for."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listening:
            taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        message = refusal(Peer, host_maddrs=[address])
        assert address in message and "--host_maddrs" in message


def test_the_port_of_another_peer_is_refused(start_peer):
    """libp2p listens with SO_REUSEPORT: it would take half of the other's connections."""
    first = start_peer()
    address = first.addresses()[0].partition("/p2p/")[0]
    with pytest.raises(UserError, match="Another program uses that port"):
        Peer(host_maddrs=[address], nat_port_map=False)


def test_a_port_is_free_again_after_a_restart(start_peer):
    """Connections that are still closing (TIME_WAIT) do not keep the organizer from starting again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}"
    first = start_peer(host_maddrs=[address])
    second = start_peer(initial_peers=first.addresses())
    first.close()
    again = start_peer(host_maddrs=[address], initial_peers=second.addresses())
    assert again.addresses()[0].startswith(address)


def test_an_address_of_another_computer_is_refused(guarded):
    address = "/ip4/203.0.113.7/tcp/31337"
    assert address in refusal(Peer, host_maddrs=[address], nat_port_map=False)


def test_peers_that_do_not_answer_are_listed(guarded):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        dead = [f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{SOMEBODY}"]
        began = time.monotonic()
        message = refusal(Peer, host_maddrs=[LOOPBACK], nat_port_map=False, initial_peers=dead, startup_timeout=20.0)
    assert time.monotonic() - began < 20
    assert dead[0] in message and "nobody listens" in message


def test_a_peer_that_accepts_but_says_nothing_is_listed(guarded):
    """A firewall, or a port that belongs to something else."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        dead = [f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{SOMEBODY}"]
        began = time.monotonic()
        message = refusal(Peer, host_maddrs=[LOOPBACK], nat_port_map=False, initial_peers=dead, startup_timeout=4.0)
    assert time.monotonic() - began < 4 + 15 + 5 and dead[0] in message and "does not answer as libp2p does" in message


def test_another_peer_at_the_address_is_refused(start_peer):
    """The peer id in the address is what a volunteer trusts."""
    host, _, _ = start_peer().addresses()[0].partition("/p2p/")
    with pytest.raises(UserError, match=SOMEBODY):
        Peer(host_maddrs=[LOOPBACK], nat_port_map=False, initial_peers=[f"{host}/p2p/{SOMEBODY}"], startup_timeout=5.0)


def test_one_dead_address_of_two_does_no_harm(start_peer):
    first = start_peer()
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEBODY}"
    second = start_peer(initial_peers=[dead, *first.addresses()])
    assert second.dht.is_alive()


def test_an_identity_that_another_running_peer_uses_is_refused(start_peer, tmp_path):
    path = str(tmp_path / "identity.key")
    first = start_peer()
    start_peer(initial_peers=first.addresses(), identity_path=path)
    with pytest.raises(UserError) as caught:
        start_peer(initial_peers=first.addresses(), identity_path=path)
    assert path in str(caught.value) and "another running peer" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----", os.urandom(100)])
def test_a_file_that_is_no_identity_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    message = refusal(Peer, host_maddrs=[LOOPBACK], identity_path=str(path))
    assert str(path) in message and "--identity_path" in message
    assert path.read_bytes() == content


def test_a_place_where_no_identity_can_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "identity.key")
    assert path in refusal(Peer, host_maddrs=[LOOPBACK], identity_path=path)


# ---- signed records ----------------------------------------------------------------------------------------------


def record(peer: Peer, **changes) -> PeerRecord:
    given = dict(
        name="a volunteer", peer_id=peer.peer_id, version="0.1.0", step=1, loss=2.0, samples=10, samples_total=10,
        samples_per_second=5.0, peers_met=2, peers_expected=2, applied=True, skipped_batches=0, parts=1.0,
        bytes_sent=10, bytes_received=10, matchmaking_seconds=1.0, allreduce_seconds=0.5, grad_norm=1.0,
        sketch=[0.5] * 16, client_mode=False, data_wait=0.0, compute_share=1.0, averaging_wait=0.0,
        tokens_per_second=500.0, mfu=0.0, memory=10**9, time=1.7e9, reported=1.7e9, device="cpu, 2 threads", tokens=500,
        round_samples=20.0,
    )  # fmt: skip
    return PeerRecord(**{**given, **changes})


def stored(peer: Peer) -> dict:
    """What the DHT of `peer` gives, before any check of ours: {subkey: record}."""
    answer = peer.dht.get("ours_metrics", latest=True)
    return {subkey: entry.value for subkey, entry in answer.value.items()} if answer else {}


def store_raw(peer: Peer, value, subkey: bytes | None = None) -> None:
    """Store what `publish_record` would never send."""
    peer.dht.store(
        "ours_metrics", subkey=subkey or peer.signature_key, value=value, expiration_time=get_dht_time() + 60
    )


def test_records_reach_every_peer_and_the_latest_counts(pair):
    first, second = pair
    publish_record(first, "ours", record(first), lifetime=60)
    publish_record(second, "ours", record(second, name="another"), lifetime=60)
    for reader in pair:
        assert wait_for(lambda: len(read_records(reader, "ours")) == 2)  # noqa: B023
        assert {each.name for each in read_records(reader, "ours")} == {"a volunteer", "another"}
    publish_record(first, "ours", record(first, step=2), lifetime=61)
    assert wait_for(lambda: sorted(each.step for each in read_records(second, "ours")) == [1, 2])


def test_nobody_has_reported_at_first(pair):
    assert read_records(pair[0], "ours") == [] == read_records(pair[1], "ours")


def test_a_record_expires(pair):
    first, second = pair
    publish_record(first, "ours", record(first), lifetime=2)
    assert wait_for(lambda: read_records(second, "ours"))
    assert wait_for(lambda: not read_records(second, "ours"))


BAD: list[dict[str, Any]] = [
    {"loss": -1.0},
    {"loss": float("nan")},
    {"loss": float("inf")},
    {"loss": "2.0"},
    {"name": "x" * 41},
    {"name": 7},
    {"reason": "x" * 10_000},
    {"step": -1},
    {"step": 1.5},
    {"samples": 10**18},
    {"peers_met": 0},
    {"applied": 1},
    {"time": None},
    {"device": "x" * 61},
    {"left": 0},
    {"reported": float("inf")},
]


def test_a_record_that_breaks_the_schema_is_not_accepted(pair, start_peer):
    """A peer with changed code checks nothing of its own; the others do."""
    first, second = pair
    for changes in BAD:
        liar = start_peer(initial_peers=first.addresses())
        store_raw(liar, record(liar).dict() | changes)
        assert all(liar.signature_key not in stored(reader) for reader in pair), changes
        liar.close()
    liar = start_peer(initial_peers=first.addresses())
    store_raw(liar, {"name": "a volunteer"})
    store_raw(liar, "no record at all", subkey=b"x" + liar.signature_key)
    store_raw(liar, record(liar).dict(), subkey=b"without a key")
    publish_record(second, "ours", record(second), lifetime=60)
    for reader in pair:
        assert wait_for(lambda: set(stored(reader)) == {second.signature_key})  # noqa: B023


async def _store_much(_dht, node, key, subkey, value, characters):
    """In the DHT's process, because its pipe takes no more than 64 KiB."""
    return await node.store(key, value | {"name": "x" * characters}, get_dht_time() + 60, subkey=subkey)


@pytest.mark.parametrize("characters", [10_000, 1_000_000, 10_000_000])
def test_a_long_text_is_stored_nowhere_and_parsed_by_nobody(pair, start_peer, characters):
    first, second = pair
    liar = start_peer(initial_peers=first.addresses())
    work = partial(
        _store_much, key="ours_metrics", subkey=liar.signature_key, value=record(liar).dict(), characters=characters
    )
    try:
        liar.dht.run_coroutine(work, return_future=True).result(60)
    except Exception as error:
        print(error)
    publish_record(second, "ours", record(second), lifetime=60)
    for reader in pair:
        assert wait_for(lambda: set(stored(reader)) == {second.signature_key})  # noqa: B023
    assert not OneForEachPeer(["ours_metrics"], 100, 60.0).validate(
        DHTRecord(DHTID.generate(source="ours_metrics").to_bytes(), b"", b"\xc1" * 101, 0.0)
    ), "more than is needed would be parsed"


def test_nobody_speaks_for_longer_than_a_word_counts(pair, start_peer):
    """As one does whose clock is an hour ahead: others would go by its last word long after it has gone."""
    first, second = pair
    untimely = start_peer(initial_peers=first.addresses())
    assert not untimely.dht.run_coroutine(
        partial(_store_until, key="ours_1_progress", subkey=untimely.signature_key, seconds=3600)
    )
    second.publish("ours_1_progress", "honest", 60).result(15)
    for reader in pair:
        answer = reader.dht.get("ours_1_progress", latest=True)
        assert set(answer.value) == {second.signature_key}


async def _store_until(_dht, node, key, subkey, seconds):
    return await node.store(key, "untimely", get_dht_time() + seconds, subkey=subkey, exclude_self=True)


@pytest.mark.parametrize("value", [None, {b"a": 1}], ids=str)
def test_nobody_takes_away_the_records_of_all(pair, start_peer, value):
    """hivemind lets one value with a late expiration stand in their place, and nobody puts a record there again."""
    first, second = pair
    key = "ours_1_addresses"
    first.publish(key, first.addresses(), 60).result(15)
    liar = start_peer(initial_peers=first.addresses())
    lie = partial(_store_in_place_of_all, key=key, value=value)
    assert not liar.dht.run_coroutine(lie, return_future=True).result(30)
    second.publish(key, second.addresses(), 60).result(15)
    for reader in pair:
        everybody = {first.peer_id, second.peer_id}
        assert wait_for(lambda: addresses_in(reader.dht.get(key, latest=True)).keys() == everybody)  # noqa: B023


async def _store_in_place_of_all(_dht: DHT, node: DHTNode, key: str, value: object) -> bool:
    return await node.store(key, value, get_dht_time() + 10**6, exclude_self=True)


def test_an_auxiliary_peer_is_known_by_its_own_record(pair):
    first, second = pair
    about = AuxRecord(name="aux", peer_id=first.peer_id, version="1", rounds=2, saved_step=7, reported=1.0)
    publish_auxiliary(first, "ours", about, lifetime=60).result(15)
    publish_auxiliary(second, "ours", about, lifetime=60).result(15)  # in the name of another
    for reader in pair:
        assert wait_for(lambda: auxiliaries_in(ask_for_auxiliaries(reader, "ours").result(15)) == [about])  # noqa: B023


def test_a_good_record_of_a_foreign_program_is_accepted(pair, start_peer):
    """The other side of the test above: it is the schema that keeps records out, and not something else."""
    other = start_peer(initial_peers=pair[0].addresses())
    store_raw(other, record(other).dict())
    for reader in pair:
        assert [each.peer_id for each in read_records(reader, "ours")] == [other.peer_id]


def test_nobody_can_write_in_the_name_of_another(pair, start_peer):
    first, second = pair
    publish_record(first, "ours", record(first), lifetime=30)
    assert wait_for(lambda: read_records(second, "ours"))
    liar = start_peer(initial_peers=first.addresses())
    store_raw(liar, record(first, name="liar").dict(), subkey=first.signature_key)
    for reader in pair:
        assert [each.name for each in read_records(reader, "ours")] == ["a volunteer"]


def test_nobody_can_claim_the_peer_id_of_another(pair, start_peer):
    """Contributions are counted by peer id: a record counts only under the key that its peer id is made of."""
    first, _ = pair
    publish_record(first, "ours", record(first), lifetime=30)
    liar = start_peer(initial_peers=first.addresses())
    store_raw(liar, record(first, name="liar", samples_total=10**9).dict())
    for reader in pair:
        assert wait_for(lambda: read_records(reader, "ours"))  # noqa: B023
        assert {each.name for each in read_records(reader, "ours")} == {"a volunteer"}


# ---- the last state is safe --------------------------------------------------------------------------------------


def test_leaving_waits_until_the_state_is_saved(pair):
    first, second = pair
    announced = threading.Timer(0.5, announce_saved, (first, "ours", 7))
    announced.start()
    try:
        assert wait_until_saved(second, "ours", 7, timeout=15, stop=StopSignal())
        assert wait_until_saved(second, "ours", 6, timeout=15, stop=StopSignal()), "a later step is as good"
    finally:
        announced.join()


def test_leaving_does_not_wait_for_ever(pair):
    announce_saved(pair[0], "ours", 6)
    began = time.monotonic()
    assert not wait_until_saved(pair[1], "ours", 7, timeout=1, stop=StopSignal())
    assert time.monotonic() - began < 5
