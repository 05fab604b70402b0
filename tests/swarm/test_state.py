"""The common state: who has another one takes it over, and it outlives the trainers."""

import re

import pytest

from collab.trackers import read_history
from tests.swarm.conftest import Swarm
from tests.swarm.processes import wait_until

pytestmark = pytest.mark.swarm

ASTRAY = "this peer's model is another one than most have"


def test_a_peer_whose_model_strays_takes_over_that_of_the_others(swarm: Swarm) -> None:
    # Without averaging of parameters, which would spread the fault to all.
    config = swarm.configure(max_global_steps=1000, target_batch_size=3072, average_state_every=1000)
    auxiliary, address = swarm.start_auxiliary(config)

    def spread() -> list[float]:
        return [entry["model_spread"] for entry in read_history(swarm.folder / "run" / "metrics.jsonl")]

    # It comes first: who takes over a state waits for the averaging of parameters before it compares.
    odd = swarm.start_trainer("odd", address, program="tests/swarm/trainer_that_strays.py")
    odd.wait_for_output("Starting from global step")
    healthy = [swarm.start_trainer(name, address) for name in ("one", "two")]
    odd.wait_for_output(ASTRAY, timeout=180)
    wait_until(lambda: max(spread()) > 0.1, 20, lambda: f"the fault did not show: {spread()}")
    wait_until(lambda: "Took over global step" in odd.output().partition(ASTRAY)[2], 60, odd.output)
    wait_until(lambda: spread()[-1] < 0.01, 60, lambda: f"{spread()}")
    programs = (*healthy, odd, auxiliary)
    for program in programs:
        program.interrupt()
    assert [program.wait() for program in programs] == [0] * 4, odd.output()
    for program in healthy:
        assert "another one than most have" not in program.output()


def test_the_next_trainer_goes_on_where_all_others_have_left(swarm: Swarm) -> None:
    config = swarm.configure(max_global_steps=7, target_batch_size=2048, save_every=2)
    auxiliary, address = swarm.start_auxiliary(config)
    first = swarm.start_trainer("first", address)
    auxiliary.wait_for_output("Saved the state of global step")
    first.interrupt()
    assert first.wait() == 0, first.output()
    saved = int(re.findall(r"Saved the state of global step (\d+)", auxiliary.output())[-1])
    second = swarm.start_trainer("second", address)
    assert [second.wait(), auxiliary.wait()] == [0, 0], second.output()
    assert f"Starting from global step {saved}\n" in second.output(), second.output()
