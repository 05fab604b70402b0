"""A computer's place in the swarm: its identity, its DHT node, its addresses, and what it hands to others."""

import asyncio
import contextlib
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from hivemind import DHT
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto import crypto_pb2
from hivemind.utils import MPFuture, ValueWithExpiration, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.networking import choose_ip_address

from collab.errors import UserError
from collab.files import replacing
from collab.processes import scratch_folder

logger = logging.getLogger(__name__)

ANY_PORT = ("/ip4/0.0.0.0/tcp/0",)
HEADER_BYTES = 8  # P2P.send_raw_data writes the length first, as so many big-endian bytes
MAX_SOCKET_FOLDER = 75  # bytes: a socket's path has 103 on macOS, its name in there 27
DAEMON_SECONDS = 10.0  # p2pd answers in milliseconds
MAX_PAYLOAD_BYTES = 256 * 2**20  # what one peer may hand to another in one go; a tokenizer is well under 10 MiB


class Peer:
    """One node of the DHT, with an identity of its own.

    :param initial_peers: multiaddresses of peers that are in the swarm already, each ending in /p2p/PEER_ID. Empty:
      this peer is the first one.
    :param host_maddrs: multiaddresses to listen on; port 0 takes a free one.
    :param announce_maddrs: what others should dial instead, for example a forwarded port.
    :param client_mode: accept no incoming connections.
    :param nat_port_map: ask the router to forward the port.
    :param use_relay: reach peers that only a relay (libp2p's circuit relay) can reach, and be a relay if this peer is
      known to be reachable from everywhere.
    :param use_auto_relay: look for relays through which this peer can be reached.
    :param trusted_relays: multiaddresses of relays to try first; needs `use_auto_relay`.
    :param use_ipfs: find the initial peers by their ids in the public network of IPFS; each of them is /p2p/PEER_ID.
    :param identity_path: file with the private key that determines the peer id. It is made if it does not exist. None:
      a key for this session only.
    :param startup_timeout: seconds until starting counts as failed.
    :raises UserError: an address is malformed, a port is taken, nobody answers, or the identity is in use.
    """

    def __init__(
        self,
        *,
        initial_peers: Sequence[str] = (),
        host_maddrs: Sequence[str] = ANY_PORT,
        announce_maddrs: Sequence[str] = (),
        client_mode: bool = False,
        nat_port_map: bool = True,
        use_relay: bool = True,
        use_auto_relay: bool = False,
        trusted_relays: Sequence[str] = (),
        use_ipfs: bool = False,
        identity_path: str | None = None,
        startup_timeout: float = 60.0,
    ) -> None:
        for address in (*host_maddrs, *announce_maddrs):
            _check_address(address, needs_peer_id=False)
        for address in (*initial_peers, *trusted_relays):
            _check_address(address, needs_peer_id=True)
        for address in initial_peers:
            _check_place(address, use_ipfs)
        for address in host_maddrs:
            _check_port_is_free(address)
        self.initial_peers = list(initial_peers)
        self.host_maddrs = list(host_maddrs)
        self.on_loopback_only = on_loopback_only(host_maddrs)
        self.proven_address: str | None = None
        """Where another peer has really reached this one, if one has tried (`collab.reachability`)."""
        _keep_sockets_in(scratch_folder())
        folder = tempfile.TemporaryDirectory(prefix="samiti-", dir=scratch_folder()) if identity_path is None else None
        self._session_folder = folder
        path = Path(folder.name if folder else "", identity_path or "identity.key")
        is_new = not path.exists()
        self.private_key = _load_or_make_identity(path)
        self._identity_path, self._startup_timeout = path, startup_timeout
        self._dht_options = dict(
            initial_peers=self.initial_peers or None,
            host_maddrs=self.host_maddrs if self.on_loopback_only else [_with_port(at) for at in host_maddrs],
            announce_maddrs=list(announce_maddrs) or None,
            nat_port_map=nat_port_map and not self.on_loopback_only,
            auto_nat=not self.on_loopback_only,
            use_relay=use_relay,
            use_auto_relay=use_auto_relay,
            trusted_relays=list(trusted_relays) or None,
            use_ipfs=use_ipfs,
        )
        self._start(client_mode, check_if_identity_free=not is_new)

    def _start(self, client_mode: bool, check_if_identity_free: bool) -> None:
        dht = DHT(
            **self._dht_options,
            client_mode=client_mode,
            identity_path=str(self._identity_path),
            check_if_identity_free=check_if_identity_free,
            startup_timeout=self._startup_timeout,
            record_validators=[RSASignatureValidator(self.private_key)],
            start=False,
        )
        try:
            dht.run_in_background(await_ready=True, timeout=2 * self._startup_timeout)
        except Exception as error:
            dht.join(1.0)  # killed while it tells its reason, it would keep a lock that all of hivemind waits for
            if dht.is_alive():
                dht.terminate()
            if self._dht_options["use_ipfs"] and "bootstrap peers" in str(error):
                raise UserError(
                    "No computer of IPFS' public network answered, through which use_ipfs looks for peers: this one is "
                    "offline, or a firewall keeps it from TCP port 4001 of others. Give the whole address of a peer in "
                    "--initial_peers and leave out --use_ipfs."
                ) from error
            reason = _why_not_started(
                error, self.initial_peers, self.host_maddrs, self._identity_path, self._startup_timeout
            )
            raise UserError(reason) from error
        self.dht = dht
        self.client_mode = client_mode
        self.peer_id = str(dht.peer_id)

    def become_full(self) -> None:
        """Start a client anew as a full peer, with the same identity and port. Only before anybody uses `dht`.

        :raises UserError: as when it was made.
        """
        self.dht.shutdown()
        self._start(client_mode=False, check_if_identity_free=False)  # a moment ago it was ours

    @property
    def signature_key(self) -> bytes:
        """The subkey under which this peer signs its records in the DHT."""
        return RSASignatureValidator(self.private_key).local_public_key

    def addresses(self) -> list[str]:
        """Addresses that other computers can dial: the best one first, public if there is one.

        If that is not an address of this computer itself (a router's, a cloud's), those of its own network follow.
        """
        visible = self.dht.run_coroutine(_visible_addresses, return_future=True).result(2 * DAEMON_SECONDS)
        proven = [Multiaddr(self.proven_address)] if self.proven_address else []
        dialed = [
            address
            for address in [*proven, *visible]
            if {"ip4", "ip6"} & set(_protocols(address)) and "p2p-circuit" not in _protocols(address)
        ]
        if not dialed:
            return [str(address) for address in visible]
        # Of several interfaces, a loopback address is of no use to other computers.
        outside = [address for address in dialed if not str(address).startswith(("/ip4/127.", "/ip6/::1"))] or dialed
        ips = [choose_ip_address(outside)]
        own = [address for address in outside if _ip(address) in own_ips()]
        if ips[0] not in own_ips() and own:
            ips.append(choose_ip_address(own))
        return list(dict.fromkeys(str(address) for ip in ips for address in outside if _ip(address) == ip))

    def publish(self, key: str, value: Any, lifetime: float) -> MPFuture:
        """Store `value` in the DHT under this peer's signature, for `lifetime` seconds, without waiting for it."""
        return self.dht.store(
            key,
            subkey=self.signature_key,
            value=value,
            expiration_time=get_dht_time() + lifetime,
            return_future=True,
        )

    def serve(self, name: str, file: Path) -> None:
        """Hand the content of `file` to every peer that asks this one for `name`; it is read anew each time."""
        self.dht.run_coroutine(partial(_serve, name=name, file=file.resolve()))

    def fetch(
        self,
        peer_id: str,
        name: str,
        timeout: float = 30.0,
        most_bytes: int = MAX_PAYLOAD_BYTES,
        patience: float | None = None,
    ) -> bytes:
        """Ask `peer_id` for what it serves under `name`.

        The connection itself proves that the answer comes from the holder of that peer id's key (libp2p's handshake).

        :param timeout: seconds for all of it.
        :param most_bytes: a longer answer is not read.
        :param patience: seconds without a byte after which it is given up; for large answers, where `timeout` has to
          be long enough for a slow link.
        :raises OSError: the peer cannot be reached, serves nothing under that name, takes longer than `timeout`, or
          says too much.
        """
        with tempfile.TemporaryDirectory(prefix="samiti-", dir=scratch_folder()) as folder:
            target = Path(folder, "fetched")
            work = partial(
                _fetch,
                peer_id=peer_id,
                name=name,
                timeout=timeout,
                most_bytes=most_bytes,
                patience=patience,
                target=target,
            )
            future = self.dht.run_coroutine(work, return_future=True)
            failure = future.result(timeout + 5.0)
            if failure is not None:
                raise OSError(failure)
            return target.read_bytes()

    def knock(self, peer_id: str, addresses: Sequence[str], timeout: float) -> MPFuture:
        """`rejoin` with one peer, without waiting for it; gives what is done when it is over."""
        work = partial(_knock, peer_id=peer_id, addresses=list(addresses), timeout=timeout)
        return self.dht.run_coroutine(work, return_future=True)

    def rejoin(self, peers: Mapping[str, Sequence[str]], timeout: float = 10.0) -> set[str]:
        """Dial peers anew, all at once, and make their DHT and this one's the same again. Safe at any time.

        A DHT node forgets whoever does not answer once, and never asks again (dht/protocol.py): after a short break of
        the network two halves of a swarm would stay apart.

        :param peers: addresses by peer id; without any, libp2p uses those that it knows itself.
        :param timeout: seconds for all of it.
        :returns: ids of the peers that answered.
        """
        give_up = time.monotonic() + timeout
        dialed = {
            peer_id: self.dht.run_coroutine(
                partial(_dial, peer_id=peer_id, addresses=list(addresses), timeout=0.7 * timeout), return_future=True
            )
            for peer_id, addresses in peers.items()
        }
        answered = set()
        for peer_id, future in dialed.items():
            with contextlib.suppress(TimeoutError):
                if future.result(max(0.0, give_up - time.monotonic())):
                    answered.add(peer_id)
        if answered:
            work = partial(_get_acquainted, timeout=0.3 * timeout)
            with contextlib.suppress(TimeoutError):
                self.dht.run_coroutine(work, return_future=True).result(0.5 * timeout)
        return answered

    def close(self) -> None:
        """Stop the DHT node and the libp2p daemon."""
        if self.dht.is_alive():
            self.dht.shutdown()
        if self._session_folder is not None:
            self._session_folder.cleanup()


