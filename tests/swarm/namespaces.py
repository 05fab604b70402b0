"""Network namespaces, each behind a link of its own to one switch, for tests of what networks do to a swarm."""

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

CLONE_NEWNET = 0x40000000  # sched.h


@dataclass(frozen=True)
class Rate:
    """What a link carries, in Mbit/s."""

    down: int = 20
    up: int = 20


USUAL = Rate()


@dataclass(frozen=True)
class Namespace:
    """A network of its own, with one link to the others."""

    name: str
    device: str
    ip: str
    switch: str
    port: str

    def plug(self, is_in: bool) -> None:
        """Put the link's cable in at the switch, or pull it out."""
        run(f"ip -n {self.switch} link set {self.port} {'up' if is_in else 'down'}")

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
def linked(*rates: Rate) -> Iterator[tuple[Namespace, ...]]:
    """Namespaces that see nothing but each other, one for each of the `rates` of their links."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: network namespaces need root")
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("NOT TESTED: network namespaces need the programs ip and tc (package iproute2)")
    mark = f"s{os.getpid()}"
    switch = f"{mark}switch"
    ends = [
        Namespace(f"{mark}n{number}", f"{mark}d{number}", f"10.77.0.{number}", switch, f"{mark}p{number}")
        for number in range(1, len(rates) + 1)
    ]
    try:
        run(f"ip netns add {switch}")
        run(f"ip -n {switch} link add {mark}b type bridge")
        run(f"ip -n {switch} link set {mark}b up")
        for end, rate in zip(ends, rates, strict=True):
            run(f"ip netns add {end.name}")
            run(f"ip link add {end.device} netns {end.name} type veth peer name {end.port} netns {switch}")
            run(f"ip -n {switch} link set {end.port} master {mark}b")
            run(f"ip -n {end.name} addr add {end.ip}/24 dev {end.device}")
            run(f"ip -n {end.name} link set lo up")
            run(f"ip -n {end.name} link set {end.device} up")
            end.plug(True)
            limit_what_leaves(end.name, end.device, rate.up)
            limit_what_leaves(switch, end.port, rate.down)
        yield tuple(ends)
    finally:
        for name in [*(end.name for end in ends), switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def limit_what_leaves(namespace: str, device: str, mbits: int) -> None:
    """Let a device send so many Mbit/s at most."""
    run(f"tc -n {namespace} qdisc add dev {device} root tbf rate {mbits}mbit burst 64kb latency 100ms")
