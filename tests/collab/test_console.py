"""What a person at a terminal sees, and what a log file gets instead."""

import io
import logging
import math
import sys
from types import SimpleNamespace

import pytest
from hivemind.averaging.matchmaking import MatchmakingException

from collab.console import Console, bar, duration, show_log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on_a_terminal(text: str) -> list[str]:
    """The lines that a terminal shows: a carriage return and an erased line take back what stood there."""
    return [line.rpartition("\r\x1b[2K")[2] for line in text.split("\n")]


def a_terminal(monkeypatch) -> Terminal:
    """Takes the place of standard output. No fixture: pytest puts its own stream back between fixtures and the test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "40")
    return stream


def test_a_log_gets_no_control_characters(capsys):
    console = Console(quiet_seconds=0.0)
    console.line("first")
    console.live("half way")
    console.live("nearly")
    console.line("second")
    out = capsys.readouterr().out
    assert out == "first\nhalf way\nnearly\nsecond\n"


def test_a_log_gets_a_live_line_only_now_and_then(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("collab.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    console = Console(quiet_seconds=30.0)
    for second in range(100):
        now[0] = 1000.0 + second
        console.live(f"second {second}")
    assert capsys.readouterr().out == "second 30\nsecond 60\nsecond 90\n"


def test_lines_count_as_signs_of_life(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("collab.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    console = Console(quiet_seconds=30.0)
    for second in range(100):
        now[0] = 1000.0 + second
        console.live("live")
        if second % 20 == 0:
            console.line("a step")
    assert capsys.readouterr().out == "a step\n" * 5


def test_on_a_terminal_the_live_line_moves_and_lines_stay(monkeypatch):
    terminal = a_terminal(monkeypatch)
    console = Console()
    console.line("first")
    for share in range(3):
        console.live(f"live {share}")
    assert shown_on_a_terminal(terminal.getvalue()) == ["first", "live 2"]
    console.line("second")
    assert shown_on_a_terminal(terminal.getvalue()) == ["first", "second", ""]


def test_a_live_line_never_wraps(monkeypatch):
    """A wrapped line could not be taken back."""
    terminal = a_terminal(monkeypatch)
    Console().live("x" * 100)
    assert terminal.getvalue() == "x" * 39


@pytest.fixture
def as_before():
    """Puts the loggers back that `show_log` changes."""
    loggers = [logging.getLogger(name) for name in ("collab", "tasks", "tokenizer", "hivemind")]
    before = [(log, log.level, list(log.handlers), [list(each.filters) for each in log.handlers]) for log in loggers]
    yield
    for log, level, handlers, filters in before:
        log.setLevel(level)
        log.handlers[:] = handlers
        for handler, own in zip(handlers, filters, strict=True):
            handler.filters[:] = own


def test_our_own_modules_are_heard_and_others_are_not(capsys, as_before):
    show_log()
    logging.getLogger("collab.publish").info("published")
    logging.getLogger("tasks.mlm.task").info("training a tokenizer")
    logging.getLogger("somebody.else").info("chatter")
    assert capsys.readouterr().out == "published\ntraining a tokenizer\n"


def test_a_lost_connection_is_one_line(as_before):
    """Peers vanish all the time; hivemind logs each of them with its whole stack."""
    log = io.StringIO()
    logging.getLogger("hivemind").addHandler(logging.StreamHandler(log))
    show_log()
    try:
        raise ConnectionResetError
    except ConnectionResetError:
        logging.getLogger("hivemind.test").warning("a peer is gone", exc_info=True)
    assert log.getvalue() == "a peer is gone\n"


def test_a_round_that_did_not_come_about_is_not_told_twice(as_before):
    """The line of the step says it, with the reason."""
    log = io.StringIO()
    logging.getLogger("hivemind").addHandler(logging.StreamHandler(log))
    show_log()
    logging.getLogger("hivemind.averaging").error("nobody came", exc_info=MatchmakingException("nobody came"))
    assert not log.getvalue()


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.004, 0.3, 0.5, 0.99, 0.999, 1.0, 7.0, math.nan])
def test_a_bar_is_always_as_wide(share):
    assert len(bar(share)) == 20 and len(bar(share, width=7)) == 7


def test_a_bar_is_filled_in_eighths():
    assert bar(0) == " " * 20
    assert bar(0.5) == "█" * 10 + " " * 10
    assert bar(1) == bar(2) == "█" * 20
    assert bar(1 / 16, width=2) == "▏ "
    assert bar(0.75, width=2) == "█▌"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (42.4, "42 s"),
        (59.7, "1:00 min"),
        (60, "1:00 min"),
        (119.7, "2:00 min"),
        (187, "3:07 min"),
        (3599.8, "1:00 h"),
        (5 * 3600 + 12 * 60 + 59, "5:12 h"),
        (47 * 3600, "47:00 h"),
        (2 * 86400, "2.0 days"),
        (3.44 * 86400, "3.4 days"),
    ],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text
