"""What a person at a terminal sees: lines that stay, and one line that moves."""

import logging
import shutil
import sys
import threading
import time

import psutil
from hivemind.averaging.matchmaking import MatchmakingException

BLOCKS = " ▏▎▍▌▋▊▉█"


class Console:
    """Prints to standard output, from any thread.

    On a terminal `live` rewrites the last line; into a log it writes one now and then.

    :param quiet_seconds: without a terminal, at least this long between two live lines: a log shows that the program
      is alive without growing fast.
    """

    def __init__(self, quiet_seconds: float = 30.0) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.quiet_seconds = quiet_seconds
        self._live_shown = False
        self._last_print = time.monotonic()
        self._lock = threading.RLock()

    def line(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            self._clear()
            print(text, flush=True)
            self._last_print = time.monotonic()

    def live(self, text: str) -> None:
        """The moving line: replaces the previous one."""
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1
            with self._lock:
                self._clear()
                print(text[:width], end="", flush=True)
                self._live_shown = True
        elif time.monotonic() - self._last_print >= self.quiet_seconds:
            self.line(text)

    def _clear(self) -> None:
        if self._live_shown:
            print("\r\x1b[2K", end="")
            self._live_shown = False


class Stages:
    """How long each part of a program's start takes, from the start of its process on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = psutil.Process().create_time()

    def done(self, name: str) -> None:
        """The part called `name` ends here. Only the first time counts, so this may stand in a loop."""
        if name not in self.seconds:
            now = time.time()
            self.seconds[name], self._since = now - self._since, now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({parts})"


def show_log() -> None:
    """Print what this project's own modules log, from INFO up, and warnings of hivemind's, one line each."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("collab", "integrations", "tasks", "tokenizer"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    for theirs in logging.getLogger("hivemind").handlers:
        theirs.addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    """Peers vanish all the time; hivemind logs each lost connection with its whole stack.

    A round that did not come about is not repeated here at all: its report says why, and the step's line shows that.
    """
    if record.exc_info and isinstance(record.exc_info[1], MatchmakingException):
        return False
    record.exc_info = record.exc_text = None
    return True


def bar(share: float, width: int = 20) -> str:
    """A progress bar of `width` characters for a share from 0 to 1."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (BLOCKS[rest] if full < width else "") + " " * (width - full - 1)


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3:07 min, 5:12 h, 3.4 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    if whole < 2 * 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02} h"
    return f"{seconds / 86400:.1f} days"
