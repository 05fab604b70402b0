"""Two network namespaces with one link between them, for tests of what networks do to a swarm."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program

RATE = "20mbit"
CLONE_NEWNET = 0x40000000  # sched.h


@dataclass(frozen=True)
class Namespace:
    """One end of the link."""

    name: str
    device: str
    ip: str

    def plug(self, is_in: bool) -> None:
        """Put the link's cable in at this end, or pull it out."""
        run(f"ip -n {self.name} link set {self.device} {'up' if is_in else 'down'}")

    def start(self, swarm: Swarm, name: str, *command: str, environment: Mapping[str, str] | None = None) -> Program:
        """Start a program of ours in this namespace; it ends with the swarm."""
        program = Program(
            name,
            [*command, "--cache_dir", str(swarm.cache_dir), "--nat_port_map", "false"],
            swarm.folder / f"{name}.log",
            environment,
            network=self.name,
        )
        swarm.programs.append(program)
        return program

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread makes belong to this namespace, and stay in it."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as home, Path("/run/netns", self.name).open() as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"the network namespace {self.name} cannot be entered")
            try:
                yield
            finally:
                libc.setns(home.fileno(), CLONE_NEWNET)


def run(command: str) -> None:
    """:raises pytest.skip.Exception: this computer does not let the test do it."""
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        pytest.skip(f"NOT TESTED: no network: `{' '.join(command.split())}` says {done.stderr.strip()}")


@contextmanager
def linked() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces that see nothing but each other, through a link of `RATE` in both directions."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: network namespaces need root")
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("NOT TESTED: network namespaces need the programs ip and tc (package iproute2)")
    mark = f"s{os.getpid()}"
    ends = Namespace(f"{mark}one", f"{mark}a", "10.77.0.1"), Namespace(f"{mark}two", f"{mark}b", "10.77.0.2")
    one, two = ends
    try:
        for end in ends:
            run(f"ip netns add {end.name}")
        run(f"ip link add {one.device} netns {one.name} type veth peer name {two.device} netns {two.name}")
        for end in ends:
            run(f"ip -n {end.name} addr add {end.ip}/24 dev {end.device}")
            run(f"ip -n {end.name} link set lo up")
            end.plug(True)
            run(f"tc -n {end.name} qdisc add dev {end.device} root tbf rate {RATE} burst 64kb latency 100ms")
        yield ends
    finally:
        for end in ends:
            subprocess.run(["ip", "netns", "del", end.name], capture_output=True, timeout=20)
