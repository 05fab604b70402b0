"""A lost internet connection loses nothing but time: a real link between two network namespaces goes down for a while."""

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from collab.trackers import read_history
from tests.collab.test_trackers import trackio_steps
from tests.hub_server import HubServer
from tests.swarm.conftest import Swarm
from tests.swarm.namespaces import Namespace, linked
from tests.swarm.processes import Program, wait_until
from tests.swarm.test_publishing import NAME, assert_each_tag_has_one_whole_commit, environment

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(400)]

OUTAGE = 40.0  # seconds: longer than metadata_expiration, and than any lease
AVERAGING_TIMEOUT = 15
PORT = "/ip4/0.0.0.0/tcp/31337"


@pytest.fixture
def network() -> Iterator[tuple[Namespace, Namespace]]:
    with linked() as ends:
        yield ends


def records_of(folder: Path, name: str) -> dict[int, dict[str, float]]:
    """What a trainer itself has counted, by global step."""
    file = folder / f"{name}.jsonl"
    return {entry["step"]: entry for entry in map(json.loads, file.open())} if file.exists() else {}


def history(folder: Path) -> list[dict[str, float]]:
    return read_history(folder / "run" / "metrics.jsonl")


def test_an_auxiliary_peer_without_internet_for_a_while_loses_nothing_but_time(
    network: tuple[Namespace, Namespace], swarm: Swarm
) -> None:
    cut_off, rest = network
    folder = swarm.folder
    t0 = time.monotonic()
    say = lambda what: print(f"{time.monotonic() - t0:6.1f} {what}", flush=True)
    with rest.entered():
        hub = HubServer(host=rest.ip)
    with hub:
        config = swarm.configure(
            max_global_steps=1000, averaging_timeout=AVERAGING_TIMEOUT, save_every=2, report_to=["trackio"]
        )
        auxiliary = cut_off.start(
            swarm, "auxiliary", "run_aux_peer.py", "--config", str(config), "--run_folder", str(folder / "run"),
            "--host_maddrs", PORT, "--find_public_ip", "false", "--repo_id", NAME,
            environment=environment(hub),
        )  # fmt: skip
        auxiliary.wait_for_output("Others join with", timeout=90)
        say("open")
        address = (folder / "run" / "join.txt").read_text().split()[-1]

        def trainer(name: str) -> Program:
            return rest.start(
                swarm, name, "tests/swarm/trainer_with_record.py", "--public_name", name, "--threads", "1",
                "--micro_batch_size", "16", "--initial_peers", address,
                environment={"RECORDS": str(folder / f"{name}.jsonl")},
            )  # fmt: skip

        def made() -> int:
            return max(max(records_of(folder, name), default=0) for name in ("first", "second"))

        trainers = [trainer("first"), trainer("second")]
        trainers[1].wait_for_output("peers 2/2", timeout=120)
        say("both train")
        hub.pausing = "PUT /lfs/"
        wait_until(lambda: NAME in hub.repos and len(hub.repos[NAME].tags) > 0, 120, auxiliary.output)
        hub.paused.clear()
        wait_until(lambda: hub.waiting > 0, 120, auxiliary.output)
        in_the_air = max(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*"))

        say(f"cut; in the air: {in_the_air}")
        cut_off.plug(False)
        cut_at, before = time.monotonic(), made()
        hub.paused.set()
        wait_until(lambda: "LOST SIGHT of 2 of 2" in auxiliary.output(), 120, auxiliary.output)
        say("noticed")
        wait_until(lambda: time.monotonic() > cut_at + OUTAGE and made() > before + 3, 240, trainers[0].output)
        after = made()
        say(f"mend; {before} {after}")
        cut_off.plug(True)
        try:
            auxiliary.wait_for_output("n sight again", timeout=180)
            say("in sight")
            wait_until(lambda: history(folder)[-1]["step"] > after, 120, auxiliary.output)
            say("history")
            newcomer = trainer("newcomer")
            newcomer.wait_for_output("peers 3/3", timeout=180)
            say("newcomer")
            wait_until(
                lambda: max(int(tag[5:]) for tag in hub.repos[NAME].tags) > after, 180, auxiliary.output
            )
            say("published")
        finally:
            for p in swarm.programs:
                print(p.name, p.output())
        for program in (*trainers, newcomer, auxiliary):
            program.interrupt()
        for program in (*trainers, newcomer, auxiliary):
            assert program.wait(120) == 0, program.output()
        say("left")
        print(sorted(hub.repos[NAME].tags, key=lambda t: int(t[5:])))
        assert_each_tag_has_one_whole_commit(hub)

    whole = history(folder)
    print((folder / "run" / "status.json").read_text()[:6000])
    assert [entry["step"] for entry in whole] == list(range(1, len(whole) + 1))
    assert trackio_steps(folder / "run" / "trackio") == list(range(1, len(whole) + 1))
    first, second = records_of(folder, "first"), records_of(folder, "second")
    for s in first:
        print(s, f"{first[s]['time'] - first[1]['time']:.1f}", first[s]["peers_met"], first[s]["peers_expected"], first[s]["applied"], first[s]["samples"], second.get(s, {}).get("samples"), whole[s-1]["samples"] if s <= len(whole) else None, first[s]["reason"])
