"""An auxiliary peer's part in the averaging: it computes averages for the others, and puts in nothing of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from collab.background import Background
from collab.optimizer import SwarmOptimizer

PAUSE_SECONDS = 0.2


class Assistant(Background):
    """Takes part in every averaging round, in the background, until `stop`.

    Peers in client mode can only average through a peer that accepts connections; with an assistant in the swarm
    there always is one. A round that fails costs it nothing but that round.

    :param optimizer: the auxiliary peer's; nobody else may use it except inside `paused`.
    """

    def __init__(self, optimizer: SwarmOptimizer) -> None:
        super().__init__("Assisting", PAUSE_SECONDS)
        self.rounds = 0
        """Rounds in which it helped."""
        self._optimizer = optimizer
        self._lock = threading.Lock()
        self.start()

    def _take_a_turn(self) -> None:
        with self._lock:
            if not self._stopped.is_set():
                self._assist()

    def _assist(self) -> None:
        optimizer = self._optimizer
        trainers_step, lag = optimizer.tracker.trainers_step, optimizer.tracker.lag
        if trainers_step > optimizer.local_epoch + lag or 0 <= trainers_step < optimizer.local_epoch - 1:
            # Most trainers are ahead, or have begun anew from an older state.
            optimizer.skip_to(trainers_step)
        before = optimizer.last_round
        optimizer.step()
        report = optimizer.last_round
        if report is not None and report is not before and not report.reason:
            self.rounds += 1

    @contextmanager
    def paused(self, timeout: float = 0.0) -> Iterator[bool]:
        """Keep it from starting a turn; gives False if it was in the middle of one for all of `timeout` seconds."""
        free = self._lock.acquire(timeout=timeout) if timeout > 0 else self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()

    def stop(self, timeout: float = 0.0) -> None:
        """No further turns, and no more waiting for a group."""
        self._stopped.set()
        pending = self._optimizer.scheduled_grads
        if pending is not None and not pending.done():
            pending.cancel()
        super().stop(timeout)
