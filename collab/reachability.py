"""Whether other computers can connect to this one: at start, another peer is asked to dial it back."""

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from hivemind import DHT
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.utils.multiaddr import Multiaddr

from collab.errors import UserError
from collab.peer import ANY_PORT, DAEMON_SECONDS, HEADER_BYTES, Peer, on_loopback_only, own_ips, peer_id_in
from collab.selftest import raise_file_limit

logger = logging.getLogger(__name__)

PROTOCOL = "samiti/dial_back/1"
MAX_ASKED = 3
MAX_TRANSPORTS = 4
MAX_MESSAGE_BYTES = 2000
DIAL_SECONDS = 5.0  # TCP repeats its first packet after 1 and 3 seconds
ANSWER_SECONDS = 10.0  # the daemon starts in a fraction of a second
PAUSE_SECONDS = 1.0  # between two checks of one answering peer: strangers must not keep it busy
SUGGESTED_PORT = 31337
TRANSPORT = re.compile(r"/tcp/\d{1,5}|/udp/\d{1,5}/quic(-v1)?")

REMEMBERED_SECONDS = 10.0

Verdict = Literal["reachable", "unreachable", "unknown"]

PROBLEMS = {
    "refused": "the connection was refused: nothing accepts connections there",
    "silence": f"nothing answered within {DIAL_SECONDS:.0f} seconds: a firewall or a router drops what comes in",
    "stranger": "another peer answered there, not this one",
    "no_route": "there is no way to it from there",
    "other": "the connection failed",
}


@dataclass(frozen=True)
class Reachability:
    """What came of asking another peer to dial this one back.

    :param verdict: "unknown" if nobody could tell.
    :param reason: in words.
    :param address: what was dialed: the place from which this computer's connection arrives there, and its port.
    :param asked_peer: the id of the peer that dialed.
    """

    verdict: Verdict
    reason: str
    address: str = ""
    asked_peer: str = ""


def start_peer(
    *, client_mode: bool | None = None, must_accept: bool = False, even_on_loopback: bool = False, **options: Any
) -> Peer:
    """Join the network as what this computer can be: a full peer if others can connect to it, else a client.

    :param client_mode: None finds out, with the help of an initial peer; without any, this is a full peer.
    :param must_accept: this peer is of no use as a client (an auxiliary peer); it is told what is wrong, and goes on.
    :param even_on_loopback: find out also if it listens on 127.0.0.1 only, where all peers are on one computer.
    :param options: of `Peer`.
    :raises UserError: as `Peer`, a client is asked for where connections must be accepted, or hardly a file can be
      opened.
    """
    if must_accept and client_mode:
        raise UserError(
            "client_mode is true, but an auxiliary peer must accept connections: others join and average through it. "
            "Leave --client_mode out, or run this program on a computer with an open port."
        )
    raise_file_limit()  # before there are children, which inherit it
    in_network = even_on_loopback or not on_loopback_only(options.get("host_maddrs", ANY_PORT))
    asks = client_mode is None and bool(options.get("initial_peers")) and in_network
    # It asks as a client: a full peer is passed on in the DHT at once, and others would lose seconds in dialing it.
    peer = Peer(client_mode=bool(client_mode) or asks, **options)
    try:
        if asks:
            found = check_reachability(peer, even_on_loopback=even_on_loopback)
            if found.verdict == "reachable":
                peer.proven_address = f"{found.address}/p2p/{peer.peer_id}"
            elif found.verdict == "unknown":
                logger.info("Whether others can connect to this computer is not known (%s)", found.reason)
            elif must_accept:
                logger.warning(unreachable_auxiliary_message(found, peer.host_maddrs))
            else:
                logger.warning(client_message(found, peer.host_maddrs))
            if found.verdict != "unreachable" or must_accept:
                peer.become_full()
        if not peer.client_mode:
            serve_dial_back(peer)
    except BaseException:
        peer.close()
        raise
    return peer


def start_or_return(remembered: Path, **options: Any) -> Peer:
    """`start_peer` through whom this peer knew when it ran last, if none is given and any of those is there.

    :param remembered: a file of their addresses; it need not exist.
    """
    if not options.get("initial_peers") and remembered.exists():
        addresses = remembered.read_text(encoding="utf-8", errors="replace").split()  # if damaged, none of a peer
        again = {"initial_peers": addresses, "startup_timeout": REMEMBERED_SECONDS}
        with contextlib.suppress(UserError):
            return start_peer(**options | again)
    return start_peer(**options)


