"""Work that goes on beside the training and outlives whatever one turn of it brings."""

import logging
import threading
from abc import abstractmethod

logger = logging.getLogger(__name__)


class Background(threading.Thread):
    """Takes a turn every `period` seconds until `stop`; subclasses start themselves when they are ready.

    :param name: what it does, as the beginning of a sentence: "Looking for changes".
    """

    def __init__(self, name: str, period: float) -> None:
        super().__init__(name=name, daemon=True)
        self.failures = 0
        """Turns that failed, for example because the DHT did not answer in time."""
        self._period = period
        self._stopped = threading.Event()

    def stop(self, timeout: float = 1.0) -> None:
        """No further turns; waits for the present one, `timeout` seconds at most."""
        self._stopped.set()
        self.join(timeout)

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._take_a_turn()
            except Exception as error:  # noqa: BLE001 - training must outlive whatever one turn brings
                self.failures += 1
                if self.failures == 1 and not self._stopped.is_set():
                    logger.warning("%s failed, and goes on: %r", self.name, error)
            self._stopped.wait(self._period)

    @abstractmethod
    def _take_a_turn(self) -> None: ...
