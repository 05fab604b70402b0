"""What has happened in the run lately, for people: who came and went, which round failed, what was saved."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from collab.background import Health
from collab.console import duration
from collab.metrics import PeerRecord
from collab.public_text import public_line, public_name

KEPT = 100
NAMED = 3  # of many who come at once, so many by name

Kind = Literal["joined", "left", "alone", "not averaged", "saved", "published", "failed", "note"]


@dataclass(frozen=True)
class Event:
    """Something that happened at `time`, in seconds since 1970."""

    time: float
    kind: Kind
    text: str


class Events:
    """The last events of the run; any thread may add one.

    :param most: older ones are forgotten: a crowd that comes and goes cannot fill the memory.
    """

    def __init__(self, most: int = KEPT) -> None:
        self._events: deque[Event] = deque(maxlen=most)
        self._lock = threading.Lock()

    @property
    def recent(self) -> list[Event]:
        """The newest first."""
        with self._lock:
            return list(reversed(self._events))

    def add(self, kind: Kind, text: str) -> None:
        """Note what happened now; `text` is cut to one public line."""
        with self._lock:
            self._events.append(Event(time.time(), kind, public_line(text)))


class Lookback:
    """Finds out what has changed since it looked last, and adds it to `events`."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self._names: dict[str, str] = {}
        self._steps: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._published = -1
        self._cut_off_since: float | None = None

    def at_peers(self, records: Sequence[PeerRecord]) -> None:
        """Who came, who left, who made a step alone, and whose round was not averaged."""
        names = {record.peer_id: public_name(record.name) for record in records}
        self._tell("joined", [name for peer, name in names.items() if peer not in self._names], "joined")
        self._tell("left", [name for peer, name in self._names.items() if peer not in names], "left")
        new = [record for record in records if record.step > self._steps.get(record.peer_id, 0)]
        alone = [record for record in new if record.alone]
        steps = f"step {max(record.step for record in alone):,}" if alone else ""
        self._tell("alone", [names[r.peer_id] for r in alone if not r.reason], f"made {steps} alone")
        self._tell("not averaged", [names[r.peer_id] for r in alone if r.reason], f"could not average in {steps}",
                   "; ".join(sorted({r.reason for r in alone if r.reason})))  # fmt: skip
        self._names, self._steps = names, {record.peer_id: record.step for record in records}

    def at_duties(self, duties: Sequence[Health]) -> None:
        """Which duties have failed, and go on."""
        for duty in duties:
            if duty.failures > self._failures.get(duty.name, 0):
                self.events.add("failed", f"{duty.name} failed, and goes on: {duty.last_error}")
            self._failures[duty.name] = duty.failures

    def at_connection(self, cut_off: bool) -> None:
        """Whether this peer has lost sight of everybody (`Lookout.cut_off`), and when that is over."""
        if cut_off and self._cut_off_since is None:
            self._cut_off_since = time.monotonic()
            self.events.add(
                "note", "Lost sight of everybody: this computer has lost its network, or all others are off"
            )
        elif not cut_off and self._cut_off_since is not None:
            lost_for = duration(time.monotonic() - self._cut_off_since)
            self._cut_off_since = None
            self.events.add("note", f"In sight of others again after {lost_for}")

    def at_published(self, step: int) -> None:
        """Whether a newer step than before is on the Hub."""
        if step > self._published:
            self._published = step
            self.events.add("published", f"Published step {step:,}")

    def _tell(self, kind: Kind, names: Sequence[str], what: str, why: str = "") -> None:
        if names:
            more = f" and {len(names) - NAMED:,} others" if len(names) > NAMED else ""
            self.events.add(kind, f"{', '.join(names[:NAMED])}{more} {what}{f': {why}' if why else ''}")
