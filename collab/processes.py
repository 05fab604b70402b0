"""Starting and ending a peer's processes: signals, children, and the last line that a person reads."""

import atexit
import contextlib
import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from types import FrameType
from typing import NoReturn

from collab.errors import UserError

NOTICE_SECONDS = 0.05
MOST_OPEN_FILES = 2**20
_scratch_folder: str | None = None


class StopSignal:
    """Ctrl-C (SIGINT) and SIGTERM ask this peer to leave; a second one ends it at once.

    hivemind sets SIGINT to ignored in the parent when it starts an averager (averaging/averager.py:334), so `listen`
    is called after the optimizer is built and whenever an averager was started since.
    """

    def __init__(self) -> None:
        # No threading.Event: its lock is held for a moment when somebody begins to wait for it, and a handler that
        # runs just then waits for that lock for ever, in the very thread that holds it.
        self._asked = False

    def listen(self) -> None:
        """Take over SIGINT and SIGTERM. Main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nLeaving the swarm (once more to leave at once) ...", file=sys.stderr, flush=True)

    def __bool__(self) -> bool:
        return self._asked

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds` at most; True soon after a signal came."""
        give_up = time.monotonic() + seconds
        while not self._asked and (left := give_up - time.monotonic()) > 0:
            time.sleep(min(left, NOTICE_SECONDS))
        return self._asked


def scratch_folder() -> str | None:
    """Where to put what is needed only as long as this process lives: it goes when the process ends, SIGKILL included.

    None, tempfile's word for its own choice, before `guard_children`.
    """
    return _scratch_folder


def guard_children() -> None:
    """From now on, no child of this process outlives it, nor its `scratch_folder`, however it ends (SIGKILL included).

    hivemind forks a DHT and several averagers, and the DHT starts `p2pd`; if their parent is killed they stay, keep
    the port and the peer id, and look alive to the swarm. Here every forked child, and so whatever it starts, joins the
    process group of a small watcher. The watcher holds the reading end of a pipe whose writing end only this process
    has: when that closes, it kills the group and removes the folder. As a second effect Ctrl-C in a terminal reaches
    only this process, which then says goodbye through children that still live.

    Call it once, before any child is started.
    """
    global _scratch_folder
    folder = _scratch_folder = tempfile.mkdtemp(prefix="samiti-")
    reading_end, writing_end = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        _watch(reading_end, writing_end, folder)
    os.close(reading_end)
    os.setpgid(watcher, watcher)
    multiprocessing.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]  # of its sockets

    owner = os.getpid()

    def in_child() -> None:
        if os.getppid() == owner:  # a grandchild has the group already, and the descriptor may be another file there
            os.close(writing_end)
        os.setpgid(0, watcher)
        # Handlers of the parent would only set its flag here, so that `Process.terminate()` had no effect.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def at_exit() -> None:
        if os.getpid() == owner:
            os.write(writing_end, b"!")
            os.close(writing_end)
            os.waitpid(watcher, 0)

    # after multiprocessing has closed its sockets
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=-100)
    os.register_at_fork(after_in_child=in_child)
    atexit.register(at_exit)


def _watch(reading_end: int, writing_end: int, folder: str) -> NoReturn:
    """The watcher's whole life: wait until the parent is gone, then end its other children and itself.

    Who ends a group ends with it; so if the parent cannot clear up any more, a child outside of the group does both.
    """
    try:
        os.setpgid(0, 0)
        os.close(writing_end)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _name_process(b"samiti-watcher")
        group, clears_up_itself = os.getpgrp(), os.read(reading_end, 1)
        if not clears_up_itself:
            with contextlib.suppress(OSError):  # no more processes: ending some matters most
                if os.fork():
                    signal.pause()
                os.setpgid(0, 0)
        os.killpg(group, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def _name_process(name: bytes) -> None:
    if sys.platform == "linux":
        pr_set_name = 15  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_name, name, 0, 0, 0)


def restart_program(*more: str) -> NoReturn:
    """Begin anew with the same arguments and `more`, in the same process; its children end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.closerange(3, MOST_OPEN_FILES)  # PyTorch's shared memory would stay as long as its socket is open
    os.execv(sys.executable, [sys.executable, *sys.argv, *more])


OUT_OF_FILES = (
    "This program can open no more files ('Too many open files'), so that it cannot talk to its peers, and ends here; "
    "they go on without it. To raise the limit, run `ulimit -n 4096` in the shell that starts it, as root if need be, "
    "then start again."
)


def _is_out_of_files(error: BaseException | None) -> bool:
    """Whether this, or what was being handled when it came, is for want of a file descriptor; torch has only words."""
    while error is not None:
        numbers = (errno.EMFILE, errno.ENFILE)
        if getattr(error, "errno", None) in numbers or os.strerror(errno.EMFILE) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run a program's `main()` and end it: a UserError as one clear message and status 1, a forced Ctrl-C as 130.

    Without a free file descriptor nothing ends in the usual way; its watcher takes the children along all the same.
    """
    status = 0
    try:
        main()
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if not _is_out_of_files(error):
            raise
        print(f"\nerror: {OUT_OF_FILES}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