def peer_id_in(address: str) -> str:
    """The peer id that an address names: the root of trust for what that peer hands out."""
    return str([value for protocol, value in Multiaddr(address).items() if protocol.name == "p2p"][-1])


@lru_cache(4096)  # a tenth of a millisecond, for each peer at each look
def peer_id_of_key(signature_key: bytes) -> str:
    """The peer id of whoever signs under `signature_key`: the hash of the same public key, in libp2p's own format.

    :raises ValueError: it is no such key.
    """
    found = re.fullmatch(rb"\[owner:(ssh-rsa [^\]]+)\]", signature_key)
    if found is None:
        raise ValueError("not the key of a signed record")
    return peer_id_of_public_key(found[1])


def signed_entries(answer: ValueWithExpiration | None) -> dict[str, Any]:
    """What peers have said under a key of the DHT, each with its own signature: {peer id: value}.

    :param answer: of `DHT.get`. Strangers can put anything there; what is no signed record is left out.
    """
    entries = answer.value if isinstance(answer, ValueWithExpiration) and isinstance(answer.value, dict) else {}
    found = {}
    for key, entry in entries.items():
        with contextlib.suppress(ValueError, TypeError):
            if isinstance(entry, ValueWithExpiration):
                found[peer_id_of_key(key)] = entry.value
    return found


