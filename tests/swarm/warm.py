"""Programs that start at once: forked off a process which has imported the large libraries, five seconds of work."""

import atexit
import ctypes
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub.constants

ROOT = Path(__file__).resolve().parents[2]
# None of ours, which tests change by their environment, and not hivemind, whose locks all programs would then share.
LIBRARIES = ["torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "pyarrow", "PIL.Image", "sentencepiece"]
LIBRARIES += ["transformers.models.auto.modeling_auto", "transformers.models.albert.modeling_albert", "cryptography"]
LIBRARIES += ["pydantic.v1", "starlette.applications", "uvicorn"]
OWN_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

nursery = multiprocessing.get_context("forkserver")
nursery.set_forkserver_preload(LIBRARIES)


class WarmProcess:
    """What `subprocess.Popen` is for a program in an interpreter of its own.

    :param environment: added to the test's. Of the `LIBRARIES`, huggingface_hub alone hears of it.
    :param network: name of the network namespace that it is in; None: the test's.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], network: str | None = None
    ) -> None:
        before = dict(os.environ)
        os.environ.update(OWN_ENVIRONMENT)  # some of it is read when the libraries are imported
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self._process = nursery.Process(target=run, args=(list(command), str(log), dict(environment), network))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: list[str], log: str, environment: dict[str, str], network: str | None) -> None:
    """Be the program: `python PROGRAM ...` or `python -m MODULE ...`."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]  # they are text files here
    os.environ.update(OWN_ENVIRONMENT | environment)
    importlib.reload(huggingface_hub.constants)  # it reads the environment when it is imported
    if network is not None:
        enter_network(network)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).absolute().parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def enter_network(name: str) -> None:
    """What `ip netns exec NAME` does about the network; Python has it from 3.12 on (os.setns)."""
    with Path("/run/netns", name).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network {name}")
