"""The auxiliary peer's duties fail and go on, each by itself."""

import psutil
import pytest

from collab.trackers import read_history
from tests.swarm.conftest import Swarm
from tests.swarm.processes import wait_until

pytestmark = pytest.mark.swarm


def test_an_auxiliary_peer_whose_daemon_died_starts_anew_and_its_history_has_no_gap(swarm: Swarm) -> None:
    config = swarm.configure(max_global_steps=1000)
    auxiliary, address = swarm.start_auxiliary(config, program="tests/swarm/auxiliary_that_notices_soon.py")
    trainer = swarm.start_trainer("trainer", address)
    auxiliary.wait_for_output("step    2/1000")
    children = psutil.Process(auxiliary.process.pid).children(recursive=True)
    [daemon] = [child for child in children if "p2pd" in child.name()]
    daemon.kill()
    auxiliary.wait_for_output("starting anew", timeout=90)
    auxiliary.wait_for_output("The run test is open", times=2, timeout=60)

    def steps() -> list[int]:
        return [entry["step"] for entry in read_history(swarm.folder / "run" / "metrics.jsonl")]

    made = trainer.output().count("\nstep ")
    trainer.wait_for_output("\nstep ", times=made + 2, timeout=90)  # training goes on
    wait_until(lambda: max(steps()) > made + 1, 60, auxiliary.output)
    assert steps() == list(range(1, max(steps()) + 1))  # also those that were made meanwhile
    for program in (trainer, auxiliary):
        program.interrupt()
        assert program.wait(60) == 0, program.output()