def check_reachability(peer: Peer, timeout: float = 20.0, even_on_loopback: bool = False) -> Reachability:
    """Ask up to three peers, initial ones first, one after the other, to connect to this one.

    :param timeout: seconds for all of it. A reachable peer knows in one second; one behind a firewall that drops
      packets in six.
    :param even_on_loopback: ask also if this peer listens on 127.0.0.1 only, where the question makes little sense.
    """
    if peer.on_loopback_only and not even_on_loopback:
        return Reachability("unknown", "it listens on this computer's loopback only")
    first = [peer_id_in(address) for address in peer.initial_peers]
    future = peer.dht.run_coroutine(partial(_ask, first=first, timeout=timeout), return_future=True)
    try:
        asked_peer, answer, failures = future.result(timeout + 2 * DAEMON_SECONDS)
    except TimeoutError:
        return Reachability("unknown", "this computer's own node did not answer in time")
    if answer is None:
        reasons = "; ".join(f"{peer_id[-6:]}: {reason}" for peer_id, reason in failures) or "there is nobody to ask"
        return Reachability("unknown", reasons)
    verdict, address, problem = answer
    return Reachability(verdict, PROBLEMS.get(problem, "the connection succeeded"), address, asked_peer)


def serve_dial_back(peer: Peer) -> None:
    """From now on, `peer` dials those back that ask for it."""
    peer.dht.run_coroutine(_serve_dial_back)


# ---- what a person reads -----------------------------------------------------------------------------------------


def client_message(found: Reachability, host_maddrs: Sequence[str]) -> str:
    """This peer goes on as a client: why, what that means, and how to change it."""
    return (
        f"{_what_was_tried(found)} So this computer takes part in client mode: it trains and averages like everybody "
        f"else, through peers that accept connections, but nobody can join through it. If that is fine with you, there "
        f"is nothing to do.\n{advice(found, host_maddrs)}"
    )


def unreachable_auxiliary_message(found: Reachability, host_maddrs: Sequence[str]) -> str:
    """Nobody can join through this auxiliary peer."""
    return (
        f"{_what_was_tried(found)} This auxiliary peer goes on, but others can neither join nor average through it.\n"
        f"{advice(found, host_maddrs)}"
    )


def _what_was_tried(found: Reachability) -> str:
    return (
        f"Other computers cannot connect to this one: peer {found.asked_peer[-6:]} tried {found.address}, and "
        f"{found.reason}."
    )


def advice(found: Reachability, host_maddrs: Sequence[str]) -> str:
    """The one thing to do on this computer so that others can connect to it.

    :param found: what the check said; its address tells whether there is a router in between.
    :param host_maddrs: where this peer listens; with a port of its choice, the next start would have another one.
    """
    notebook = _notebook()
    if notebook:
        return f"{notebook} lets no connection in: client mode is what works there."
    ports = [port for port in (_port(address) for address in host_maddrs) if port]
    port = ports[0] if ports else SUGGESTED_PORT
    again = "start again" if ports else f"start again with --host_maddrs /ip4/0.0.0.0/tcp/{port}"
    ip = _ip_in(found.address)
    if ip and ip not in own_ips():
        if _in_container():
            what = f"start the container with `-p {port}:{port}` (open that port on its host, too), and in it"
        else:
            what = f"forward TCP port {port} to {_local_ip()} in your router's settings (port forwarding), and"
        return f"To accept connections: {what} {again} --announce_maddrs /ip4/{ip}/tcp/{port}"
    return f"To accept connections: {_firewall_command(port)}, and {again}"


