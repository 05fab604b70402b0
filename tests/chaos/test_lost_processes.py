"""Programs lose a process that they are made of: they start anew, and are part of the swarm again."""

import time

import psutil
import pytest

from collab.trackers import read_history
from tests.chaos.prices import Price
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, wait_until

pytestmark = pytest.mark.chaos


def children(program: Program) -> tuple[psutil.Process, list[psutil.Process]]:
    """Its libp2p daemon, and its averagers."""
    program.remember_family()
    found = psutil.Process(program.process.pid).children()
    [dht] = [child for child in found if child.children()]
    forks = [child for child in found if child.name().startswith("python") and child != dht]
    return dht.children()[0], forks


def test_an_auxiliary_peer_whose_daemon_died_starts_anew_and_its_history_has_no_gap(swarm: Swarm, price: Price) -> None:
    config = swarm.configure(max_global_steps=1000)
    auxiliary, address = swarm.start_auxiliary(config)
    trainer = swarm.start_trainer("trainer", address)
    auxiliary.wait_for_output("step    2/1000")
    daemon, _ = children(auxiliary)
    daemon.kill()
    began = time.monotonic()
    auxiliary.wait_for_output("starting anew", timeout=15)
    auxiliary.wait_for_output("The run test is open", times=2)
    price("SIGKILL of a process", "the auxiliary peer's p2pd", seconds=time.monotonic() - began)

    def steps() -> list[int]:
        return [entry["step"] for entry in read_history(swarm.folder / "run" / "metrics.jsonl")]

    made = trainer.output().count("\nstep ")
    trainer.wait_for_output("\nstep ", times=made + 2, timeout=90)  # training goes on
    wait_until(lambda: max(steps()) > made + 1, 120, auxiliary.output)
    assert steps() == list(range(1, max(steps()) + 1))  # also those that were made meanwhile
    for program in (trainer, auxiliary):
        program.interrupt()
        assert program.wait() == 0, program.output()


def test_a_trainer_that_lost_a_process_trains_with_the_others_again(swarm: Swarm, price: Price) -> None:
    config = swarm.configure(max_global_steps=1000)
    auxiliary, address = swarm.start_auxiliary(config)
    one, other = (swarm.start_trainer(name, address) for name in ("one", "other"))
    for times, kind in enumerate(["averager", "p2pd"], start=1):
        before = other.output().count("peers 2/2")
        other.wait_for_output("peers 2/2", times=before + 1)
        daemon, averagers = children(other)
        (daemon if kind == "p2pd" else averagers[0]).kill()
        began = time.monotonic()
        other.wait_for_output("Starting anew", times=times, timeout=15)
        before = other.output().count("peers 2/2")
        other.wait_for_output("peers 2/2", times=before + 1)
        price("SIGKILL of a process", f"a trainer's {kind}", seconds=time.monotonic() - began)
    for program in (one, other, auxiliary):
        program.interrupt()
        assert program.wait() == 0, program.output()
