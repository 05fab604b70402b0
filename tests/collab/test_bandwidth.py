"""How fast the link between two peers is, over real libp2p; a slow link is a proxy that holds bytes back."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hivemind.p2p import PeerID

from collab.bandwidth import DOWN, LARGEST, NUMBER_BYTES, PROTOCOL, measure_bandwidth, serve_bandwidth
from collab.peer import Peer

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]


@pytest.fixture
def host(start_peer) -> Peer:
    peer: Peer = start_peer()
    serve_bandwidth(peer)
    return peer


@contextlib.contextmanager
def slow_link(port: int, down: float, up: float) -> Iterator[int]:
    """A port that leads to `port` with so many Mbit/s."""
    loop = asyncio.new_event_loop()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, speed: float) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            free_at = loop.time()
            while data := await reader.read(2**14):
                # On a busy machine it comes late; up to so much it makes up for.
                free_at = max(free_at, loop.time() - 0.1) + 8e-6 * len(data) / speed
                await asyncio.sleep(max(0.0, free_at - loop.time()))
                writer.write(data)
                await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, there_writer, up), copy(there_reader, writer, down))

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        server.close()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def test_each_direction_is_measured_in_megabits(host, start_peer) -> None:
    where = host.addresses()[0]
    port = int(where.split("/")[4])
    with slow_link(port, down=8.0, up=2.0) as slow_port:
        peer = start_peer(initial_peers=[where.replace(f"/{port}/", f"/{slow_port}/")])
        link = measure_bandwidth(peer, host.peer_id)
        peer.close()
    assert 0.6 * 8.0 < link.down < 1.3 * 8.0 and 0.6 * 2.0 < link.up < 1.3 * 2.0


def test_who_comes_second_waits_for_its_turn(host, start_peer) -> None:
    peers = [start_peer(initial_peers=host.addresses()), start_peer(initial_peers=host.addresses(), client_mode=True)]
    with ThreadPoolExecutor() as pool:
        links = list(pool.map(lambda peer: measure_bandwidth(peer, host.peer_id), peers))
    assert all(link.down > 20 and link.up > 20 for link in links), "this is the loopback"


async def _ask_for_too_much(_dht, node, peer_id: str) -> bytes:
    _, reader, writer = await node.p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), PROTOCOL)
    with contextlib.closing(writer):
        writer.write(DOWN + (LARGEST + 1).to_bytes(NUMBER_BYTES, "big"))
        return await asyncio.wait_for(reader.read(1), 10)


def test_nobody_gets_more_than_the_largest_size(host, start_peer) -> None:
    peer = start_peer(initial_peers=host.addresses())
    answer = peer.dht.run_coroutine(partial(_ask_for_too_much, peer_id=host.peer_id), return_future=True)
    assert answer.result(15) == b""
    assert measure_bandwidth(peer, host.peer_id).down > 20, "one stranger keeps nobody out"


def test_a_peer_that_does_not_offer_it_is_an_os_error(start_peer) -> None:
    host = start_peer()
    peer = start_peer(initial_peers=host.addresses())
    with pytest.raises(OSError):
        measure_bandwidth(peer, host.peer_id, timeout=5.0)
