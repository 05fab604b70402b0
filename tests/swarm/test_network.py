"""Two network namespaces with a slow link between them: who accepts no connections takes part all the same."""

from collections.abc import Iterator

import pytest

from collab.trackers import read_history
from tests.swarm.conftest import Swarm
from tests.swarm.namespaces import USUAL, Namespace, linked, run
from tests.swarm.processes import Program, wait_until

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(150)]


@pytest.fixture
def network() -> Iterator[tuple[Namespace, Namespace]]:
    """One that accepts connections, and one that accepts none."""
    with linked(USUAL, USUAL) as (open_, closed):
        # libp2p dials from the port that it listens on, so what comes in is told by its first packet: SYN without ACK.
        # Redirecting it to a link that leads nowhere drops it, without any firewall's program.
        run(f"ip -n {closed.name} link add {closed.device}x type veth peer name {closed.device}y")
        run(f"ip -n {closed.name} link set {closed.device}x up")
        run(f"tc -n {closed.name} qdisc add dev {closed.device} ingress")
        run(
            f"tc -n {closed.name} filter add dev {closed.device} parent ffff: protocol ip u32 match ip protocol 6 0xff "
            f"match u8 0x02 0x12 at 33 action mirred egress redirect dev {closed.device}x"
        )
        yield open_, closed


def test_who_accepts_no_connections_joins_as_a_client_by_itself_and_its_samples_count(
    network: tuple[Namespace, Namespace], swarm: Swarm
) -> None:
    open_, closed = network
    folder = swarm.folder / "run"
    config = swarm.configure(max_global_steps=1000, target_batch_size=2048)
    auxiliary = open_.start(
        swarm, "auxiliary", "run_aux_peer.py", "--config", str(config), "--run_folder", str(folder),
        "--host_maddrs", "/ip4/0.0.0.0/tcp/31337",
    )  # fmt: skip
    auxiliary.wait_for_output("Others join with")
    wait_until((folder / "join.txt").exists, 10, auxiliary.output)
    line = (folder / "join.txt").read_text()
    assert f"/ip4/{open_.ip}/tcp/31337/p2p/" in line and "127.0.0.1" not in line
    assert "public address could not be found out" in auxiliary.output()

    def volunteer(namespace: Namespace, name: str) -> Program:
        own = ("--public_name", name, "--threads", "1", "--initial_peers", line.split()[-1])
        return namespace.start(swarm, name, "run_trainer.py", *own)

    inside = volunteer(open_, "inside")
    inside.wait_for_output("step 1/", timeout=90)  # a client that is there first has nobody to hand out its state
    outside = volunteer(closed, "outside")
    outside.wait_for_output("peers 2/2", timeout=90)

    def together() -> list[dict[str, float]]:
        return [entry for entry in read_history(folder / "metrics.jsonl") if entry["peers_averaged"] == 2]

    wait_until(lambda: bool(together()), 20, auxiliary.output)
    page = folder / "page.html"
    wait_until(lambda: ">client" in page.read_text() and ">trainer" in page.read_text(), 20, page.read_text)
    outside.interrupt()
    assert outside.wait() == 0, outside.output()

    said = outside.output()
    assert f"tried /ip4/{closed.ip}/tcp/" in said and "nothing answered within 5 seconds" in said
    assert "client mode" in said and "To accept connections:" in said
    assert "client mode" not in inside.output()
    assert together()[0]["peers_met"] == 2
    assert int(said.split("outside gave ")[1].split()[0].replace(",", "")) > 0
