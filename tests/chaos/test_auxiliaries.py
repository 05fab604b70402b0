"""Auxiliary peers die: the others train on, and the run's history is whole and true all the same."""

import json
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from collab.trackers import read_history
from tests.chaos.prices import Price
from tests.collab.test_trackers import trackio_steps, wandb_steps
from tests.hub_server import HubServer
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, wait_until
from tests.swarm.test_publishing import NAME, assert_each_tag_has_one_whole_commit, environment

pytestmark = pytest.mark.chaos

AVERAGING_TIMEOUT = 15.0
LOOKING = 5.0  # seconds that a loaded computer may take to do and to see something


def last_step(trainer: Program) -> int:
    told = [line.split()[1] for line in trainer.output().splitlines() if line.startswith("step ")]
    return max((int(step.partition("/")[0]) for step in told), default=0)


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_history(folder / "metrics.jsonl")]


def longest_step(records: Path, after: float) -> float:
    """Seconds of a trainer's slowest global step since `after`."""
    times = [after] + [entry["time"] for entry in map(json.loads, records.open()) if entry["time"] > after]
    return max(later - sooner for sooner, later in pairwise(times))


def test_all_auxiliary_peers_die_and_nothing_but_their_help_is_lost(swarm: Swarm, price: Price) -> None:
    records = swarm.folder / "records.jsonl"
    with HubServer() as hub:
        swarm.environment = environment(hub) | {"RECORDS": str(records), "WANDB_MODE": "offline"}
        config = swarm.configure(
            max_global_steps=1000,
            target_batch_size=1024,
            averaging_timeout=AVERAGING_TIMEOUT,
            save_every=2,
            repo_id=NAME,
            report_to=["trackio", "wandb"],
        )
        first, address = swarm.start_auxiliary(config)
        second = swarm.start(
            "second", "run_aux_peer.py", "--initial_peers", address, "--run_folder", str(swarm.folder / "second"),
            "--repo_id", NAME, "--save_every", "2", "--report_to", "none",
        )  # fmt: skip
        second.wait_for_output("Others join with")
        trainer = swarm.start_trainer("trainer", address, program="tests/swarm/trainer_with_record.py")
        wait_until(lambda: NAME in hub.repos and bool(hub.repos[NAME].tags), 120, first.output)

        # ---- the other one publishes, and sees that it is alone
        first.interrupt(signal.SIGKILL)
        first.wait()
        died, published = time.time(), set(hub.repos[NAME].tags)
        wait_until(lambda: len(hub.repos[NAME].tags) > len(published), 120, second.output)
        took_over = time.time() - died
        second.interrupt(signal.SIGKILL)
        second.wait()
        died, before = time.time(), last_step(trainer)
        wait_until(lambda: last_step(trainer) >= before + 4, 120, trainer.output)
        late = longest_step(records, died)

        # ---- a new one with the identity of the first
        restarted = time.time()
        again, same_address = swarm.start_auxiliary(config)
        assert same_address.rpartition("/")[2] == address.rpartition("/")[2], "another identity"
        again.wait_for_output(f"step {last_step(trainer) + 1:>4}/1000", timeout=120)
        back = time.time() - restarted
        published = set(hub.repos[NAME].tags)
        wait_until(lambda: len(hub.repos[NAME].tags) > len(published), 120, again.output)
        for program in (trainer, again):
            program.interrupt()
            assert program.wait() == 0, program.output()
        assert_each_tag_has_one_whole_commit(hub)

    folder = swarm.folder / "run"
    found = steps(folder)
    price(
        "all auxiliary peers killed",
        seconds=late,
        seconds_until_another_publishes=took_over,
        seconds_until_it_is_back=back,
    )
    assert late < AVERAGING_TIMEOUT + LOOKING, "nobody waits for who does not train"
    assert found == list(range(1, found[-1] + 1)), again.output()
    told = {entry["step"]: entry for entry in map(json.loads, records.open())}
    for entry in read_history(folder / "metrics.jsonl"):
        own = told[entry["step"]]
        assert (entry["samples"], entry["tokens"]) == (own["samples"], own["tokens"])
        assert entry["loss"] == pytest.approx(own["loss"])
        # a step of which it heard before it knew that its only trainer was live has the time at which it heard
        assert -0.01 <= entry["time"] - own["time"] <= LOOKING
    counted = json.loads((folder / "contributions.json").read_text())["names"]
    total = max(record["samples_total"] for record in told.values() if record["step"] <= found[-1])
    assert counted["trainer"] == pytest.approx(total, rel=0.01)
    assert trackio_steps(folder / "trackio") == found
    assert wandb_steps(folder) == Counter(found)
