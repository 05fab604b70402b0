"""Two network namespaces with a slow link between them: who accepts no connections takes part all the same."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from collab.trackers import read_history
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, wait_until

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(150)]

RATE = "20mbit"


@dataclass
class Network:
    """`open` accepts connections, `closed` accepts none; each is the name of a namespace."""

    open: str
    closed: str
    open_ip: str = "10.77.0.1"
    closed_ip: str = "10.77.0.2"


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: network namespaces need root")
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("NOT TESTED: network namespaces need the programs ip and tc (package iproute2)")
    mark = f"s{os.getpid()}"
    network = Network(f"{mark}open", f"{mark}closed")
    # libp2p dials from the port that it listens on, so what comes in is told by its first packet: SYN without ACK.
    # Redirecting it to a link that leads nowhere drops it, without any firewall's program.
    commands = f"""
        ip netns add {network.open}
        ip netns add {network.closed}
        ip link add {mark}a netns {network.open} type veth peer name {mark}b netns {network.closed}
        ip -n {network.open} addr add {network.open_ip}/24 dev {mark}a
        ip -n {network.closed} addr add {network.closed_ip}/24 dev {mark}b
        ip -n {network.open} link set lo up
        ip -n {network.open} link set {mark}a up
        ip -n {network.closed} link set lo up
        ip -n {network.closed} link set {mark}b up
        ip -n {network.closed} link add {mark}x type veth peer name {mark}y
        ip -n {network.closed} link set {mark}x up
        tc -n {network.open} qdisc add dev {mark}a root tbf rate {RATE} burst 64kb latency 100ms
        tc -n {network.closed} qdisc add dev {mark}b root tbf rate {RATE} burst 64kb latency 100ms
        tc -n {network.closed} qdisc add dev {mark}b ingress
        tc -n {network.closed} filter add dev {mark}b parent ffff: protocol ip u32
          match ip protocol 6 0xff match u8 0x02 0x12 at 33 action mirred egress redirect dev {mark}x
    """.replace("u32\n", "u32")
    try:
        for command in commands.strip().splitlines():
            done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
            if done.returncode != 0:
                pytest.skip(f"NOT TESTED: no network: `{command.strip()}` says {done.stderr.strip()}")
        yield network
    finally:
        for name in (network.open, network.closed):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def start(swarm: Swarm, namespace: str, name: str, *command: str) -> Program:
    program = Program(
        name,
        [*command, "--cache_dir", str(swarm.cache_dir), "--nat_port_map", "false"],
        swarm.folder / f"{name}.log",
        network=namespace,
    )
    swarm.programs.append(program)
    return program


def test_who_accepts_no_connections_joins_as_a_client_by_itself_and_its_samples_count(
    network: Network, swarm: Swarm
) -> None:
    folder = swarm.folder / "run"
    config = swarm.configure(max_global_steps=1000, target_batch_size=2048)
    auxiliary = start(
        swarm, network.open, "auxiliary", "run_aux_peer.py", "--config", str(config), "--run_folder", str(folder),
        "--host_maddrs", "/ip4/0.0.0.0/tcp/31337",
    )  # fmt: skip
    auxiliary.wait_for_output("Others join with")
    line = (folder / "join.txt").read_text()
    assert f"/ip4/{network.open_ip}/tcp/31337/p2p/" in line and "127.0.0.1" not in line
    assert "public address could not be found out" in auxiliary.output()

    def volunteer(namespace: str, name: str) -> Program:
        own = ("--public_name", name, "--threads", "1", "--initial_peers", line.split()[-1])
        return start(swarm, namespace, name, "run_trainer.py", *own)

    inside = volunteer(network.open, "inside")
    inside.wait_for_output("step 1/", timeout=90)  # a client that is there first has nobody to hand out its state
    outside = volunteer(network.closed, "outside")
    outside.wait_for_output("peers 2/2", timeout=90)

    def together() -> list[dict[str, float]]:
        return [entry for entry in read_history(folder / "metrics.jsonl") if entry["peers_averaged"] == 2]

    wait_until(lambda: bool(together()), 20, auxiliary.output)
    page = folder / "page.html"
    wait_until(lambda: ">client" in page.read_text() and ">trainer" in page.read_text(), 20, page.read_text)
    outside.interrupt()
    assert outside.wait() == 0, outside.output()

    said = outside.output()
    assert f"tried /ip4/{network.closed_ip}/tcp/" in said and "nothing answered within 5 seconds" in said
    assert "client mode" in said and "To accept connections:" in said
    assert "client mode" not in inside.output()
    assert together()[0]["peers_met"] == 2
    assert int(said.split("outside gave ")[1].split()[0].replace(",", "")) > 0
