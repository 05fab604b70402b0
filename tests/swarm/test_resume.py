"""A lone trainer that is stopped and goes on from its checkpoint does what it would have done without the break."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.swarm.conftest import TINY_MODEL, Swarm
from tests.swarm.processes import Program, wait_until

pytestmark = pytest.mark.swarm


def test_a_resumed_trainer_has_the_next_losses_to_the_last_bit(swarm: Swarm) -> None:
    # With dropout, the random numbers have to go on too. About four micro-batches make a global step.
    config = swarm.configure(max_global_steps=10_000, target_batch_size=64, learning_rate=0.001)
    model = swarm.folder / "model.json"
    model.write_text(TINY_MODEL.replace('dropout_prob": 0.0', 'dropout_prob": 0.1'))

    def records(name: str) -> list[dict[str, Any]]:
        path = swarm.folder / f"{name}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def train(name: str, cache: Path, *arguments: str, steps: int) -> None:
        swarm.environment = {"RECORDS": str(swarm.folder / f"{name}.jsonl")}
        # The peer's id names its place in the data, so that the run that is not stopped needs the same one.
        own = ("--identity_path", str(swarm.folder / "key"), "--cache_dir", str(cache), "--threads", "1")
        numerics = ("--precision", "float32")  # left out, it is measured, and another one has other losses
        command = ("--config", str(config), *own, *numerics, *arguments)
        program: Program = swarm.start(name, "tests/swarm/trainer_with_record.py", *command)
        wait_until(lambda: len(records(name)) >= steps or program.process.poll() is not None, 90, program.output)
        program.interrupt()  # most likely in the middle of a global step
        assert program.wait() == 0, program.output()

    checkpoint, here = swarm.folder / "left", swarm.new_cache("here")
    train("whole", swarm.new_cache("of the whole"), steps=40)
    train("first", here, "--save_dir", str(checkpoint), steps=12)
    left = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    train("same computer", here, "--from", str(checkpoint), steps=12)
    train("another computer", swarm.new_cache("elsewhere"), "--from", str(checkpoint), steps=12)

    whole = records("whole")[: left + 10]
    assert [record["step"] for record in whole] == list(range(1, left + 11)), "it ended too early to be compared with"
    for name in ("same computer", "another computer"):
        parts = [*records("first"), *records(name)[:10]]
        for ours, theirs in zip(parts, whole, strict=True):
            for key in ("step", "loss", "samples", "sketch"):
                assert ours[key] == theirs[key], (name, ours["step"], key)
