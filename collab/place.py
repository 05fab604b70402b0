"""Where in the data this computer is: kept on its disk, so that a trainer that comes back sees nothing twice."""

import fcntl
import json
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from collab.errors import UserError
from collab.files import write_text

logger = logging.getLogger(__name__)


class Place:
    """A place in the data of a run, which belongs to one process at a time.

    The name decides which samples come in which order, and the state how far they have been used. Trainers that run at
    the same time on one computer have a place each; whoever starts takes over one that nobody has any more.

    :param folder: of the run, for its places on this computer.
    :param name: of the place to begin at if there is none to take over; different on every peer.
    :param record: of a place, from a checkpoint: the one to go on from if the computer keeps none.
    """

    def __init__(self, folder: Path, name: str, record: object = None) -> None:
        self.name: str
        self.state: dict[str, Any] | None
        self.name, self.state = _parse(record) or (name, None)
        """What `save` was told last, or None at a place where nobody has begun yet."""
        self._lock: BinaryIO | None = None
        self._complained = False
        for file in sorted(folder.glob("*.json")):
            if self._own(file):
                kept = _read(file)
                if kept is not None:
                    self.name, self.state = kept
                    return
        self._own(folder / f"{sha256(name.encode()).hexdigest()[:16]}.json")

    @property
    def record(self) -> dict[str, Any]:
        """All of it, for a checkpoint. JSON."""
        return {"name": self.name, "state": self.state}

    def move(self, name: str) -> None:
        """Begin at another place, such as when the run's sources have changed."""
        self.name, self.state = name, None

    def save(self, state: dict[str, Any]) -> None:
        """Note how far the samples have been used. A full disk costs no more than that: the training goes on."""
        self.state = state
        if self._lock is None:
            return
        try:
            write_text(self._file, json.dumps(self.record))
        except UserError as error:
            if not self._complained:
                logger.warning("After a restart this peer will see some samples again: %s", error)
            self._complained = True

    def close(self) -> None:
        """Leave the place to whoever comes next."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _own(self, file: Path) -> bool:
        """Whether this process has the place in `file` now."""
        lock: BinaryIO | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = file.with_suffix(".lock").open("ab")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody else's, or nothing can be kept here
            if lock is not None:
                lock.close()
            return False
        self.close()
        self._lock, self._file = lock, file
        return True


def _read(file: Path) -> tuple[str, dict[str, Any]] | None:
    """What was kept in a file. If it is damaged, another start, at a new place, writes over it."""
    try:
        return _parse(json.loads(file.read_bytes()))
    except (OSError, ValueError):
        return None


def _parse(record: object) -> tuple[str, dict[str, Any]] | None:
    match record:
        case {"name": str(name), "state": dict(state)}:
            return name, state
    return None
