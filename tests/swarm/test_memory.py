"""What peers take of a computer's memory: real processes with a model that stands out against the libraries."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from collab.machine import PROCESSES, VALUES_IN_MEMORY
from collab.memory import memory_in_use
from tests.swarm.processes import Program, wait_until

pytestmark = pytest.mark.swarm

DEPTH, WIDTH = 24, 1024
MODEL = 4 * DEPTH * WIDTH**2  # bytes: 100 MB
STATE = 3 * MODEL
SETTINGS = {"optimizer": "lamb", "target_batch_size": 160, "average_state_every": 2, "averaging_timeout": 60.0}


class FatPeer:
    """A regression peer whose memory is watched while something is waited for."""

    def __init__(self, folder: Path, number: int) -> None:
        command = ["-m", "benchmarks.regression_peer", str(folder), "--number", str(number), "--steps", "1000"]
        command += ["--depth", str(DEPTH), "--width", str(WIDTH), "--pace", "0.2", "--settings", json.dumps(SETTINGS)]
        if number:
            command += ["--initial_peers", (folder / "address-0").read_text()]
        self.folder, self.number, self.peak, self.least = folder, number, 0, 0
        self.program = Program(f"peer-{number}", command, folder / f"peer-{number}.log", cold=True)

    def steps(self) -> int:
        path = self.folder / f"step-{self.number}"
        return int(path.read_text()) if path.exists() else 0

    def look(self) -> None:
        now = memory_in_use(self.program.process.pid)
        self.peak, self.least = max(self.peak, now), min(self.least, now)

    def forget(self) -> None:
        self.peak, self.least = 0, 2**63


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[FatPeer]]:
    (tmp_path / "go").touch()
    peers: list[FatPeer] = []
    yield peers
    for peer in peers:
        peer.program.end()


def watch(peers: list[FatPeer], until) -> None:
    """Look at the memory of `peers` until a condition is true."""
    for peer in peers:
        peer.forget()

    def there() -> bool:
        for peer in peers:
            peer.look()
        return until()

    wait_until(there, 240, lambda: "\n".join(peer.program.output() for peer in peers))


def test_a_state_that_changes_hands_is_in_memory_once_more_and_no_longer_than_needed(
    tmp_path: Path, started: list[FatPeer]
) -> None:
    """The bounds lie between one extra copy of the state and two. What the computer's check promises holds as well."""
    donor = FatPeer(tmp_path, 0)
    started.append(donor)
    watch([donor], lambda: donor.steps() >= 1)
    watch([donor], lambda: donor.steps() >= 3)
    alone = donor.peak

    newcomer = FatPeer(tmp_path, 1)
    started.append(newcomer)
    watch(started, lambda: newcomer.steps() >= 1)
    assert newcomer.steps() > 3, "it took over no state"
    promised = 4 * VALUES_IN_MEMORY * (MODEL // 4) + PROCESSES
    for peer in started:
        assert peer.peak < alone + 1.5 * STATE, (peer.number, peer.peak, alone)
        assert peer.peak < promised, (peer.number, peer.peak, promised)

    def copies_are_gone() -> bool:
        """The least between two looks: a peer's gradients and what it averages come and go in each step."""
        return all(peer.least < alone + 0.5 * STATE for peer in started)

    first = newcomer.steps()
    watch(started, lambda: newcomer.steps() >= first + 4 and copies_are_gone())  # two rounds of parameters at least
    for peer in started:
        assert peer.peak < promised, (peer.number, peer.peak, promised)
