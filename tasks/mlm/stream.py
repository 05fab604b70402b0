"""One source as a stream: passes in orders of their own, shuffled through windows, resumed, retried."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from collab.errors import UserError
from tasks.mlm.windows import DAMAGED, EMPTY, Damaged, Draws, Fault, Part, Piece, Unavailable, Window, admitted, seeded

WIDTH = 4  # pieces read side by side: a file of news after a file of novels should come mixed
CHARACTERS = 32 << 20  # kept for shuffling at most, however long the documents are
PACE = 8  # documents between the opening of two windows while the first ones fill the buffer
TRIES = 3  # after which a source is left out, a piece given up, or a run that reads nothing at all refused
MOST_PUT_OFF = 32  # pieces to come back to; a folder that is gone would bring any number
PATIENCE = 20.0  # seconds to wait for the network while other sources have text
LONGEST_PAUSE = 300.0  # seconds between two tries of a source that cannot be read

logger = logging.getLogger(__name__)


@dataclass
class Collection:
    """What there is to read in a source.

    :param name: the source in words
    :param fingerprint: differs when a position in this collection would mean something else
    :param remote: read ahead by a thread, which may be waited for
    :param keep: read once and kept in memory
    """

    name: str
    pieces: list[Piece]
    fingerprint: str
    remote: bool = False
    keep: bool = False


FROM_THE_MIDDLE, THE_REST, WHOLE = range(3)  # the turns in which a piece is read


@dataclass(eq=False)
class Reader:
    """A piece that is being read: its place in the order of the pass, and the window that comes next."""

    position: int
    start: int = 0
    turn: int = FROM_THE_MIDDLE
    tries: int = 0  # that failed
    retry_at: float = 0.0
    windows: Iterator[Window] | None = None


@dataclass(eq=False)
class OpenWindow:
    """Documents in memory, in reversed order of their use."""

    position: int
    number: int
    texts: list[str]
    count: int


@dataclass
class Admitted:
    """A window as it is used: the documents of this run's part, and how many of the other."""

    number: int
    texts: list[str]
    others: int
    faults: list[Fault] = field(default_factory=list)


def pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(2.0 ** min(failures - 1, 60), LONGEST_PAUSE)


