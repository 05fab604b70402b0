"""An auxiliary peer's part: it is there where most trainers are, whatever one of them says."""

import threading
from types import SimpleNamespace
from typing import Any

from collab.assistant import Assistant


class Optimizer:
    """What an assistant sees of one; it makes no step by itself."""

    last_round = scheduled_grads = None

    def __init__(self, local_epoch: int, trainers_step: int, lag: int) -> None:
        self.local_epoch, self.tracker = local_epoch, SimpleNamespace(trainers_step=trainers_step, lag=lag)
        self.took_part = threading.Event()

    def skip_to(self, step: int) -> None:
        self.local_epoch = step

    def step(self) -> None:
        self.took_part.set()


def step_of_assistant(own: int, trainers: int, lag: int = 0) -> int:
    """Where an assistant at `own` is when it takes part in a round, with most trainers at `trainers`."""
    optimizer: Any = Optimizer(own, trainers, lag)
    assistant = Assistant(optimizer)
    assert optimizer.took_part.wait(30)
    assistant.stop(30)
    assert not assistant.health.failures
    return int(optimizer.local_epoch)


def test_it_goes_where_most_trainers_are() -> None:
    assert step_of_assistant(own=5, trainers=-1) == 5, "nobody trains"
    assert step_of_assistant(own=5, trainers=5) == 5
    assert step_of_assistant(own=5, trainers=9) == 9
    assert step_of_assistant(own=6, trainers=5) == 6, "the round that it took part in was faster here"
    assert step_of_assistant(own=9, trainers=5) == 5, "they have begun anew"


def test_with_delayed_averaging_it_does_not_leave_the_round_that_the_others_begin() -> None:
    """Trainers count the step first, and average it then."""
    assert step_of_assistant(own=5, trainers=6) == 6
    assert step_of_assistant(own=5, trainers=6, lag=1) == 5
    assert step_of_assistant(own=5, trainers=7, lag=1) == 7
