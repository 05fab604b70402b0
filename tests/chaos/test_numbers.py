"""One peer's numbers are of no use, or its memory is full: the others never see it."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from collab.trackers import read_history
from tests.chaos.prices import Price
from tests.swarm.conftest import Swarm

pytestmark = pytest.mark.chaos


def dropped(output: str) -> int:
    return max(map(int, re.findall(r"(\d+) micro-batches with a NaN or infinite", output)), default=0)


def test_gradients_that_are_not_finite_reach_nobody_neither_dropped_nor_sent(swarm: Swarm, price: Price) -> None:
    auxiliary, address = swarm.start_auxiliary(swarm.configure())
    # The healthy one has a fault of its own, which harms nobody.
    healthy = swarm.start_trainer("healthy", address, program="tests/chaos/trainer_with_little_memory.py")
    faulty = swarm.start_trainer("faulty", address, program="tests/chaos/trainer_with_nan.py")
    hostile = swarm.start_trainer("hostile", address, program="tests/chaos/trainer_that_sends_nan.py")
    programs = (healthy, faulty, hostile, auxiliary)
    assert [program.wait() for program in programs] == [0] * 4, hostile.output()
    folder: Path = swarm.folder / "run"
    for tensor in load_file(folder / "checkpoints" / "step-0000006" / "model.safetensors").values():
        assert tensor.isfinite().all()
    history = read_history(folder / "metrics.jsonl")
    assert history[-1]["peers_met"] == 3 and history[-1]["loss"] < history[0]["loss"]
    assert dropped(faulty.output()) and not dropped(healthy.output() + hostile.output())
    assert re.search(r"peer \w+ sent values that are not finite; they were left out", healthy.output())
    halved = [line.split()[-2] for line in healthy.output().splitlines() if line.startswith("Memory ran out")]
    assert halved == ["8", "4"] and "Memory ran out" not in faulty.output()
    price("NaN, infinite gradients, memory full", samples_of_the_faulty_one=16 * dropped(faulty.output()))
