"""A lost internet connection loses nothing but time: the link between two network namespaces goes down for a while."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from collab.trackers import read_history
from tests.collab.test_trackers import trackio_steps
from tests.hub_server import HubServer
from tests.swarm.conftest import Swarm
from tests.swarm.namespaces import USUAL, Namespace, linked
from tests.swarm.processes import Program, wait_until
from tests.swarm.test_publishing import NAME, assert_each_tag_has_one_whole_commit, environment

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(600)]

OUTAGE = 40.0  # seconds: longer than metadata_expiration, and than any lease
AVERAGING_TIMEOUT = 15


@pytest.fixture
def network() -> Iterator[tuple[Namespace, Namespace]]:
    with linked(USUAL, USUAL) as (one, other):
        yield one, other


def start_auxiliary(
    swarm: Swarm, place: Namespace, config: Path, *arguments: str, **options: Any
) -> tuple[Program, str]:
    """The auxiliary peer, and the address that it tells newcomers."""
    own = ("--config", str(config), "--run_folder", str(swarm.folder / "run"), "--find_public_ip", "false")
    fixed = ("--host_maddrs", "/ip4/0.0.0.0/tcp/31337")
    program = place.start(swarm, "auxiliary", "run_aux_peer.py", *own, *fixed, *arguments, **options)
    program.wait_for_output("Others join with")
    line = swarm.folder / "run" / "join.txt"
    wait_until(line.exists, 10, program.output)
    return program, line.read_text().split()[-1]


def start_trainer(swarm: Swarm, place: Namespace, name: str, address: str, pace: float = 0.0) -> Program:
    own = ("--public_name", name, "--threads", "1", "--micro_batch_size", "16", "--initial_peers", address)
    environment = {"RECORDS": str(swarm.folder / f"{name}.jsonl"), "PACE": str(pace)}
    return place.start(swarm, name, "tests/swarm/trainer_with_record.py", *own, environment=environment)


def records_of(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    """What a trainer itself has counted, by global step."""
    lines = (folder / f"{name}.jsonl").read_text().splitlines() if (folder / f"{name}.jsonl").exists() else []
    return {entry["step"]: entry for entry in map(json.loads, lines)}


def lose_the_link(end: Namespace, made: Callable[[], int], *looked_at: Program) -> range:
    """Pull the cable out for `OUTAGE` seconds at least; gives the global steps that were begun and made meanwhile."""
    end.plug(False)
    cut, before = time.monotonic(), made()
    for program in looked_at:
        program.wait_for_output("LOST SIGHT")
    enough = before + 4
    wait_until(lambda: time.monotonic() > cut + OUTAGE and made() >= enough, 180, lambda: f"step {made()} of {enough}")
    after = made()
    end.plug(True)
    return range(before + 2, after + 1)


def leave(*programs: Program) -> None:
    for program in programs:
        program.interrupt()
    for program in programs:
        assert program.wait() == 0, program.output()


def test_an_auxiliary_peer_without_internet_for_a_while_loses_nothing_but_time(
    network: tuple[Namespace, Namespace], swarm: Swarm
) -> None:
    cut_off, rest = network
    folder = swarm.folder
    with rest.entered():
        hub = HubServer(host=rest.ip)
    with hub:
        config = swarm.configure(
            max_global_steps=1000, averaging_timeout=AVERAGING_TIMEOUT, save_every=2, report_to=["trackio"]
        )
        auxiliary, address = start_auxiliary(
            swarm, cut_off, config, "--repo_id", NAME, "--page_port", "0", environment=environment(hub)
        )
        trainers = [start_trainer(swarm, rest, name, address) for name in ("first", "second")]

        def made() -> int:
            return max(max(records_of(folder, name), default=0) for name in ("first", "second"))

        def published() -> set[int]:
            return {int(tag.removeprefix("step-")) for tag in hub.repos[NAME].tags} if NAME in hub.repos else set()

        def saved() -> set[int]:
            return {int(path.name.removeprefix("step-")) for path in (folder / "run" / "checkpoints").glob("step-*")}

        # ---- the connection goes in the middle of an upload, and of everything else
        wait_until(lambda: len(published()) == 1, 180, auxiliary.output)
        hub.pausing = "PUT /lfs/"
        hub.paused.clear()
        wait_until(lambda: hub.waiting > 0, 120, auxiliary.output)
        in_the_air = max(saved())
        outage = lose_the_link(cut_off, made, auxiliary, *trainers)
        hub.paused.set()

        # ---- nobody does anything
        auxiliary.wait_for_output("n sight again")
        wait_until(
            lambda: read_history(folder / "run" / "metrics.jsonl")[-1]["step"] > outage[-1], 120, auxiliary.output
        )
        newcomer = start_trainer(swarm, rest, "newcomer", address)
        newcomer.wait_for_output("peers 3/3", timeout=180)
        wait_until(lambda: max(published()) > outage[-1], 180, auxiliary.output)
        wait_until(lambda: made() > outage[-1] + 4, 120, auxiliary.output)
        leave(*trainers, newcomer, auxiliary)
        assert in_the_air in published()
        assert_each_tag_has_one_whole_commit(hub)

    trained = [records_of(folder, name) for name in ("first", "second")]
    for records in trained:
        assert all(records[step]["peers_met"] == 2 for step in outage), "they trained together"
        times = [records[step]["time"] for step in range(outage[0] - 2, outage[-1] + 1)]
        assert sum(later - sooner > AVERAGING_TIMEOUT for sooner, later in pairwise(times)) <= 1, times

    history = {entry["step"]: entry for entry in read_history(folder / "run" / "metrics.jsonl")}
    every = list(range(1, max(history) + 1))
    assert sorted(history) == every == trackio_steps(folder / "run" / "trackio")
    for step in outage:
        assert history[step]["samples"] == sum(records[step]["samples"] for records in trained)

    told = [event["text"] for event in json.loads((folder / "run" / "status.json").read_text())["events"]]
    assert any(text.startswith("Lost sight of everybody") for text in told), told
    assert any(text.startswith("In sight of others again") for text in told), told
    assisted = json.loads((folder / "run" / "summary.json").read_text())["rounds_assisted"]
    assert assisted >= outage[0], "more rounds than there were before the outage"
