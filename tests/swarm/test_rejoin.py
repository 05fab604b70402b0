"""Swarms that are apart become one: by a peer that knows both, or by a peer that looks for those it has lost."""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from collab.peer import Peer
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, assert_no_survivors, end_all, wait_until

pytestmark = pytest.mark.swarm

LAST_STEP = 16


class Peers:
    """Regression peers that begin at once, each in the swarm whose addresses it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []
        (folder / "go").touch()

    def start(self, *initial_peers: str, pace: float = 0.03) -> None:
        number = len(self.programs)
        command = ["-m", "benchmarks.regression_peer", str(self.folder), "--number", str(number)]
        command += ["--steps", str(LAST_STEP), "--pace", str(pace), "--initial_peers", *initial_peers]
        command += ["--settings", json.dumps({"target_batch_size": 3000})]
        program = Program(f"peer-{number}", command, self.folder / f"peer-{number}.log")
        self.programs.append(program)

    def address(self, number: int) -> str:
        """Of a peer that is ready."""
        wait_until((self.folder / f"ready-{number}").exists, 60, self.programs[number].output)
        return (self.folder / f"address-{number}").read_text()

    def reports(self, number: int) -> list[dict[str, Any]]:
        return json.loads((self.folder / f"log-{number}.json").read_text())["reports"]

    def output(self) -> str:
        return "\n".join(program.output() for program in self.programs)


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    peers = Peers(tmp_path)
    yield peers
    end_all(peers.programs)


@pytest.fixture
def observers() -> Iterator[list[Peer]]:
    """Peers of the test itself, which only look."""
    observers: list[Peer] = []
    yield observers
    for observer in observers:
        observer.close()


def steps_in(observer: Peer) -> list[int]:
    """The global steps of all trainers that this peer sees."""
    answer = observer.dht.get("regression_progress", latest=True)
    return [entry.value["epoch"] for entry in answer.value.values() if entry.value] if answer is not None else []


def test_two_swarms_that_were_started_apart_become_one_through_a_peer_that_knows_both(
    peers: Peers, observers: list[Peer]
) -> None:
    peers.start(pace=0.06)
    peers.start()
    slow, fast = peers.address(0), peers.address(1)
    peers.start(slow, pace=0.06)
    peers.start(fast)
    for address in (slow, fast):
        observers.append(Peer(initial_peers=[address], host_maddrs=["/ip4/127.0.0.1/tcp/0"]))

    def far_apart() -> bool:
        behind, ahead = map(steps_in, observers)
        return len(behind) == len(ahead) == 2 and min(behind) >= 1 and min(ahead) >= max(behind) + 2

    wait_until(far_apart, 40, peers.output)
    peers.start(slow, fast)
    assert [program.wait() for program in peers.programs] == [0] * 5, peers.output()

    for number in range(5):
        reports = peers.reports(number)
        # Whoever reaches the last step first may leave before the others look again.
        assert max(report["met"] for report in reports if report["applied"]) == 5, (number, reports)
    ours, *others = (load_file(peers.folder / f"weights-{number}.safetensors") for number in range(5))
    for theirs in others:
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)


def test_a_trainer_finds_the_auxiliary_peer_that_began_a_swarm_of_its_own_after_a_crash(swarm: Swarm) -> None:
    """Nobody told the restarted auxiliary peer of the swarm that it had; newcomers would join the wrong one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        fixed_port = ("--host_maddrs", f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}")
    config = swarm.configure(max_global_steps=1000)
    crashed, address = swarm.start_auxiliary(config, *fixed_port)
    faithful = swarm.start_trainer("faithful", address)
    faithful.wait_for_output("step 1/1000")
    crashed.interrupt(signal.SIGKILL)
    crashed.wait()
    assert_no_survivors(crashed)
    (swarm.folder / "run" / "peers.txt").unlink(missing_ok=True)  # with it, it finds the trainer by itself

    restarted, same_address = swarm.start_auxiliary(config, *fixed_port)
    assert same_address == address, "it has its identity and its port again"
    newcomer = swarm.start_trainer("newcomer", address)
    faithful.wait_for_output("LOST SIGHT of 1 of 1 other peers")
    faithful.wait_for_output("In sight again")
    for trainer in (faithful, newcomer):
        trainer.wait_for_output("peers 2/2")
    restarted.wait_for_output("peers 2/2")
