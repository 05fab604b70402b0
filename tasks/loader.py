"""Batches that are ready before they are asked for."""

import queue
import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from tasks import Batch, Batches

AHEAD = 4  # batches
LOOK_SECONDS = 0.1

Made = tuple[Batch, dict[str, Any]] | Exception


class Loader:
    """Makes batches in a thread, some ahead of their use.

    A thread, because a process of its own would load the libraries once more: seconds at the start and some hundred MB
    on a volunteer's laptop. Most of the work is done without Python's lock, in C++ and numpy.

    :param stream: what is made. Used by the thread alone from now on.
    :param stop: becomes true when nobody wants batches any more: then they end, also while one is waited for, which
      takes as long as the network is away.
    :param pinned: put batches into memory that a GPU can fetch by itself, while the next ones are made.
    """

    def __init__(self, stream: Batches, stop: object = False, pinned: bool = False) -> None:
        self._stop, self._pinned = stop, pinned
        self._put_back: Iterator[Batch] = iter(())
        self._begin(stream)

    def _begin(self, stream: Batches) -> None:
        self._stream, self._state = stream, stream.state_dict()
        self._ready: queue.Queue[Made] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        arguments = (stream, self._ready, self._closing, self._pinned)
        self._thread = threading.Thread(target=_make, args=arguments, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        for batch in self._put_back:
            return batch
        made = None
        while made is None:
            try:
                made = self._ready.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if self._stop:
                    raise StopIteration from None
        if isinstance(made, Exception):
            self._ready.put(made)  # whoever asks again gets the same answer
            raise made
        batch, self._state = made
        return batch

    def put_back(self, batches: Iterable[Batch]) -> None:
        """Give these before any other: a batch that was too large, in parts that are made when they are asked for."""
        self._put_back = chain(batches, self._put_back)

    def state_dict(self) -> dict[str, Any]:
        """The stream's, after the batch that was taken last; those made ahead are not in it. JSON."""
        return self._state

    def close(self) -> None:
        """End the thread as soon as it is done with its batch, and give up what it has made ahead."""
        self._closing.set()
        self._stream.close()

    def restart(self, stream: Batches) -> None:
        """Go on with another stream. What was made ahead is given up; what was put back is not."""
        self.close()
        self._begin(stream)


def _make(stream: Batches, ready: "queue.Queue[Made]", closing: threading.Event, pinned: bool) -> None:
    made: Made | None = None
    while not (closing.is_set() or isinstance(made, Exception)):
        try:
            batch = next(stream)
            if pinned:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            made = batch, stream.state_dict()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the batch is asked for
            made = error
        while not closing.is_set():
            try:
                ready.put(made, timeout=LOOK_SECONDS)
                break
            except queue.Full:
                continue