def peer_id_of_public_key(ssh_key: bytes) -> str:
    """The peer id that belongs to a public key in OpenSSH's format ("ssh-rsa AAAA...").

    :raises ValueError: it is no such key.
    """
    try:
        public_key = load_ssh_public_key(ssh_key)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    key = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    content = crypto_pb2.PublicKey(key_type=crypto_pb2.RSA, data=key).SerializeToString()
    return str(PeerID(bytes([0x12, 32]) + sha256(content).digest()))  # a multihash: SHA-256, 32 bytes


def on_loopback_only(host_maddrs: Sequence[str]) -> bool:
    """Whether only this computer itself can connect to a peer that listens on these addresses."""
    return all("/ip4/127." in address for address in host_maddrs)


def own_ips() -> set[str]:
    """IP addresses of this computer's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        each.address.partition("%")[0]
        for interface in psutil.net_if_addrs().values()
        for each in interface
        if each.family in families
    }


def _ip(address: Multiaddr) -> str:
    return str(next(value for protocol, value in address.items() if protocol.name in ("ip4", "ip6")))


def _protocols(address: Multiaddr) -> list[str]:
    return [protocol.name for protocol in address.protocols()]


def _check_address(address: str, needs_peer_id: bool) -> None:
    example = "/ip4/203.0.113.7/tcp/31337" + ("/p2p/Qm..." if needs_peer_id else "")
    try:
        names = _protocols(Multiaddr(address))
    except Exception as error:
        raise UserError(f"{address!r} is not an address ({error}). It should look like {example}") from error
    if needs_peer_id and "p2p" not in names:
        raise UserError(
            f"{address!r} names no peer: copy the whole line that the auxiliary peer prints, it looks like {example}"
        )


def _check_place(address: str, use_ipfs: bool) -> None:
    """An initial peer is given either with its place or, for IPFS to find it, without."""
    has_place = not address.startswith("/p2p/")
    if has_place and use_ipfs:
        raise UserError(
            f"With use_ipfs, peers are found by their ids alone, but {address} says where the peer is. Give "
            f"--initial_peers /p2p/{peer_id_in(address)}, or leave out --use_ipfs."
        )
    if not has_place and not use_ipfs:
        raise UserError(
            f"{address} says who the peer is, but not where. Copy the whole line that the auxiliary peer prints, or "
            f"add --use_ipfs true if that peer was started with it, too."
        )


def _check_port_is_free(address: str) -> None:
    """libp2p listens with SO_REUSEPORT: a second peer on the same port would start, and get half of the connections."""
    maddr = Multiaddr(address)
    names = _protocols(maddr)
    port = int(maddr["tcp"]) if "tcp" in names else 0
    if port == 0 or not {"ip4", "ip6"} & set(names):
        return
    family, host = (socket.AF_INET, maddr["ip4"]) if "ip4" in names else (socket.AF_INET6, maddr["ip6"])
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"Cannot listen on {address}: {error.strerror}. Another program uses that port, or the address is not "
                f"this computer's. Stop that program, or choose another port in --host_maddrs; 0 takes any free one."
            ) from error


def _with_port(address: str) -> str:
    """The address with a free port in place of port 0: a peer keeps its port when its node is started anew."""
    found = re.fullmatch(r"/ip4/([\d.]+)/tcp/0", address)
    if found is None:
        return address
    with socket.socket() as probe:
        try:
            probe.bind((found[1], 0))
        except OSError:  # libp2p will say what is wrong with it
            return address
        return f"/ip4/{found[1]}/tcp/{probe.getsockname()[1]}"


def _keep_sockets_in(folder: str | None) -> None:
    """Upstream makes the sockets of its daemons in /tmp and leaves most of them there (p2p/p2p_daemon.py, `P2P`)."""
    if folder is not None and len(os.fsencode(folder)) <= MAX_SOCKET_FOLDER:
        P2P._UNIX_SOCKET_PREFIX = f"/unix{folder}/"


def _load_or_make_identity(path: Path) -> RSAPrivateKey:
    """The private key in `path`, in libp2p's own format, which p2pd reads too."""
    try:
        if not path.exists():
            with replacing(path) as scratch:
                P2P.generate_identity(str(scratch))
        content = crypto_pb2.PrivateKey.FromString(path.read_bytes())
        key = RSAPrivateKey.__new__(RSAPrivateKey)
        key.__setstate__({"_private_key": content.data})
        return key
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"The identity file {path} cannot be used: {error}. Give another --identity_path.") from error
    except Exception as error:
        raise UserError(
            f"{path} is not an identity file: {error}. Give another --identity_path; a new file is made by itself."
        ) from error


