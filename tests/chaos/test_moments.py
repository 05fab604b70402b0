"""A peer dies or freezes at each moment of a global step: nobody else loses more than time, and little of that."""

import signal
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import psutil
import pytest
import torch

from collab.agreement import distance
from tests.chaos.prices import IN_FULL, Price
from tests.swarm.peers import Peers
from tests.swarm.processes import assert_no_survivors, wait_until

pytestmark = pytest.mark.chaos

AVERAGING_TIMEOUT, TARGET, AT_STEP = 10.0, 2000, 4
SETTINGS: dict[str, Any] = {"averaging_timeout": AVERAGING_TIMEOUT, "target_batch_size": TARGET}
SETTINGS |= {"metadata_expiration": 20.0, "average_state_every": 4}
IN_A_STEP = ["before matchmaking", "in matchmaking", "in all-reduce"]
SENDING = "while its state is sent"
PARAMETERS = 3.5  # seconds that the round of parameters, which step `AT_STEP` has as well, waits for who is missing
LOOKING = 3.0  # seconds that a loaded machine may take to see something


class Watched:
    """Three peers, of which the first that gets to a moment meets with a fault."""

    def __init__(self, peers: Peers, fault: str, moment: str, steps: int) -> None:
        self._peers, self._struck, self.steps = peers, peers.folder / "struck", steps
        environment = {"FAULT": fault, "MOMENT": moment, "AT_STEP": str(AT_STEP), "STRUCK": str(self._struck)}
        for _ in range(3):
            peers.start(steps=steps, module="tests.chaos.faulty_peer", environment=environment, **SETTINGS)
        peers.go()
        self._times: list[float] = []
        self._made = 0
        if moment == SENDING:
            self._until(lambda: self._made >= AT_STEP - 1)
            peers.start(steps=steps, **SETTINGS)
        self._until(self._struck.exists)
        self.began, self.step = time.monotonic(), self._made
        self.normal = median(later - sooner for sooner, later in pairwise(self._times))
        """Seconds of a global step before."""

    @property
    def everybody(self) -> range:
        return range(len(self._peers.programs))

    def _until(self, condition: Callable[[], bool]) -> None:
        def look() -> bool:
            made = max(map(self._peers.step, self.everybody))
            if made > self._made:
                self._made = made
                self._times.append(time.monotonic())
            return condition()

        wait_until(look, 120, lambda: "".join(program.output() for program in self._peers.programs))

    def next_step(self, victim: int) -> float:
        """Wait for the others' next global step, no longer than promised; gives the seconds that it was late."""
        bound = self.normal + AVERAGING_TIMEOUT + PARAMETERS + LOOKING
        others = set(self.everybody) - {victim}
        wait_until(lambda: max(map(self._peers.step, others)) > self.step, bound, lambda: f"late by over {bound:.1f} s")
        return max(0.0, time.monotonic() - self.began - self.normal)


def assert_sound(peers: Peers, number: int, met: int, whole: bool = True) -> dict[str, Any]:
    """A peer that has ended made each step once, with a gradient, and the last one together with the others.

    :param whole: it has made each of them; else it may have taken over some from the others.
    """
    log = peers.log(number)
    steps = [report["step"] for report in log["reports"]]
    assert steps == sorted(set(steps)) and (not whole or steps == list(range(steps[0], steps[-1] + 1))), steps
    last = log["reports"][-1]
    assert last["applied"] and last["met"] == met, last
    sketches = [log["sketches"][str(step)] for step in steps]
    assert all(distance(later, sooner) > 0 for sooner, later in pairwise(sketches))
    return log


def assert_one_model(peers: Peers, numbers: list[int]) -> None:
    """After a step in which parameters were averaged: lost parts of gradients count until then."""
    one, *others = (peers.weights(number) for number in numbers)
    for other in others:
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("moment", [*IN_A_STEP, SENDING])
def test_a_killed_trainer_costs_the_others_one_timeout_at_most(peers: Peers, moment: str, price: Price) -> None:
    swarm = Watched(peers, "kill", moment, steps=12)

    def dead() -> list[int]:
        return [n for n in swarm.everybody if peers.programs[n].process.poll() == -signal.SIGKILL]

    wait_until(lambda: bool(dead()), 30, lambda: "nobody has died")
    [victim] = dead()
    late = swarm.next_step(victim)
    survivors = [number for number in swarm.everybody if number != victim]
    for number in survivors:
        assert peers.programs[number].wait() == 0, peers.programs[number].output()
    assert_no_survivors(peers.programs[victim])
    logs = [assert_sound(peers, number, met=len(survivors), whole=number < 3) for number in survivors]
    given = [sum(size for log in logs for _, size in log["by_step"].get(str(step), ())) for step in range(swarm.steps)]
    price(
        "SIGKILL",
        moment,
        seconds=late,
        samples=max(0, TARGET - given[swarm.step]),
        seconds_in_a_normal_step=swarm.normal,
    )
    short = [step for step in range(swarm.step + 1, swarm.steps) if given[step] < 0.9 * TARGET]
    # a newcomer that is one step old when it first meets the others starts over, with what it has gathered
    assert len(short) <= len(survivors) - 2, f"{given} of {TARGET}: others make up for what was lost"
    assert_one_model(peers, survivors)


@pytest.mark.parametrize("moment", IN_A_STEP)
def test_a_frozen_trainer_is_waited_for_once_and_comes_back(peers: Peers, moment: str, price: Price) -> None:
    swarm = Watched(peers, "freeze", moment, steps=72 if IN_FULL else 16)

    def frozen() -> list[int]:
        return [n for n in swarm.everybody if is_frozen(peers.programs[n].process.pid)]

    wait_until(lambda: bool(frozen()), 30, lambda: "nobody froze")
    [victim] = frozen()
    late = swarm.next_step(victim)
    others = [number for number in swarm.everybody if number != victim]
    began, step = time.monotonic(), peers.step(others[0])

    def long_enough() -> bool:
        return peers.step(others[0]) >= step + 4 and time.monotonic() - began >= (60 if IN_FULL else 0)

    wait_until(long_enough, 90, peers.programs[others[0]].output)
    step, since = peers.step(others[0]), step
    each = (time.monotonic() - began) / (step - since)
    assert each < swarm.normal * 1.5 + LOOKING, "nobody waits for it again"
    family = psutil.Process(peers.programs[victim].process.pid)
    for process in [*family.children(recursive=True), family]:
        process.resume()
    thawed = time.monotonic()
    wait_until(lambda: peers.step(victim) > step, 120, peers.programs[victim].output)
    price(
        "freeze",
        moment,
        seconds=late,
        seconds_to_come_back=time.monotonic() - thawed,
        seconds_in_a_normal_step=swarm.normal,
    )
    for number in swarm.everybody:
        assert peers.programs[number].wait() == 0, peers.programs[number].output()
        assert_sound(peers, number, met=3, whole=number != victim)
    assert_one_model(peers, list(swarm.everybody))


def is_frozen(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False
