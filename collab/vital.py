"""Whether the processes and threads that a peer is made of are all there."""

import contextlib
import resource
from collections.abc import Callable
from functools import partial

import psutil

from collab.background import Background
from collab.optimizer import SwarmOptimizer
from collab.peer import Peer
from collab.selftest import possible_files

PERIOD = 1.0
SPARE_FILES = 64  # if it was for want of them: leaving in order takes some


class VitalProcesses(Background):
    """Notices within `PERIOD` seconds if one of them has ended, such as by the out-of-memory killer.

    Until `stop`, which has to come before they are ended on purpose; as a context manager it stops by itself.

    hivemind does not: without libp2p's daemon a trainer goes on alone for ever, with nothing but errors in its log,
    without the DHT's or an averager's process it waits for its answer for ever, and an error in the thread that follows
    the others' progress, such as for want of a file descriptor, ends that thread and nothing else.

    :param lost: called once, in a thread of its own, with the name of what has ended.
    """

    def __init__(self, peer: Peer, lost: Callable[[str], None]) -> None:
        super().__init__("Watching the own processes", PERIOD)
        self._lost = lost
        dht = psutil.Process(peer.dht.pid)
        daemons = [child for child in dht.children() if "p2pd" in child.name()]
        self._needed: list[tuple[Callable[[], bool], str]] = [(partial(has_ended, dht), "the DHT's process")]
        self._needed += [(partial(has_ended, daemon), "libp2p's daemon") for daemon in daemons]
        self.start()

    def add(self, optimizer: SwarmOptimizer) -> None:
        """What it is made of is needed from now on, too."""
        # first: without a free file descriptor nobody can tell whether a process runs
        follows = optimizer.tracker
        self._needed.insert(0, (lambda: not follows.is_alive(), "the thread that follows the others' progress"))
        processes = [psutil.Process(averager.pid) for averager in optimizer.averagers]
        self._needed += [(partial(has_ended, process), "an averager's process") for process in processes]

    def __enter__(self) -> "VitalProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _take_a_turn(self) -> None:
        for ended, name in list(self._needed):
            if ended():
                self._stopped.set()
                possible_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0] + SPARE_FILES)
                self._lost(name)
                break


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True
