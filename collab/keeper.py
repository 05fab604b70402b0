"""Keeping the run's state on disk: an auxiliary peer takes it over from the swarm now and then, checks and saves it."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from collab.agreement import sketch
from collab.archive import Saved
from collab.assistant import Assistant
from collab.background import Background
from collab.errors import UserError
from collab.monitor import Monitor
from collab.optimizer import SwarmOptimizer
from collab.watch import Doubt, TooEarly

logger = logging.getLogger(__name__)

PERIOD = 0.5
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 600.0  # seconds between attempts, doubled after each one


class Keeper(Background):
    """Saves the swarm's state every `every` global steps and at the end of the run, in the background until `stop`.

    A state counts when it is the one that most peers have (`watch.Sketches`; that its tensors are finite and of this
    model's shapes is checked when it is downloaded). One that does not is left to who has offered it, and another peer
    is asked. If there is nobody, or no room on the disk, the next attempts come after growing pauses.

    The assistant stands still while the state is downloaded, and not longer: nothing else changes the weights of an
    auxiliary peer, so they can be checked, saved and measured while it helps with the next round.

    :param optimizer: the auxiliary peer's; nobody else may load a state into it.
    :param model: the one that it optimizes.
    :param save: given the global step and what was checked, writes a checkpoint and returns its folder.
    :param finish: given the same step and the folder, does what may take its time: measure the model, remove what is
        old. If it fails, the checkpoint counts all the same.
    :param newest: the checkpoint that the optimizer's state is from, if it is one of this run.
    :param last_step: where the run ends; asked each time, because the organizer can change it.
    :param timeout: of an averaging round, in seconds: so long the assistant may be in the middle of one, and peers may
        take to publish what a state is compared with.
    :param compare: whether peers publish their weights at the same moment of each global step.
    """

    def __init__(
        self,
        optimizer: SwarmOptimizer,
        assistant: Assistant,
        monitor: Monitor,
        model: torch.nn.Module,
        save: Callable[[int, dict[str, Any]], Path],
        finish: Callable[[int, Path], None],
        *,
        newest: Saved | None,
        every: int,
        last_step: Callable[[], int],
        timeout: float,
        compare: bool,
    ) -> None:
        super().__init__("Keeping checkpoints", PERIOD)
        self.newest = newest
        """The newest checkpoint of this run on this computer."""
        self.complete = threading.Event()
        """The run has ended, and its last state is saved or lost."""
        self.refused = 0
        """States that were not the swarm's."""
        self._optimizer, self._assistant, self._monitor, self._model = optimizer, assistant, monitor, model
        self._save, self._finish = save, finish
        self._every, self._last_step, self._timeout, self._compare = every, last_step, timeout, compare
        self._saved_step = optimizer.local_epoch
        self._unsaved: tuple[int, dict[str, Any]] | None = None  # what the model holds, if it is good
        self._pause, self._not_before = FIRST_PAUSE, 0.0
        self._ended_at: float | None = None
        self.start()

    def _take_a_turn(self) -> None:
        if self._saved_step >= self._last_step():
            self.complete.set()
        if self._monitor.step >= self._last_step() and self._ended_at is None:
            self._ended_at, self._not_before = time.monotonic(), 0.0
            self._assistant.stop()
        long_ago = self._ended_at is not None and time.monotonic() - self._ended_at > 2 * self._timeout
        if long_ago and self._unsaved is None:
            logger.warning("No trainer is left that could hand over the last state")
            self.complete.set()
        if self.complete.is_set() or time.monotonic() < self._not_before or not self._is_time():
            return
        if self._is_old(self._unsaved):
            self._take_over()
        if self._unsaved is not None:
            self._keep(*self._unsaved)

    def _is_time(self) -> bool:
        went_back_to = self._optimizer.went_back_to
        was_left = went_back_to is not None and went_back_to < self._saved_step
        return self._monitor.step - self._saved_step >= self._every or self._ended_at is not None or was_left

    def _is_old(self, state: tuple[int, Any] | None) -> bool:
        """Whether a newer state than this one should be saved."""
        if state is None or self._optimizer.went_back_to is not None:
            return True
        return state[0] < (self._monitor.step - self._every + 1 if self._ended_at is None else self._last_step())

    def _take_over(self) -> None:
        """Download the state of another peer into the model, and check it."""
        averager = self._optimizer.state_averager
        with self._assistant.paused(self._timeout) as free:
            before = self._optimizer.local_epoch
            loaded = free and self._optimizer.load_state_from_peers()
            step = self._optimizer.local_epoch
        if not loaded:
            averager.doubtful = frozenset()  # better ask them again than nobody
            self._wait_longer()
            return
        self._unsaved = None
        try:
            checks = self._check(step)
        except Doubt as doubt:
            self.refused += 1
            averager.doubtful |= {averager.donor}
            with self._assistant.paused(self._timeout):
                self._optimizer.skip_to(before)
            logger.warning("The state of peer %s is not saved: %s. Asking another one.", averager.donor[-6:], doubt)
            return
        averager.hold_state(step)
        if step > self._saved_step:
            self._unsaved = step, checks
        else:
            self._wait_longer()

    def _check(self, step: int) -> dict[str, Any]:
        """What speaks for the state. :raises Doubt: it is not the swarm's."""
        mine = sketch(self._model.parameters()) if self._compare else None
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return self._monitor.sketches.check(step, mine)
            except TooEarly:
                if time.monotonic() > deadline or self._stopped.wait(PERIOD):
                    raise

    def _keep(self, step: int, checks: dict[str, Any]) -> None:
        try:
            folder = self._save(step, checks)
        except UserError as error:
            self._wait_longer()
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
            raise UserError(
                f"No checkpoint can be written: {reason}. Free some space, or make the folder writable. Saving is "
                f"tried again after growing pauses of {FIRST_PAUSE:.0f} to {LONGEST_PAUSE:.0f} s; training goes on."
            ) from error
        self._unsaved, self._saved_step, self._pause = None, step, FIRST_PAUSE
        if step >= self._last_step() or self._ended_at is None:  # else the last state waits
            try:
                self._finish(step, folder)
            except Exception as error:  # noqa: BLE001 - whatever a task's measuring meets, the checkpoint is there
                self._note_failure(error)
        self.newest = Saved(step, folder)

    def _wait_longer(self) -> None:
        longest = LONGEST_PAUSE if self._ended_at is None else min(LONGEST_PAUSE, self._timeout / 4)
        self._not_before = time.monotonic() + min(self._pause, longest)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
