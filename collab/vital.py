"""Whether the processes that a peer is made of are all there."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import psutil

from collab.background import Background
from collab.peer import Peer

PERIOD = 1.0


class VitalProcesses(Background):
    """Notices within `PERIOD` seconds if one of them has ended, such as by the out-of-memory killer.

    Until `stop`, which has to come before they are ended on purpose; as a context manager it stops by itself.

    hivemind does not: without libp2p's daemon a trainer goes on alone for ever, with nothing but errors in its log, and
    without the DHT's or an averager's process it waits for its answer for ever.

    :param lost: called once, in a thread of its own, with the name of the process that has ended.
    """

    def __init__(self, peer: Peer, lost: Callable[[str], None]) -> None:
        super().__init__("Watching the own processes", PERIOD)
        self._lost = lost
        dht = psutil.Process(peer.dht.pid)
        self._needed = [(dht, "the DHT's process")]
        self._needed += [(child, "libp2p's daemon") for child in dht.children() if "p2pd" in child.name()]
        self.start()

    def add(self, averagers: Iterable[Any]) -> None:
        """Averagers are needed from now on, too."""
        self._needed += [(psutil.Process(each.pid), "an averager's process") for each in averagers]

    def __enter__(self) -> "VitalProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _take_a_turn(self) -> None:
        for process, name in self._needed:
            if has_ended(process):
                self._stopped.set()
                self._lost(name)
                break


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True
