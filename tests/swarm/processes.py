"""Start real programs, wait for conditions with a limit, and leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.swarm.warm import OWN_ENVIRONMENT, ROOT, WarmProcess

LOOPBACK = ("--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--nat_port_map", "false")


class Program:
    """One running program with its log file.

    :param environment: added to the test's.
    :param network: name of the network namespace that it is in; None: the test's.
    :param cold: in an interpreter of its own, as people start it, and in the test's network.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        network: str | None = None,
        cold: bool = False,
    ) -> None:
        self.name, self.log = name, log
        self._file = log.open("wb")
        self.process: subprocess.Popen[bytes] | WarmProcess
        if cold:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=self._file,
                stderr=self._file,
                cwd=ROOT,
                env=os.environ | OWN_ENVIRONMENT | dict(environment or {}),
            )
        else:
            self.process = WarmProcess(command, log, environment or {}, network)
        self.family: dict[int, psutil.Process] = {}

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def remember_family(self) -> None:
        """Note every process that belongs to this one now, to check later that all are gone."""
        try:
            me = psutil.Process(self.process.pid)
            for process in [me, *me.children(recursive=True)]:
                self.family[process.pid] = process
        except psutil.NoSuchProcess:
            pass

    def wait_for_output(self, text: str, timeout: float = 120.0, times: int = 1) -> None:
        def there() -> bool:
            assert self.process.poll() is None or self.output().count(text) >= times, (
                f"{self.name} ended with {self.process.returncode} before it wrote {text!r}:\n{self.output()}"
            )
            return self.output().count(text) >= times

        wait_until(there, timeout, lambda: f"{self.name} did not write {text!r}:\n{self.output()}")
        self.remember_family()

    def wait(self, timeout: float = 120.0) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {timeout:.0f} s:\n{self.output()}") from None

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self.remember_family()
        self.process.send_signal(number)

    def survivors(self) -> list[str]:
        """Processes of the family that are still there; zombies that only wait for init do not count."""
        return [command for process in self.family.values() if (command := running_command(process))]

    def end(self) -> None:
        if self.process.poll() is None:
            self.remember_family()
            self.process.kill()
            self.process.wait()
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()  # who is frozen cannot leave
        self._file.close()


def running_command(process: psutil.Process) -> str:
    """The command line of a process; empty if it has ended, also while this looks."""
    try:
        return " ".join([str(process.pid), *process.cmdline()]) if process.is_running() else ""
    except psutil.NoSuchProcess:  # or a zombie
        return ""


def wait_until(condition: Callable[[], bool], timeout: float, message: Callable[[], str]) -> None:
    """Bounded wait on a condition."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.05)


def assert_no_survivors(program: Program) -> None:
    """Nothing of a program is left five seconds after it ended."""
    wait_until(lambda: not program.survivors(), 5, lambda: f"{program.name} left behind: {program.survivors()}")


def end_all(programs: Sequence[Program]) -> None:
    """End those that still run; nothing of any is left then."""
    for program in programs:
        program.end()
    for program in programs:
        assert_no_survivors(program)
