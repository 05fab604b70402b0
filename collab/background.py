"""Work that goes on beside the training and outlives whatever one turn of it brings."""

import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from collab.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """How a piece of work beside the training is doing."""

    name: str
    """What it does, as the beginning of a sentence."""
    failures: int
    """Turns that failed since the program began."""
    last_error: str
    """Of the turn that failed last; empty if none did."""
    silent_seconds: float
    """Since a turn ended well, or since the start."""


class Background(threading.Thread):
    """Takes a turn every `period` seconds until `stop`; subclasses start themselves when they are ready.

    :param name: what it does, as the beginning of a sentence: "Looking for changes".
    """

    def __init__(self, name: str, period: float) -> None:
        super().__init__(name=name, daemon=True)
        self.failures = 0
        """Turns that failed, for example because the DHT did not answer in time."""
        self._last_error = ""
        self._went_well = time.monotonic()
        self._period = period
        self._stopped = threading.Event()

    @property
    def health(self) -> Health:
        return Health(self.name, self.failures, self._last_error, time.monotonic() - self._went_well)

    def stop(self, timeout: float = 1.0) -> None:
        """No further turns; waits for the present one, `timeout` seconds at most."""
        self._stopped.set()
        self.join(timeout)

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._take_a_turn()
                self._went_well = time.monotonic()
            except Exception as error:  # noqa: BLE001 - training must outlive whatever one turn brings
                self._note_failure(error)
            self._stopped.wait(self._period)

    def _note_failure(self, error: Exception) -> None:
        """Count it; the first one of its kind in a row is said."""
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        self.failures += 1
        if reason != self._last_error and not self._stopped.is_set():
            logger.warning("%s failed, and goes on: %s", self.name, reason)
        self._last_error = reason

    @abstractmethod
    def _take_a_turn(self) -> None: ...


class Repeated(Background):
    """Calls `turn` every `period` seconds until `stop`."""

    def __init__(self, name: str, turn: Callable[[], object], period: float) -> None:
        super().__init__(name, period)
        self._turn = turn
        self.start()

    def _take_a_turn(self) -> None:
        self._turn()
