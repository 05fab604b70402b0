"""Keeping the run's state on disk: an auxiliary peer takes it over from the swarm now and then, and saves it."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from collab.assistant import Assistant
from collab.background import Background
from collab.monitor import Monitor
from collab.optimizer import SwarmOptimizer

logger = logging.getLogger(__name__)

PERIOD = 0.5


class Saved(NamedTuple):
    """A checkpoint of this run on this disk."""

    step: int
    folder: Path


class Keeper(Background):
    """Saves the swarm's state every `every` global steps and at the end of the run, in the background until `stop`.

    The assistant stands still while the state is downloaded, and not longer: nothing else changes the weights of an
    auxiliary peer, so they can be saved while it helps with the next round.

    :param optimizer: the auxiliary peer's; nobody else may load a state into it.
    :param save: given the global step, writes a checkpoint and returns its folder.
    :param last_step: where the run ends; asked each time, because the organizer can change it.
    :param timeout: of an averaging round, in seconds: so long the assistant may be in the middle of one.
    """

    def __init__(
        self,
        optimizer: SwarmOptimizer,
        assistant: Assistant,
        monitor: Monitor,
        save: Callable[[int], Path],
        *,
        every: int,
        last_step: Callable[[], int],
        timeout: float,
    ) -> None:
        super().__init__("Keeping checkpoints", PERIOD)
        self.newest: Saved | None = None
        """The newest checkpoint of this session."""
        self.complete = threading.Event()
        """The run has ended, and its last state is saved or lost."""
        self._optimizer, self._assistant, self._monitor, self._save = optimizer, assistant, monitor, save
        self._every, self._last_step, self._timeout = every, last_step, timeout
        self._saved_step = optimizer.local_epoch
        self._ended_at: float | None = None
        self.start()

    def _take_a_turn(self) -> None:
        if self._monitor.step >= self._last_step() and self._ended_at is None:
            self._ended_at = time.monotonic()
            self._assistant.stop()
        if self._ended_at is not None and time.monotonic() - self._ended_at > 2 * self._timeout:
            logger.warning("No trainer is left that could hand over the last state")
            self.complete.set()
        if not self.complete.is_set() and self._is_time():
            self._keep()

    def _is_time(self) -> bool:
        went_back_to = self._optimizer.went_back_to
        was_left = went_back_to is not None and went_back_to < self._saved_step
        return self._monitor.step - self._saved_step >= self._every or self._ended_at is not None or was_left

    def _keep(self) -> None:
        with self._assistant.paused(self._timeout) as free:
            loaded = free and self._optimizer.load_state_from_peers()
            step = self._optimizer.local_epoch
        if loaded and step > self._saved_step:
            self.newest = Saved(step, self._save(step))
            self._saved_step = step
        if self._saved_step >= self._last_step():
            self.complete.set()
