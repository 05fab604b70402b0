"""How fast this computer's link to another peer is, measured by sending some megabytes there and back."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hivemind import DHT
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from collab.peer import DAEMON_SECONDS, Peer, peer_id_in

logger = logging.getLogger(__name__)

PROTOCOL = "samiti/bandwidth/1"
"""A request is one byte (DOWN or UP) and the number of bytes. The answer is one byte (GO or BUSY). Then so many bytes
follow: for DOWN from the one who answered; for UP from the asker, who gets another GO when all have arrived."""

DOWN, UP = b"d", b"u"
GO, BUSY = b"1", b"0"
NUMBER_BYTES = 8  # big-endian
LARGEST = 8 * 2**20  # bytes; a stranger cannot ask for more in one go
FIRST = 2**18  # bytes; enough to tell a link of 1 Mbit/s, where they take 2 seconds
WORTH_SECONDS = 2.0  # so long a second, more exact transfer should take
SERVE_SECONDS = 20.0  # for one transfer, after which the next asker has its turn
BUSY_PAUSE = 0.5  # seconds
CHUNK = 2**16


@dataclass(frozen=True)
class Bandwidth:
    """In Mbit/s, seen from the peer that measured."""

    down: float
    up: float


def serve_bandwidth(peer: Peer) -> None:
    """Let others measure their link to this peer, one at a time."""
    peer.dht.run_coroutine(_serve)


def measure_bandwidth(peer: Peer, peer_id: str, timeout: float = 30.0) -> Bandwidth:
    """Measure the link to `peer_id`, which has to be known to `peer`; takes about 5 seconds, and 16 MB at most.

    What is measured is the narrowest place on the way there, which may be the other one's.

    :param timeout: seconds for all of it, waiting for others who measure included.
    :raises OSError: the peer cannot be reached, does not offer this, or it took too long.
    """
    work = partial(_measure, peer_id=peer_id, timeout=timeout)
    answer: tuple[float, float] | str = peer.dht.run_coroutine(work, return_future=True).result(timeout + 5.0)
    if isinstance(answer, str):
        raise OSError(answer)
    return Bandwidth(*answer)


def measure_in_background(peer: Peer, then: Callable[[float], None]) -> None:
    """Measure the link to the first of the initial peers that lets it be measured, beside everything else.

    :param then: gets Mbit/s of the slower direction, from another thread; not called if nobody could be measured.
    """

    def measure() -> None:
        for peer_id in dict.fromkeys(map(peer_id_in, peer.initial_peers)):
            with contextlib.suppress(OSError, TimeoutError):
                link = measure_bandwidth(peer, peer_id)
                logger.info("Link to peer %s: %.1f Mbit/s down, %.1f up", peer_id[-6:], link.down, link.up)
                then(min(link.down, link.up))
                return

    threading.Thread(target=measure, name="bandwidth", daemon=True).start()


# ---- coroutines that run inside the DHT's process (see collab/peer.py) -------------------------------------------


async def _serve(_dht: DHT, node: DHTNode) -> None:
    one_at_a_time = asyncio.Lock()

    async def handler(_info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Whoever breaks off or breaks the rules gets nothing more.
        with contextlib.closing(writer), contextlib.suppress(TimeoutError, OSError, EOFError):
            async with asyncio.timeout(SERVE_SECONDS):
                direction = await reader.readexactly(1)
                size = int.from_bytes(await reader.readexactly(NUMBER_BYTES), "big")
                if size > LARGEST or direction not in (DOWN, UP):
                    return
                if one_at_a_time.locked():
                    writer.write(BUSY)
                    await writer.drain()
                    return
                async with one_at_a_time:
                    writer.write(GO)
                    if direction == DOWN:
                        await _write(writer, size)
                    else:
                        await _read(reader, size)
                        writer.write(GO)
                    await writer.drain()

    await asyncio.wait_for(node.p2p.add_binary_stream_handler(PROTOCOL, handler), DAEMON_SECONDS)


async def _measure(_dht: DHT, node: DHTNode, peer_id: str, timeout: float) -> tuple[float, float] | str:
    """Mbit/s down and up, or the reason why not: an exception here would print a traceback in the DHT's process."""
    peer = PeerID.from_base58(peer_id)
    try:
        async with asyncio.timeout(timeout):
            return await _speed(node.p2p, peer, DOWN), await _speed(node.p2p, peer, UP)
    except TimeoutError:
        return f"it took longer than {timeout:.0f} seconds"
    except EOFError:
        return "the peer broke off"
    except Exception as error:  # noqa: BLE001 - the reason goes back to the caller, which raises it
        return str(error) or type(error).__name__


async def _speed(p2p: P2P, peer: PeerID, direction: bytes) -> float:
    """In Mbit/s. A short transfer tells how long a longer one may be."""
    size = FIRST
    seconds = await _transfer(p2p, peer, direction, size)
    if seconds < WORTH_SECONDS / 2:
        size = min(LARGEST, round(size * WORTH_SECONDS / seconds))
        seconds = await _transfer(p2p, peer, direction, size)
    return 8e-6 * size / seconds


async def _transfer(p2p: P2P, peer: PeerID, direction: bytes, size: int) -> float:
    """Seconds that `size` bytes take."""
    while True:
        _, reader, writer = await p2p.call_binary_stream_handler(peer, PROTOCOL)
        with contextlib.closing(writer):
            writer.write(direction + size.to_bytes(NUMBER_BYTES, "big"))
            if await reader.readexactly(1) == GO:
                began = time.perf_counter()
                if direction == DOWN:
                    await _read(reader, size)
                else:
                    await _write(writer, size)
                    await reader.readexactly(1)
                return time.perf_counter() - began
        await asyncio.sleep(BUSY_PAUSE)


async def _read(reader: asyncio.StreamReader, size: int) -> None:
    while size > 0:
        size -= len(await reader.readexactly(min(size, CHUNK)))


async def _write(writer: asyncio.StreamWriter, size: int) -> None:
    chunk = bytes(CHUNK)
    while size > 0:
        writer.write(chunk[:size])
        size -= CHUNK
        await writer.drain()