class Stream:
    """The documents of one source, pass after pass.

    A pass reads the pieces in an order of its own, WIDTH at a time, window by window. Windows lie open until about
    `buffer` documents are in memory; each document is drawn from one of them by chance. Everything that decides about
    the next document is a number in `state_dict`.

    A piece that cannot be read is put off, and others are read instead. When no others are left, it is given up only
    if what was read before can be read now. A stream of which nothing can be read is tried again after pauses that
    double, and gives what it has meanwhile.

    :param name: decides about all orders
    :param buffer: documents to shuffle; 0 for one plain pass in stored order
    :param clock: seconds, increasing
    """

    def __init__(
        self,
        collection: Collection,
        *,
        name: str,
        part: Part,
        buffer: int,
        endless: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.collection = collection
        self.name, self.part, self.endless, self.clock = name, part, endless, clock
        self.buffer = buffer
        self.width = WIDTH if buffer else 1
        self.finished = False
        self.passes = 0  # that are over
        self.documents = self.others = 0  # of this part and of the other one
        self.skipped: Counter[str] = Counter()
        self.windows: list[OpenWindow] = []
        self.wait = 0  # documents before the next window may be opened
        self.draws = Draws(name)
        self.failures = 0  # in a row
        self.error: UserError | None = None  # the last one
        self.left_out = self.late = False
        self.retry_at = 0.0
        self._bad_starts = 0
        self._unread = self._characters = 0  # in the windows
        self._pending: tuple[Reader, Future[Admitted | None]] | None = None
        self._kept: Admitted | None = None
        self._begin()

    def _begin(self) -> None:
        """Draw the order of a pass."""
        pieces = self.collection.pieces
        self.given = 0  # documents of this pass
        self.opened = 0  # positions of the order that were begun
        self.middles: dict[int, float] = {}  # where the first pieces are begun, as a share of their length
        self.readers: list[Reader] = []
        self.put_off: list[Reader] = []
        self._worked: tuple[int, int] | None = None  # position and number of the last window that could be read
        if not self.buffer:
            self.order = list(range(len(pieces)))
            return
        random = seeded(f"{self.name} pass {self.passes}")
        self.order = random.permutation(len(pieces)).tolist()
        # Peers that begin in the middle of the files that cannot be cut stay apart. Only in the first files: what is
        # passed over is read twice.
        for position in range(min(self.width, len(pieces))):
            if pieces[self.order[position]].sequential:
                self.middles[position] = float(random.random())

    # ------------------------------------------------------------------------------------------ giving

    def take(self) -> str | None:
        """The next document; None when there is none at present, or none any more (`finished`).

        :raises UserError: for a source that has never given anything and will not
        """
        if self.wait > 0 and self.windows:
            self.wait -= 1
        elif self._wants():
            self.replenish()
        windows = self.windows
        if not windows:
            return None
        chosen = int(self.draws() * len(windows)) if self.buffer else 0
        texts = windows[chosen].texts
        text = texts.pop()
        self._unread -= 1
        self._characters -= len(text)
        if not texts:
            windows[chosen] = windows[-1]
            windows.pop()
        self.given += 1
        self.documents += 1
        return text

    def _wants(self) -> bool:
        if not self.windows:
            return True
        return self._characters < CHARACTERS and (self._unread < self.buffer or len(self.windows) < self.width)

    def due(self) -> float:
        """Seconds until `take` may bring more than it does now."""
        if self._pending:
            return 0.2
        at = self.retry_at
        if self.put_off and not self._others():
            at = max(at, min(reader.retry_at for reader in self.put_off))
        return max(at - self.clock(), 0.0)

    @property
    def good(self) -> bool:
        """Whether anything was ever read."""
        return self.documents + self.others + self._unread > 0

    def report(self) -> dict[str, Any]:
        """What was read, as plain numbers: documents given, of the other part, passes, skipped by reason."""
        return {
            "source": self.collection.name,
            "documents": self.documents,
            "of_the_other_part": self.others,
            "passes": self.passes,
            "skipped": dict(self.skipped),
            "left_out": self.left_out or self.late,
        }

    # ------------------------------------------------------------------------------------------ reading

    def replenish(self) -> None:
        """Open one more window, if there is one and the source can be read."""
        while not self.finished:
            if self._pending is None and not self.ask():
                if self.clock() < self.retry_at or self.windows or self.put_off:
                    self._say_whether_left_out()
                    return
                self._end_pass()
                continue
            assert self._pending is not None
            reader, future = self._pending
            if not self._answered(future):
                return
            self._pending = None
            try:
                window = future.result()
            except Damaged as error:
                self._end(reader)
                self._bad_start(error)
                self._note([Fault(DAMAGED, str(error))])
                self.retry_at = 0.0
                continue
            except Unavailable as error:
                self._put_off(reader, error)
                continue
            if window is None:
                self._end(reader)
                self.failures = 0
                continue
            self._install(reader, window)
            if self.collection.remote:
                self.ask()
            if window.texts:
                return

    def ask(self) -> bool:
        """Begin to read the next window; a thread does it where the network is involved."""
        if self._pending:
            return True
        if self.clock() < self.retry_at or (reader := self._next_reader()) is None:
            return False
        future: Future[Admitted | None] = Future()

        def read() -> None:
            try:
                future.set_result(self._read_or_give_up(reader))
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)

        self._pending = reader, future
        if self.collection.remote:
            threading.Thread(target=read, name=f"Reading {self.collection.name}", daemon=True).start()
        else:
            read()
        return True

    def close(self, timeout: float) -> None:
        """Wait for the thread, if one is reading: Python may not end while it is inside pyarrow."""
        if self._pending:
            wait([self._pending[1]], timeout)
        self.readers.clear()

    def _others(self) -> bool:
        return bool(self.readers) or self.opened < len(self.order)

    def _next_reader(self) -> Reader | None:
        now = self.clock()
        put_off = next((reader for reader in self.put_off if reader.retry_at <= now), None)
        # While nothing works, pieces that failed and others take turns.
        if put_off and (self.failures % 2 == 0 or not self._others()):
            return put_off
        if self.opened < len(self.order) and len(self.readers) < self.width:
            return Reader(self.opened)
        return self.readers[0] if self.readers else None

    def _read_or_give_up(self, reader: Reader) -> Admitted | None:
        try:
            return self._read(reader)
        except Unavailable as error:
            last_chance = max(reader.tries, self.failures) + 1 >= TRIES and not self._others()
            if (last_chance or len(self.put_off) >= MOST_PUT_OFF) and self._works():
                raise Damaged(str(error)) from error
            raise

    def _works(self) -> bool:
        """Whether what could be read before can be read now."""
        if self._worked is None:
            return False
        try:
            return self._read(Reader(*self._worked, turn=WHOLE)) is not None
        except (Damaged, Unavailable):
            return False

    def _read(self, reader: Reader) -> Admitted | None:
        """Read the next window of a piece; None at its end."""
        if self.collection.keep and self._kept:
            return None if reader.start else replace(self._kept, faults=[])
        if reader.windows is None:
            index = self.order[reader.position]
            order = f"{self.name} pass {self.passes} piece {index}" if self.buffer else None
            middle = 0.0 if reader.turn == WHOLE else self.middles.get(reader.position, 0.0)
            low, high = (0.0, middle) if reader.turn == THE_REST else (middle, 1.0)
            reader.windows = self.collection.pieces[index].windows(low, high, reader.start, order)
        for window in reader.windows:
            texts, others = admitted(window.texts, self.part)
            read = Admitted(window.number, texts, others, window.faults)
            if self.collection.keep:
                self._kept = read
            return read
        return None

    def _answered(self, future: Future[Any]) -> bool:
        if not future.done() and not self.late:
            wait([future], PATIENCE)
        if self.late and future.done():
            logger.info("%s answers again.", self.collection.name)
            self.late = False
        elif not self.late and not future.done():
            logger.warning(
                "%s has not answered for %.0f seconds. The other sources go on; it comes back when it answers.",
                self.collection.name,
                PATIENCE,
            )
            self.late = True
        return future.done()

    def _install(self, reader: Reader, window: Admitted) -> None:
        self._withdraw(reader)
        if self.collection.pieces[self.order[reader.position]].sequential:
            self.readers.append(reader)
        reader.start, reader.tries = window.number + 1, 0
        self._worked = reader.position, window.number
        self.failures, self.retry_at = 0, 0.0
        if self.left_out:
            logger.info("%s can be read again, and comes back.", self.collection.name)
            self.left_out = False
        self.others += window.others
        wrong = next((fault.message for fault in window.faults if fault.kind != EMPTY), None)
        if wrong and not window.texts and not window.others:
            self._bad_start(UserError(wrong))
        self._note(window.faults)
        if window.texts:
            self._open(reader.position, window)
            self.wait = min(PACE, len(window.texts) // 2) if self.buffer else 0

    def _open(self, position: int, window: Admitted, taken: int = 0) -> None:
        count = len(window.texts)
        texts = window.texts[::-1]
        if self.buffer:
            name = f"{self.name} pass {self.passes} window {position} {window.number}"
            texts = [window.texts[index] for index in seeded(name).permutation(count).tolist()]
        del texts[max(count - taken, 0) :]
        if texts:
            self.windows.append(OpenWindow(position, window.number, texts, count))
            self._unread += len(texts)
            self._characters += sum(map(len, texts))

    def _withdraw(self, reader: Reader) -> None:
        if reader in self.put_off:
            self.put_off.remove(reader)
        elif reader in self.readers:
            self.readers.remove(reader)
        else:
            self.opened += 1

    def _end(self, reader: Reader) -> None:
        """Read nothing more of a piece, or, behind its end or its damage, what comes before the middle."""
        self._withdraw(reader)
        if reader.turn == FROM_THE_MIDDLE and reader.position in self.middles:
            self.readers.insert(0, Reader(reader.position, turn=THE_REST))

    # ------------------------------------------------------------------------------------------ what goes wrong

    def _put_off(self, reader: Reader, error: Unavailable) -> None:
        """Come back to a piece later."""
        others = self._others()
        if reader in self.put_off or len(self.put_off) < MOST_PUT_OFF:
            self._withdraw(reader)
            self.put_off.append(reader)
        self.error = error
        self.failures += 1
        reader.tries += 1
        reader.windows = None
        reader.retry_at = self.clock() + pause(reader.tries)
        if self.failures > 1 or not others:
            self.retry_at = self.clock() + pause(self.failures)

    def _say_whether_left_out(self) -> None:
        if self.failures >= TRIES and self.good and not self.windows and not self.left_out:
            self.left_out = True
            logger.warning(
                "%s is left out for now: %s It is tried again at intervals and comes back when it can be read.",
                self.collection.name,
                self.error,
            )

    def _bad_start(self, error: UserError) -> None:
        """Refuse a source of which nothing could ever be read."""
        if self.good:
            return
        self.error = error
        self._bad_starts += 1
        if self._bad_starts >= TRIES:
            raise error

    def _end_pass(self) -> None:
        if self.given == 0:
            self._refuse_if_empty()
            if self.endless:  # a pass that gave something before gives nothing now: do not look for it at full speed
                self.failures += 1
                self.retry_at = self.clock() + pause(self.failures)
        self.passes += 1
        if self.endless:
            self._begin()
        else:
            self.finished = True

    def _refuse_if_empty(self) -> None:
        if self.documents or (self.part == "heldout" and self.others):
            return
        if self.error and not self.good:
            raise self.error
        if self.others:
            what = f"to train on: its {self.others} documents fell into the held-out part. Add more text."
        else:
            what = "at all: it was read to its end and held only white space. Check its column and text."
        raise UserError(f"There is no document in {self.collection.name} {what}")

    def _note(self, faults: Iterable[Fault]) -> None:
        """Count what was skipped, and say so at the 1st, 10th, 100th ... of each kind."""
        for kind, message in faults:
            self.skipped[kind] += 1
            count = self.skipped[kind]
            if count == 1:
                logger.warning("Skipped, and only counted from now on: %s", message)
            elif str(count).strip("0") == "1":
                logger.warning(
                    "%d documents or files of %s were skipped because %s. The last: %s",
                    count,
                    self.collection.name,
                    kind,
                    message,
                )

    # ------------------------------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """Where it is, in some kilobytes of plain JSON."""
        return {
            "source": self.collection.name,
            "fingerprint": self.collection.fingerprint,
            "finished": self.finished,
            "passes": self.passes,
            "given": self.given,
            "documents": self.documents,
            "others": self.others,
            "skipped": dict(self.skipped),
            "drawn": self.draws.drawn,
            "wait": self.wait,
            "opened": self.opened,
            "readers": [[reader.position, reader.start, reader.turn] for reader in self.readers],
            "put_off": [[reader.position, reader.start, reader.turn] for reader in self.put_off],
            "windows": [[open.position, open.number, open.count - len(open.texts)] for open in self.windows],
        }

    def start_after(self, state: Mapping[str, Any]) -> None:
        """Begin with a pass that a state of another collection has not seen."""
        self.passes = int(state["passes"]) + 1
        self._begin()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; only the windows that were open are read again.

        :raises KeyError, TypeError, ValueError, IndexError: for a state that is none
        """
        self.finished, self.passes = bool(state["finished"]), int(state["passes"])
        self._begin()
        self.given, self.documents, self.others = (int(state[key]) for key in ("given", "documents", "others"))
        self.opened, self.wait = int(state["opened"]), int(state["wait"])
        self.skipped = Counter({str(kind): int(count) for kind, count in state["skipped"].items()})
        self.draws = Draws(self.name, int(state["drawn"]))
        self.readers, self.put_off = (
            [Reader(int(position), int(start), int(turn)) for position, start, turn in state[key]]
            for key in ("readers", "put_off")
        )
        taken = {(int(position), int(number)): int(count) for position, number, count in state["windows"]}
        found: dict[tuple[int, int], Admitted] = {}
        for position in sorted({position for position, _ in taken}):
            self._read_again(position, [number for place, number in taken if place == position], found)
        for key, count in taken.items():
            if key in found:
                self._open(key[0], found[key], count)

    def _read_again(self, position: int, numbers: list[int], found: dict[tuple[int, int], Admitted]) -> None:
        reader = Reader(position, min(numbers), WHOLE)
        try:
            while reader.start <= max(numbers) and (window := self._read(reader)):
                reader.start = window.number + 1
                self._worked = position, window.number
                found[position, window.number] = window
        except (Damaged, Unavailable) as error:
            self._note([Fault(DAMAGED, str(error))])
            return
        for other in self.readers:
            if (other.position, other.start, other.turn) == (position, reader.start, FROM_THE_MIDDLE):
                other.windows = reader.windows