def identity_in_use(path: str | Path) -> str:
    """The message for a person who starts two peers with one identity."""
    return (
        f"The identity in {path} is used by another running peer. Stop that one, or start this one with another "
        f"--identity_path (a new file is made by itself)."
    )


def _why_not_started(
    error: Exception, initial_peers: Sequence[str], host_maddrs: Sequence[str], identity: Path, timeout: float
) -> str:
    reason = str(error) or type(error).__name__
    lowered = reason.lower()
    if "already taken" in lowered:
        return identity_in_use(identity)
    if "failed to listen" in lowered:
        return (
            f"Cannot listen on {' '.join(host_maddrs)}: {reason}. The address may not be this computer's. Give another "
            f"one in --host_maddrs, for example /ip4/0.0.0.0/tcp/0."
        )
    if initial_peers:
        from collab.diagnosis import why_not_joined  # it knows the manifest, which knows this module

        return why_not_joined(initial_peers, reason)
    return (
        f"The libp2p daemon did not start within {timeout:.0f} seconds: {reason}. On a slow machine give a larger "
        f"--startup_timeout."
    )


# ---- coroutines that run inside the DHT's process ----------------------------------------------------------------
# Content travels between the processes as files: the pipe that carries calls to hivemind's DHT process is non-blocking
# there, and a call larger than the pipe's buffer (64 KiB) ends that process (dht/dht.py:128).
# Each has a time limit, also where none seems needed: nobody holds a reference to a task that reads from a stream, not
# hivemind (dht/dht.py:135) nor asyncio, so that the garbage collector may end it while it waits. A timer holds it.


