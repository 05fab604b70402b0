"""What networks do to a swarm: a link between two halves of it that is cut, and links of very different speeds."""

import time
from collections.abc import Iterable
from statistics import median
from typing import Any

import pytest
from hivemind.averaging.load_balancing import load_balance_peers

from collab.agreement import TOLERANCE, spread
from collab.link import settle_claims
from tests.chaos.prices import Price
from tests.swarm.conftest import Swarm
from tests.swarm.namespaces import USUAL, Rate, linked
from tests.swarm.peers import Peers
from tests.swarm.processes import wait_until
from tests.swarm.test_outage import leave, records_of, start_auxiliary, start_trainer

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

CUT_SECONDS = 30.0
METADATA_EXPIRATION = 10.0
WITHIN_STEPS = 2
LOADED_STEPS = 2  # on a loaded machine they come into sight one after the other, and parts get lost
AVERAGE_STATE_EVERY = 6
LOOKING = 15.0  # seconds that a loaded machine may take to see and to say something

Records = dict[int, dict[str, Any]]


def made_together(records: Iterable[Records], since: float) -> list[int]:
    """Global steps that all have made together since then, and had one model afterwards."""
    each = list(records)
    return [
        step
        for step in sorted(set.intersection(*map(set, each)))
        if all(trained[step]["time"] > since and trained[step]["peers_met"] == len(each) for trained in each)
        and spread([trained[step]["sketch"] for trained in each]) < TOLERANCE
    ]


def test_two_halves_of_a_swarm_say_that_their_link_is_cut_and_become_one_when_it_is_back(
    swarm: Swarm, price: Price
) -> None:
    halves = [("a", "b"), ("c", "d")]
    config = swarm.configure(
        max_global_steps=1000, metadata_expiration=METADATA_EXPIRATION, averaging_timeout=20, matchmaking_time=2.0,
        target_batch_size=1536, learning_rate=0.01, average_state_every=AVERAGE_STATE_EVERY,
    )  # fmt: skip

    def records() -> dict[str, Records]:
        return {name: records_of(swarm.folder, name) for half in halves for name in half}

    def made() -> int:
        return max(max(trained, default=0) for trained in records().values())

    def output() -> str:
        return "\n".join(program.output() for program in swarm.programs)

    with linked(USUAL, USUAL) as places:
        auxiliary, address = start_auxiliary(swarm, places[0], config, "--page_port", "0")
        trainers = [
            start_trainer(swarm, place, name, address, pace=0.1)
            for place, half in zip(places, halves, strict=True)
            for name in half
        ]
        wait_until(lambda: len(made_together(records().values(), since=0)) >= 2, 150, output)
        places[0].plug(False)
        cut = time.time()
        for program in swarm.programs:
            program.wait_for_output("LOST SIGHT of", timeout=2 * METADATA_EXPIRATION + LOOKING)
        wait_until(lambda: time.time() > cut + CUT_SECONDS, CUT_SECONDS, output)
        apart = made()
        places[0].plug(True)
        healed = time.time()
        wait_until(lambda: bool(made_together(records().values(), healed)), 90, output)
        one = made_together(records().values(), healed)[0]
        for program in swarm.programs:
            program.wait_for_output("n sight again", timeout=LOOKING)
        later = one + AVERAGE_STATE_EVERY  # the parameters have been averaged since then: they are still one
        wait_until(lambda: made_together(records().values(), healed)[-1] >= later, 90, output)
        leave(*trainers, auxiliary)

    found = records()
    times = [trained[one]["time"] for trained in found.values()]
    by_half = [[step for name in half for step in found[name].values()] for half in halves]
    lost = [[step for step in half if step["time"] > cut and step["step"] < one] for half in by_half]
    assert all(len({step["step"] for step in half}) >= 2 for half in lost), "each half trained on"
    price(
        "link cut for 30 s", "between two halves", seconds=max(times) - healed, global_steps=one - apart,
        steps_of_a_half=min(len({step["step"] for step in half}) for half in lost),
        samples=min(sum(step["samples"] for step in half) for half in lost),
    )  # fmt: skip
    # The one that is being made when the link is back is made apart.
    assert one <= apart + 1 + WITHIN_STEPS + LOADED_STEPS, output()


LINKS = [Rate(down=100, up=100), Rate(down=20, up=20), Rate(down=100, up=5)]
GIVEN = 100  # by the person who has the fastest link; the others measure theirs
EQUAL, CHANGING, SHARED = 2, 1, 2  # rounds
WIDTH, DEPTH = 192, 16
PART = 1 / DEPTH  # hivemind hands out whole parts of the tensors, which are one for each layer here


def test_nobody_is_thrown_out_for_a_slow_link_and_the_work_follows_the_links(peers: Peers, price: Price) -> None:
    share, everybody = peers.folder / "share", range(len(LINKS))
    with linked(*LINKS) as places:
        for number, place in enumerate(places):
            environment = {"MEASURED": str(peers.folder / f"mbits-{number}"), "SHARE": str(share)}
            peers.start(
                steps=EQUAL + CHANGING + SHARED,
                module="tests.chaos.measuring_peer",
                environment=environment if number else environment | {"GIVEN": str(GIVEN)},
                options=["--host", place.ip, "--width", str(WIDTH), "--depth", str(DEPTH)],
                network=place.name,
                averaging_timeout=60.0,
                metadata_expiration=30.0,
            )

        def output() -> str:
            return "\n".join(program.output() for program in peers.programs)

        wait_until(lambda: len(list(peers.folder.glob("mbits-?"))) == len(LINKS) - 1, 90, output)
        claims = [GIVEN, *(float((peers.folder / f"mbits-{number}").read_text()) for number in everybody[1:])]
        peers.go()
        wait_until(lambda: min(map(peers.step, everybody)) >= EQUAL, 120, output)
        share.touch()
        for program in peers.programs:
            assert program.wait(180) == 0, output()

    for claim, link in zip(claims, LINKS, strict=True):
        assert 0.6 < claim / min(link.down, link.up) < 1.1, claims
    reports = [peers.reports(number) for number in everybody]
    for rounds in reports:
        assert [r["step"] for r in rounds] == list(range(1, EQUAL + CHANGING + SHARED + 1)), output()
        for r in rounds:
            assert r["applied"] and r["met"] == r["expected"] == len(LINKS) and r["parts"] == 1.0, r

    values = sum(tensor.numel() for tensor in peers.weights(0).values())
    due = [part / values for part in load_balance_peers(values, settle_claims(claims))]
    assert due[2] < due[1] < due[0], due
    for rounds, link_share in zip(reports, due, strict=True):
        assert all(abs(share_of(r, values) - 1 / len(LINKS)) < PART for r in rounds[:EQUAL]), rounds
        assert all(abs(share_of(r, values) - link_share) < PART for r in rounds[-SHARED:]), (due, rounds)
    equal = median(r["allreduce_seconds"] for rounds in reports for r in rounds[:EQUAL])
    shared = median(r["allreduce_seconds"] for rounds in reports for r in rounds[-SHARED:])
    price("slow link", "5 beside 20 and 100 Mbit/s", seconds_for_a_round=shared, seconds_with_equal_shares=equal)
    assert shared < equal


def share_of(report: dict[str, Any], values: int) -> float:
    """Of the averaging, that this peer has done in a round, by the bytes that it sent.

    With a share s of n peers' work, it sends the 1 - s that others average, and s to each of the n - 1 others.
    """
    return (report["bytes_sent"] / (4 * values) - 1) / (report["met"] - 2)
