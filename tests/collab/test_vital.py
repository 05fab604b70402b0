"""A process or a thread that a peer needs ends, and the peer hears of it."""

import subprocess
import threading
from collections.abc import Callable
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


@pytest.mark.parametrize(
    "number, name",
    [(0, "the DHT's process"), (2, "an averager's process"), (3, "the thread that follows the others' progress")],
)
def test_the_end_of_what_it_needs_is_told_once(monkeypatch, processes, number: int, name: str) -> None:
    monkeypatch.setattr(vital, "PERIOD", 0.05)
    dht, *averagers = processes
    end = threading.Event()
    tracker = threading.Thread(target=end.wait, daemon=True)
    tracker.start()
    peer: Any = SimpleNamespace(dht=dht)
    optimizer: Any = SimpleNamespace(averagers=averagers, tracker=tracker)
    lost: list[str] = []
    watch = VitalProcesses(peer, lost.append)
    watch.add(optimizer)
    assert not watch._stopped.wait(0.2) and lost == []
    # a process that is killed stays a zombie, as a child of hivemind's does
    ends: list[Callable[[], None]] = [*(process.kill for process in processes), end.set]
    ends[number]()
    wait_until(lambda: bool(lost), 5, lambda: "nothing was told")
    watch.join(5)
    end.set()
    assert lost == [name] and not watch.is_alive() and not watch.failures