async def _visible_addresses(_dht: DHT, node: DHTNode) -> list[Multiaddr]:
    return await asyncio.wait_for(node.get_visible_maddrs(latest=True), DAEMON_SECONDS)


async def _serve(_dht: DHT, node: DHTNode, name: str, file: Path) -> None:
    async def handler(_info: StreamInfo, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            try:
                content = file.read_bytes()
            except OSError as error:  # a traceback in the DHT's process would help nobody; the asker sees the end
                logger.debug("%s could not be handed out: %s", file, error)
            else:
                await P2P.send_raw_data(content, writer)

    await asyncio.wait_for(node.p2p.add_binary_stream_handler(name, handler), DAEMON_SECONDS)


async def _fetch(
    _dht: DHT,
    node: DHTNode,
    peer_id: str,
    name: str,
    timeout: float,
    most_bytes: int,
    patience: float | None,
    target: Path,
) -> str | None:
    """Returns the reason when it fails: an exception here would also print a traceback in the DHT's process."""

    async def receive() -> None:
        call = node.p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), name)
        _, reader, writer = await asyncio.wait_for(call, patience)
        try:
            left = int.from_bytes(await asyncio.wait_for(reader.readexactly(HEADER_BYTES), patience), "big")
            if left > most_bytes:
                raise OSError(f"it announced {left} bytes, more than {most_bytes} are never needed")
            with target.open("wb") as file:
                while left:
                    part = await asyncio.wait_for(reader.read(left), patience)
                    if not part:
                        raise OSError(f"the connection ended {left} bytes too early")
                    file.write(part)
                    left -= len(part)
        finally:
            writer.close()

    try:
        await asyncio.wait_for(receive(), timeout)
    except TimeoutError:
        return f"no answer within {min(timeout, patience or timeout):.0f} seconds, or too slow a one"
    except Exception as error:  # noqa: BLE001 - the reason goes back to the caller, which raises it
        return str(error) or type(error).__name__
    return None


async def _dial(_dht: DHT, node: DHTNode, peer_id: str, addresses: list[str], timeout: float) -> bool:
    """Connect to a peer, and become a neighbour of its DHT node; returns whether it answered."""
    peer = PeerID.from_base58(peer_id)
    # libp2p wants the peer id apart from the address; IPFS' addresses have nothing else
    places = [Multiaddr(place) for place in (address.rpartition("/p2p/")[0] for address in addresses) if place]

    async def call() -> bool:
        with contextlib.suppress(ControlFailure):  # no address works; it may be connected all the same
            await node.p2p._client.connect(peer, places)
        if await node.protocol.call_ping(peer) is not None:
            return True
        # A connection through a link that was cut stays open, and TCP tries it again ever more rarely: after half a
        # minute without an answer, only half a minute later. A new one works as soon as the link does.
        with contextlib.suppress(ControlFailure):
            await node.p2p._client.disconnect(peer)
            await node.p2p._client.connect(peer, places)
        return await node.protocol.call_ping(peer) is not None

    try:
        answered = await asyncio.wait_for(call(), timeout)
    except Exception as error:  # noqa: BLE001 - a traceback in the DHT's process would help nobody
        logger.debug("Peer %s could not be dialed: %r", peer_id, error)
        return False
    if answered:
        node.blacklist.register_success(peer)
    return answered


async def _knock(_dht: DHT, node: DHTNode, peer_id: str, addresses: list[str], timeout: float) -> None:
    is_neighbour = node.protocol.routing_table.get(peer_id=PeerID.from_base58(peer_id)) is not None
    if await _dial(_dht, node, peer_id, addresses, timeout) and not is_neighbour:
        await _get_acquainted(_dht, node, timeout)


async def _get_acquainted(_dht: DHT, node: DHTNode, timeout: float) -> None:
    """Meet the neighbours of new neighbours, as a node does when it starts (`DHTNode.create`, stage 3)."""
    await asyncio.wait({asyncio.create_task(node.find_nearest_nodes([node.node_id]))}, timeout=timeout)
