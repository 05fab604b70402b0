"""A process that a peer needs ends, and the peer hears of it."""

import os
import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from collab import vital
from collab.vital import VitalProcesses
from tests.swarm.processes import wait_until


@pytest.fixture
def processes():
    """Stand-ins for those of the DHT and of two averagers."""
    started = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number, name", [(0, "the DHT's process"), (2, "an averager's process")])
def test_the_end_of_a_process_is_told_once(monkeypatch, processes, number: int, name: str) -> None:
    monkeypatch.setattr(vital, "PERIOD", 0.05)
    dht, *averagers = processes
    peer: Any = SimpleNamespace(dht=dht)
    lost: list[str] = []
    watch = VitalProcesses(peer, lost.append)
    watch.add(averagers)
    assert not watch._stopped.wait(0.2) and lost == []
    os.kill(processes[number].pid, signal.SIGKILL)  # it stays a zombie, as a child of hivemind's does
    wait_until(lambda: bool(lost), 5, lambda: "nothing was told")
    watch.join(5)
    assert lost == [name] and not watch.is_alive() and not watch.failures
