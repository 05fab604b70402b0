"""Real peers on the loopback, closed at the end, whatever the test did."""

import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from collab.peer import Peer
from collab.processes import guard_children

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def daemons() -> list[psutil.Process]:
    """The libp2p daemons that this test process, or a child of it, has started and that still run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "p2pd" in process.name() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def ended(processes: list[psutil.Process], seconds: float = 5.0) -> bool:
    """Whether all of them end within `seconds`; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in alive(processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if psutil.pid_exists(process.pid)]


@pytest.fixture(scope="session")
def guarded() -> None:
    """hivemind forks: without this, a test run that is killed would leave its daemons behind."""
    guard_children()


@pytest.fixture
def start_peer(guarded) -> Iterator[Callable[..., Peer]]:
    """Starts peers with the arguments of `Peer`; no daemon of theirs outlives the test."""
    peers: list[Peer] = []
    seen: list[psutil.Process] = []

    def start(**options) -> Peer:
        peer = Peer(**{"host_maddrs": [LOOPBACK], "nat_port_map": False, "startup_timeout": 20.0, **options})
        peers.append(peer)
        seen.extend(daemons())
        return peer

    yield start
    for peer in reversed(peers):
        peer.close()
    assert ended(seen), "a libp2p daemon outlived its peer"
    assert not daemons()
