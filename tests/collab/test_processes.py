"""Starting and ending: no process outlives a peer, signals are heard, mistakes are told in one message."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from collab.errors import UserError
from collab.processes import run_program

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(60)

FAMILY = """
    import multiprocessing, os, subprocess, sys, time
    from collab.processes import guard_children

    def child(ready):
        subprocess.Popen(["sleep", "1000"])
        ready.set()
        time.sleep(1000)

    guard_children()
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    fork.Process(target=child, args=[ready], daemon=True).start()
    ready.wait()
    print("ready", flush=True)
"""


@pytest.fixture
def start():
    """Starts a Python program of its own and, at the end, ends whatever is left of it."""
    started: list[subprocess.Popen] = []

    def start_program(program: str, then: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(program) + textwrap.dedent(then)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout and process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    yield start_program
    for process in started:
        for member in session(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.communicate(timeout=10)


def session(leader: int) -> list[psutil.Process]:
    """Whatever is left of a session: children stay in it, whoever their parent and their process group are by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def still_there(processes: list[psutil.Process], seconds: float = 5.0) -> list[str]:
    """The commands of those that have not ended after `seconds`; a zombie has ended, and waits for its parent only."""

    def running(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + seconds
    while (left := list(filter(running, processes))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [repr(process) for process in left]


# ---- children ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_peer_leaves_no_process_behind(start, number):
    parent = start(FAMILY, "time.sleep(1000)")
    members = family(parent.pid)
    assert len(members) == 3, "the watcher, a forked child and what that one started"
    parent.send_signal(number)
    assert parent.wait(timeout=5) == -number
    assert still_there(members) == []


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise RuntimeError('a bug')"])
def test_a_peer_that_ends_by_itself_leaves_no_process_behind(start, end):
    parent = start(FAMILY, f"sys.stdin.readline()\n{end}")
    members = family(parent.pid)
    assert len(members) == 3
    parent.communicate("go on\n", timeout=10)  # it also waits until nobody holds the other end of its output
    assert parent.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1)
    assert still_there(members) == []


def test_children_started_later_and_by_others_are_guarded_too(start):
    parent = start(
        FAMILY,
        """
        sys.stdin.readline()
        second = fork.Event()
        fork.Process(target=child, args=[second], daemon=True).start()
        second.wait()
        print("second", flush=True)
        time.sleep(1000)
        """,
    )
    parent.stdin.write("go on\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "second\n"
    members = family(parent.pid)
    assert len(members) == 5
    parent.kill()
    assert still_there(members) == []


def test_a_child_that_ends_takes_nobody_with_it(start):
    parent = start(
        FAMILY,
        """
        sys.stdin.readline()
        other = fork.Process(target=time.sleep, args=[0])
        other.start()
        other.join()
        print("joined", flush=True)
        time.sleep(1000)
        """,
    )
    members = family(parent.pid)
    parent.stdin.write("go on\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "joined\n"
    assert len(still_there(members, seconds=0.2)) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_what_a_peer_keeps_for_its_life_goes_with_it(start, tmp_path: Path, monkeypatch, number: int | None):
    """Its files, and the socket over which its processes hand each other tensors."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    parent = start(
        """
        import multiprocessing, multiprocessing.connection, sys, tempfile
        from collab.processes import guard_children, scratch_folder

        guard_children()
        kept = tempfile.TemporaryDirectory(dir=scratch_folder())
        listener = multiprocessing.connection.Listener(family="AF_UNIX")
        print("ready", flush=True)
        sys.stdin.readline()
        """
    )
    [folder] = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 2
    if number is None:
        assert parent.communicate("go on\n", timeout=10)[1] == ""
        assert list(tmp_path.iterdir()) == []  # also if somebody looks at once
    else:
        parent.send_signal(number)
        parent.wait(timeout=5)
    assert still_there(session(parent.pid)) == []
    assert list(tmp_path.iterdir()) == []


SAYING_GOODBYE = """
    import multiprocessing
    from collab.processes import StopSignal, guard_children

    def child(pipe):
        pipe.send("answer to " + pipe.recv())
        pipe.recv()

    guard_children()
    stop = StopSignal()
    stop.listen()
    fork = multiprocessing.get_context("fork")
    pipe, other_end = fork.Pipe()
    process = fork.Process(target=child, args=[other_end])
    process.start()
    print("ready", flush=True)
    stop.wait(30)
    pipe.send("goodbye")
    print(pipe.recv(), flush=True)
    process.terminate()
    process.join(10)
    print("exit code", process.exitcode, flush=True)
"""


def test_ctrl_c_in_a_terminal_leaves_time_to_say_goodbye_through_children(start):
    """A terminal sends SIGINT to the whole foreground group; afterwards `terminate()` still ends a child."""
    parent = start(SAYING_GOODBYE)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=20)
    assert out.splitlines() == ["answer to goodbye", f"exit code {-signal.SIGTERM}"], err
    assert parent.returncode == 0 and "Traceback" not in err


# ---- signals -----------------------------------------------------------------------------------------------------

PATIENT = """
    import time
    from collab.processes import StopSignal, run_program

    def main():
        stop = StopSignal()
        stop.listen()
        assert not stop and not stop.wait(0)
        print("ready", flush=True)
        stop.wait(30)
        print("asked", bool(stop), flush=True)
        time.sleep(30)

    run_program(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_asks_and_a_second_one_ends(start, number):
    process = start(PATIENT)
    process.send_signal(number)
    assert process.stdout.readline() == "asked True\n", "it woke up at once and went on"
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert "Leaving the swarm" in err and "Traceback" not in err


# ---- the end of a program ----------------------------------------------------------------------------------------


def ended(main) -> int:
    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_good_program_ends_with_0(capsys):
    assert ended(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_a_mistake_of_the_person_is_one_message_and_status_1(capsys):
    def main():
        raise UserError("There is no file a.yaml. Give another one.")

    assert ended(main) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == "\nerror: There is no file a.yaml. Give another one.\n"


def test_ctrl_c_before_anything_was_set_up_is_no_error(capsys):
    def main():
        raise KeyboardInterrupt

    assert ended(main) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["OSError(24, 'Too many open files')", "RuntimeError('Too many open files (24)')"])
def test_without_a_free_file_descriptor_it_ends_with_a_message_and_waits_for_nobody(kind):
    program = f"""
        import threading, time
        from collab.processes import run_program
        def main():
            threading.Thread(target=time.sleep, args=(60,)).start()
            try:
                raise {kind}
            finally:
                raise ValueError("in the tidying up")
        run_program(main)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: This program can open no more files" in done.stderr and "ulimit -n" in done.stderr


def test_a_bug_of_ours_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_program(main)
