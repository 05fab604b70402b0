"""The auxiliary peer's duties fail and go on, each by itself; several auxiliary peers take each other's place."""

import psutil
import pytest

from collab.trackers import read_history
from tests.hub_server import HubServer
from tests.swarm.conftest import Swarm
from tests.swarm.processes import wait_until

pytestmark = pytest.mark.swarm


def test_an_auxiliary_peer_whose_daemon_died_starts_anew_and_its_history_has_no_gap(swarm: Swarm) -> None:
    auxiliary, address = swarm.start_auxiliary(swarm.configure(max_global_steps=1000))
    trainer = swarm.start_trainer("trainer", address)
    auxiliary.wait_for_output("step    2/1000")
    children = psutil.Process(auxiliary.process.pid).children(recursive=True)
    [daemon] = [child for child in children if "p2pd" in child.name()]
    daemon.kill()
    auxiliary.wait_for_output("starting anew", timeout=90)
    auxiliary.wait_for_output("The run test is open", times=2, timeout=60)
    steps_before = trainer.output().count("\nstep ")
    auxiliary.wait_for_output("step ", times=auxiliary.output().count("step ") + 3, timeout=90)
    assert trainer.output().count("\nstep ") > steps_before, "training stood still"
    steps = [entry["step"] for entry in read_history(swarm.folder / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps)), steps
    for program in (trainer, auxiliary):
        program.interrupt()
        assert program.wait(60) == 0, program.output()


def test_when_the_publishing_auxiliary_peer_is_killed_another_one_publishes(swarm: Swarm) -> None:
    with HubServer() as hub:
        swarm.environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        keeping = ("--save_every", "2", "--repo_id", "community/test")
        config = swarm.configure(max_global_steps=1000, target_batch_size=2048)
        holder, address = swarm.start_auxiliary(config, *keeping)
        run_folder = ("--run_folder", str(swarm.folder / "second"), "--report_to", "none")
        second = swarm.start("second", "run_aux_peer.py", "--initial_peers", address, *run_folder, *keeping)
        second.wait_for_output("Others join with")
        trainer = swarm.start_trainer("trainer", address)

        def tags() -> set[str]:
            return set(hub.repos["community/test"].tags) if "community/test" in hub.repos else set()

        wait_until(lambda: len(tags()) >= 2, 120, lambda: holder.output() + second.output())
        assert "Published" in holder.output() and "Published" not in second.output()
        second.wait_for_output("Saved the state")  # it keeps checkpoints all the same
        holder.remember_family()
        holder.process.kill()
        second.wait_for_output("Published", timeout=90)
        assert len(hub.repos["community/test"].commits) == len(tags()), "a step was published twice"
        newcomer = swarm.start_trainer("newcomer", second.output().split("--initial_peers ")[1].split()[0])
        newcomer.wait_for_output("Starting from global step", 90)
        for program in (newcomer, trainer, second):
            program.interrupt()
            assert program.wait(60) == 0, program.output()
