"""The run's history is whole and true: whatever the auxiliary peer has missed, and whatever a stranger claims."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from collab.trackers import read_history
from tests.collab.test_trackers import trackio_steps, wandb_steps
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, wait_until

pytestmark = pytest.mark.swarm


def last_step(trainer: Program) -> int:
    told = [line.split()[1] for line in trainer.output().splitlines() if line.startswith("step ")]
    return max((int(step.partition("/")[0]) for step in told), default=0)


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_history(folder / "metrics.jsonl")]


def test_steps_that_were_made_while_the_auxiliary_peer_was_dead_are_in_the_history(swarm: Swarm) -> None:
    swarm.environment = {"RECORDS": str(swarm.folder / "records.jsonl"), "WANDB_MODE": "offline"}
    config = swarm.configure(max_global_steps=1000, report_to=["trackio", "wandb"])
    fixed = ("--host_maddrs", "/ip4/127.0.0.1/tcp/38917", "--identity_path", str(swarm.folder / "identity.key"))
    auxiliary, address = swarm.start_auxiliary(config, *fixed)
    trainer = swarm.start_trainer("trainer", address, program="tests/swarm/trainer_with_record.py")
    auxiliary.wait_for_output("step    2/1000", timeout=120)
    auxiliary.interrupt(signal.SIGKILL)
    auxiliary.wait()
    before = last_step(trainer)
    wait_until(lambda: last_step(trainer) >= before + 3, 120, trainer.output)

    auxiliary, _ = swarm.start_auxiliary(config, *fixed)
    again = last_step(trainer)
    auxiliary.wait_for_output(f"step {again + 1:>4}/1000", timeout=120)
    for program in (trainer, auxiliary):
        program.interrupt()
        assert program.wait(90) == 0, program.output()

    folder = swarm.folder / "run"
    found = steps(folder)
    assert found == list(range(1, found[-1] + 1)), auxiliary.output()
    records = {entry["step"]: entry for entry in map(json.loads, (swarm.folder / "records.jsonl").open())}
    for entry in read_history(folder / "metrics.jsonl"):
        told = records[entry["step"]]
        assert (entry["samples"], entry["tokens"]) == (told["samples"], told["tokens"])
        assert entry["loss"] == pytest.approx(told["loss"]) and entry["time"] == pytest.approx(told["time"], abs=0.1)
    counted = json.loads((folder / "contributions.json").read_text())["names"]
    total = max(record["samples_total"] for record in records.values() if record["step"] <= found[-1])
    assert counted["trainer"] == pytest.approx(total, rel=0.01)

    assert trackio_steps(folder / "trackio") == found
    assert wandb_steps(folder) == Counter(found)
