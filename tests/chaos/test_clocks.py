"""A clock that is wrong when a trainer joins, or that jumps while it trains: it leaves, and says why."""

import signal
import time

import pytest

from tests.chaos.prices import Price
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, wait_until
from tests.swarm.test_refusals import refusal, run, volunteer  # noqa: F401 - fixtures

pytestmark = pytest.mark.chaos

TRAINER = "tests/chaos/trainer_with_clock.py"
AVERAGING_TIMEOUT, LIFETIME = 15.0, 10.0  # of `Swarm.configure`
LOOKING = 10.0  # seconds that a loaded computer may take to see something


@pytest.mark.parametrize(("ahead", "words"), [(3600, "seconds ahead of"), (-3600, "seconds behind")])
def test_a_wrong_clock_is_refused(
    run: tuple[Swarm, str],  # noqa: F811
    volunteer: Swarm,  # noqa: F811
    ahead: int,
    words: str,
    price: Price,
) -> None:
    volunteer.environment = {"CLOCK_AHEAD": str(ahead)}
    began = time.monotonic()
    message = refusal(volunteer.start_trainer("untimely", run[1], program=TRAINER))
    price(
        "a clock one hour wrong", "ahead" if ahead > 0 else "behind", seconds_until_it_is_told=time.monotonic() - began
    )
    assert words in message and "timedatectl set-ntp true" in message and "sntp -sS time.apple.com" in message
    said = float(message.split(f" {words}")[0].rpartition(" ")[2])
    assert said == pytest.approx(abs(ahead), abs=1), message


def test_a_clock_that_is_almost_wrong_is_mentioned(run: tuple[Swarm, str], volunteer: Swarm) -> None:  # noqa: F811
    volunteer.environment = {"CLOCK_AHEAD": "-2"}
    trainer = volunteer.start_trainer("hurried", run[1], program=TRAINER)
    trainer.wait_for_output("Starting from global step")
    assert "seconds behind its peers'" in trainer.output() and "timedatectl" in trainer.output()


def test_a_clock_that_jumps_costs_the_others_one_timeout(swarm: Swarm, price: Price) -> None:
    """The others would follow records from the future for an hour, also when who wrote them is gone."""
    config = swarm.configure(max_global_steps=1000, averaging_timeout=AVERAGING_TIMEOUT, metadata_expiration=LIFETIME)
    _, address = swarm.start_auxiliary(config)
    swarm.environment = {"CLOCK_JUMP": "3600"}
    jumper = swarm.start_trainer("jumper", address, program=TRAINER)
    swarm.environment = {}
    healthy = swarm.start_trainer("healthy", address)
    for trainer in (jumper, healthy):
        trainer.wait_for_output("peers 2/2", timeout=90, times=2)

    def made() -> int:
        return healthy.output().count("\nstep ")

    jumper.remember_family()
    began, before = time.monotonic(), made()
    jumper.process.send_signal(signal.SIGUSR1)
    assert jumper.wait() == 1, jumper.output()
    told = time.monotonic() - began
    error = jumper.output().rpartition("error: ")[2]
    assert "seconds ahead of" in error and "timedatectl" in error and "Traceback" not in jumper.output(), (
        jumper.output()
    )
    wait_until(lambda: made() > before, 120, healthy.output)
    late = time.monotonic() - began
    alone(healthy)
    price("a clock that jumps by an hour", seconds=late, seconds_until_it_is_told=told)
    assert late < AVERAGING_TIMEOUT + LOOKING, "the others wait for it once"


def alone(trainer: Program) -> None:
    """It goes on by itself, with nothing to take over from the one that has left."""
    made = trainer.output().count("\nstep ")
    trainer.wait_for_output("\nstep ", times=made + 3)
    assert "Took over global step" not in trainer.output().partition("peers 2/2")[2], trainer.output()