def _firewall_command(port: int) -> str:
    if sys.platform == "darwin":
        return "allow incoming connections for p2pd in System Settings > Network > Firewall"
    commands = {
        "ufw": f"sudo ufw allow {port}/tcp",
        "firewall-cmd": f"sudo firewall-cmd --add-port={port}/tcp",
        "iptables": f"sudo iptables -I INPUT -p tcp --dport {port} -j ACCEPT",
        "nft": f"sudo nft insert rule inet filter input tcp dport {port} accept",
    }
    for program, command in commands.items():
        # Firewalls' programs lie where only root's PATH leads.
        if shutil.which(program, path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin"):
            return f"type `{command}`"
    return f"open TCP port {port} in the firewall of this computer or of its provider"


def _notebook() -> str:
    """The service whose notebook this runs in, if it does; their machines have no address of their own."""
    if "COLAB_RELEASE_TAG" in os.environ:
        return "Colab"
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else ""


def _in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def _local_ip() -> str:
    """The address of the interface that leads to the internet; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "this computer"


def _port(address: str) -> int:
    found = re.search(r"/tcp/(\d+)", address)
    return int(found[1]) if found else 0


def _ip_in(address: str) -> str:
    found = re.match(r"/ip[46]/([^/]+)", address)
    return found[1] if found else ""


# ---- coroutines that run inside the DHT's process (see the end of collab/peer.py) ---------------------------------


class _DialBack:
    """Connects to peers that ask for it, one at a time, and only to where they ask from."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def answer(self, asker: PeerID, seen_at: Multiaddr, request: bytes) -> dict[str, str]:
        now = asyncio.get_running_loop().time()
        if now < self._free_at:
            return {"verdict": "busy"}
        addresses = addresses_to_dial(seen_at, request)
        if not addresses:
            return {"verdict": "unknown"}
        self._free_at = now + ANSWER_SECONDS
        try:
            return await _dial(asker, addresses)
        finally:
            self._free_at = asyncio.get_running_loop().time() + PAUSE_SECONDS


def addresses_to_dial(seen_at: Multiaddr, request: bytes) -> list[Multiaddr]:
    """The asker's ports at the IP from which its connection comes, and nothing else.

    The request cannot name an IP: strangers could send peers against any computer (AutoNAT has the same rule).
    Nothing to dial if the connection comes through a relay, whose IP it would be.
    """
    protocols = [protocol.name for protocol in seen_at.protocols()]
    if "p2p-circuit" in protocols or not protocols or protocols[0] not in ("ip4", "ip6"):
        return []
    try:
        transports = json.loads(request)
    except (ValueError, RecursionError):
        return []
    if not isinstance(transports, list):
        return []
    place = f"/{protocols[0]}/{seen_at[protocols[0]]}"
    found = []
    for transport in transports[:MAX_TRANSPORTS]:
        if isinstance(transport, str) and TRANSPORT.fullmatch(transport):
            with contextlib.suppress(Exception):  # a port beyond 65535
                found.append(Multiaddr(place + transport))
    return found


async def _dial(asker: PeerID, addresses: Sequence[Multiaddr]) -> dict[str, str]:
    """Connect with a daemon of its own: the node's daemon is connected to the asker already, and would use that.

    libp2p's handshake proves that the one who answers has the asker's peer id.
    """
    daemon = await P2P.create(
        host_maddrs=None, no_listen=True, dht_mode="client", auto_nat=False, nat_port_map=False, use_relay=False,
        idle_timeout=ANSWER_SECONDS, startup_timeout=DIAL_SECONDS,
    )  # fmt: skip
    tried = str(addresses[0])
    try:
        await asyncio.wait_for(daemon._client.connect(asker, addresses), DIAL_SECONDS)
        for connected in await daemon.list_peers():
            if connected.peer_id == asker and connected.addrs:
                return {"verdict": "reachable", "address": str(connected.addrs[0])}
        return {"verdict": "unknown"}
    except TimeoutError:
        return {"verdict": "unreachable", "address": tried, "problem": "silence"}
    except ControlFailure as error:
        return {"verdict": "unreachable", "address": tried, "problem": problem_in(str(error))}
    finally:
        await daemon.shutdown()


def problem_in(error: str) -> str:
    """The key in `PROBLEMS` for what libp2p says when it cannot connect."""
    marks = {
        "stranger": r"peer ?id mismatch|peer ids? don't match",
        "silence": r"i/o timeout|deadline exceeded|connection timed out",
        "refused": r"connection refused",
        "no_route": r"no route to host|network is unreachable",
    }
    return next((problem for problem, mark in marks.items() if re.search(mark, error, re.IGNORECASE)), "other")


async def _serve_dial_back(_dht: DHT, node: DHTNode) -> None:
    dial_back = _DialBack()

    async def answer(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _receive(reader)
        content = await dial_back.answer(info.peer_id, info.addr, request)
        await P2P.send_raw_data(json.dumps(content).encode(), writer)

    async def handler(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.wait_for(answer(info, reader, writer), ANSWER_SECONDS)
        except Exception as error:  # noqa: BLE001 - a traceback in the DHT's process would help nobody
            logger.debug("Peer %s was not dialed back: %r", info.peer_id, error)
        finally:
            writer.close()

    await asyncio.wait_for(node.p2p.add_binary_stream_handler(PROTOCOL, handler), DAEMON_SECONDS)


async def _receive(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(HEADER_BYTES), "big")
    if length > MAX_MESSAGE_BYTES:
        raise OSError(f"a message of {length} bytes, more than {MAX_MESSAGE_BYTES} are never needed")
    return await reader.readexactly(length)


Answer = tuple[Verdict, str, str]


async def _ask(
    _dht: DHT, node: DHTNode, first: Sequence[str], timeout: float
) -> tuple[str, Answer | None, list[tuple[str, str]]]:
    """Returns who gave a verdict, the verdict with address and problem, and why others gave none."""
    failures: dict[str, str] = {}

    async def ask_in_turn() -> tuple[str, Answer]:
        request = json.dumps(await _transports(node)).encode()
        neighbours = [str(peer) for peer in node.protocol.routing_table.uid_to_peer_id.values()]
        waiting = list(dict.fromkeys([*first, *neighbours]))[:MAX_ASKED]
        while waiting:
            for peer in list(waiting):
                try:
                    answer = await asyncio.wait_for(_ask_one(node, peer, request), ANSWER_SECONDS + 2.0)
                except TimeoutError:
                    failures[peer] = "no answer"
                except Exception as error:  # noqa: BLE001 - the reason goes back to the caller
                    failures[peer] = _first_line(str(error)) or type(error).__name__
                else:
                    if answer is not None:
                        return peer, answer
                    failures[peer] = "busy"
                    continue
                waiting.remove(peer)
            if waiting:
                await asyncio.sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5))
        raise TimeoutError

    try:
        peer, answer = await asyncio.wait_for(ask_in_turn(), timeout)
        return peer, answer, []
    except Exception as error:  # noqa: BLE001 - a traceback in the DHT's process would help nobody
        if not isinstance(error, TimeoutError):
            failures["here"] = _first_line(repr(error))
        return "", None, list(failures.items())


async def _transports(node: DHTNode) -> list[str]:
    """The ends of this peer's addresses, such as /tcp/31337; libp2p knows forwarded and observed ports too."""
    found: dict[str, None] = {}
    for address in await node.p2p.get_visible_maddrs(latest=True):
        text = str(address).rpartition("/p2p/")[0]
        match = re.fullmatch(r"/ip[46]/[^/]+(/.+)", text)
        if match and TRANSPORT.fullmatch(match[1]):
            found[match[1]] = None
    return list(found)[:MAX_TRANSPORTS]


async def _ask_one(node: DHTNode, peer: str, request: bytes) -> Answer | None:
    """None if that peer is busy.

    :raises Exception: it cannot be asked, or gave no verdict.
    """
    _, reader, writer = await node.p2p.call_binary_stream_handler(PeerID.from_base58(peer), PROTOCOL)
    try:
        await P2P.send_raw_data(request, writer)
        answer = json.loads(await _receive(reader))
    finally:
        writer.close()
    verdict, address, problem = (str(answer.get(key, "")) for key in ("verdict", "address", "problem"))
    if verdict == "busy":
        return None
    if verdict not in ("reachable", "unreachable"):
        raise OSError("it cannot tell")
    match = re.fullmatch(r"/ip[46]/([0-9a-fA-F.:]+)(/.+)", address)
    if not match or not TRANSPORT.fullmatch(match[2]):
        raise OSError("its answer makes no sense")
    ip_address(match[1])
    if verdict == "reachable":
        return "reachable", address, ""
    return "unreachable", address, problem if problem in PROBLEMS else "other"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
