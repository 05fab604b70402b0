"""When a peer notices that it has lost others, what it says, and whom it looks for."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator

import pytest
from hivemind import DHT
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.node import DHTNode
from hivemind.utils import ValueWithExpiration
from hivemind.utils.crypto import RSAPrivateKey

from collab.lookout import (
    ALONE_ROUNDS,
    CUT_OFF_PAUSE,
    FIRST_PAUSE,
    KNOCKS,
    LONGEST_PAUSE,
    MAX_ADDRESSES,
    MAX_SEARCHED,
    MISSED_LOOKS,
    Lookout,
    Sightings,
    addresses_in,
    alone_message,
    lost_sight_message,
    search_message,
)
from collab.optimizer import RoundReport
from collab.peer import Peer, peer_id_of_key


def report(met: int, expected: int, reason: str = "") -> RoundReport:
    return RoundReport(
        step=1, met=met, expected=expected, applied=met > 1 and not reason, reason=reason, samples=0.0, parts=1.0,
        bytes_sent=0, bytes_received=0, matchmaking_seconds=0.0, allreduce_seconds=0.0, rejected=(),
    )  # fmt: skip


def watching(*entrances: str) -> Sightings:
    return Sightings(entrances, now=0.0)


def look(sightings: Sightings, *living: str, times: int = 1, left: tuple[str, ...] = ()) -> set[str]:
    back: set[str] = set()
    for _ in range(times):
        back |= sightings.look(living, left)
    return back


# ---- peers that vanish -------------------------------------------------------------------------------------------


def test_nothing_is_said_while_everybody_is_there() -> None:
    sightings = watching("door")
    for now in range(0, 3600, 10):
        look(sightings, "one", "two", "door")
        sightings.after_round(report(3, 3))
        assert sightings.begin_search(now) is None


def test_one_answer_without_a_record_is_no_loss() -> None:
    sightings = watching()
    look(sightings, "one", "two")
    look(sightings, "one", times=MISSED_LOOKS - 1)
    assert sightings.begin_search(1.0) is None and sightings.in_sight == {"one", "two"}
    look(sightings, "one", "two")
    look(sightings, "one", times=MISSED_LOOKS - 1)
    assert sightings.begin_search(2.0) is None


def test_a_peer_that_vanishes_is_spoken_of_once_and_looked_for_with_growing_pauses() -> None:
    sightings = watching()
    look(sightings, "one", "two")
    look(sightings, "one", times=MISSED_LOOKS)
    assert sightings.begin_search(100.0) == {"two"}
    assert sightings.wanted == ["two"] and sightings.in_sight == {"one"}
    searches = []
    for now in range(101, 4000):
        look(sightings, "one")
        lost = sightings.begin_search(float(now))
        assert not lost, "it is gone, and that has been said"
        if lost is not None:
            searches.append(now - 100)
    assert searches == [30, 90, 210, 450, 930, 1530, 2130, 2730, 3330]


def test_pauses_have_a_limit() -> None:
    sightings = watching("door")
    searches = [now for now in range(20_000) if sightings.begin_search(float(now)) is not None]
    pauses = [after - before for before, after in itertools.pairwise(searches)]
    assert pauses[0] == FIRST_PAUSE and max(pauses) == LONGEST_PAUSE == pauses[-1]


def test_who_has_lost_everybody_looks_for_them_every_minute() -> None:
    """It is this computer's own connection, most likely; after hours without it nobody shall wait for ten minutes."""
    sightings = watching()
    look(sightings, "one", "two")
    assert not sightings.cut_off
    look(sightings, "one", times=MISSED_LOOKS)
    assert sightings.begin_search(100.0) == {"two"} and not sightings.cut_off
    look(sightings, times=MISSED_LOOKS)
    assert sightings.begin_search(200.0) == {"one"} and sightings.cut_off
    searches = [now - 200 for now in range(201, 8000) if sightings.begin_search(float(now)) is not None]
    pauses = [after - before for before, after in itertools.pairwise(searches)]
    assert searches[0] == FIRST_PAUSE and set(pauses) == {CUT_OFF_PAUSE}
    look(sightings, "one")
    assert not sightings.cut_off
    look(sightings, left=("one", "two"))
    assert not sightings.cut_off, "they have said goodbye"


def test_a_peer_that_says_goodbye_is_not_missed() -> None:
    sightings = watching()
    look(sightings, "one", "two")
    look(sightings, "one", left=("two",))
    look(sightings, "one", times=10)
    assert sightings.begin_search(1.0) is None and sightings.known == {"one"}


def test_an_entrance_is_looked_for_even_after_its_goodbye_and_without_a_word() -> None:
    """A restarted auxiliary peer may have begun a swarm of its own, and newcomers join there."""
    sightings = watching("door")
    look(sightings, "one", "door")
    look(sightings, "one", left=("door",))
    assert sightings.begin_search(FIRST_PAUSE) == set() and sightings.wanted == ["door"]
    look(sightings, "one", "door")
    assert sightings.wanted == [] and sightings.begin_search(1000.0) is None


def test_an_entrance_that_vanishes_is_spoken_of_like_any_other_peer() -> None:
    sightings = watching("door")
    look(sightings, "one", "door")
    look(sightings, "one", times=MISSED_LOOKS)
    assert sightings.begin_search(100.0) == {"door"}


def test_whoever_is_back_is_named_and_can_be_lost_again() -> None:
    sightings = watching()
    look(sightings, "one")
    look(sightings, times=MISSED_LOOKS)
    assert sightings.begin_search(100.0) == {"one"}
    assert look(sightings, "one") == {"one"} and look(sightings, "one") == set()
    assert sightings.lost == [] and sightings.begin_search(101.0) is None
    look(sightings, times=MISSED_LOOKS)
    assert sightings.begin_search(200.0) == {"one"}


def test_losses_in_short_order_are_told_together() -> None:
    sightings = watching()
    look(sightings, *"abcd")
    look(sightings, *"bcd", times=MISSED_LOOKS)
    assert sightings.begin_search(100.0) == {"a"}
    look(sightings, *"cd", times=MISSED_LOOKS)
    assert sightings.begin_search(110.0) is None
    look(sightings, *"d", times=MISSED_LOOKS)
    assert sightings.begin_search(100.0 + FIRST_PAUSE) == {"b", "c"}
    assert sightings.wanted[-1] == "a", "those lost last are the most promising"


def test_those_who_vanish_together_are_told_together_although_their_records_end_at_different_times() -> None:
    sightings = watching()
    look(sightings, *"abcd")
    look(sightings, *"bcd")
    look(sightings, "d", times=MISSED_LOOKS - 1)
    assert sightings.begin_search(100.0) is None, "b and c are about to be missed, too"
    look(sightings, "d")
    assert sightings.begin_search(101.0) == {"a", "b", "c"}


def test_a_record_that_comes_and_goes_does_not_hide_a_loss() -> None:
    sightings = watching()
    look(sightings, "gone", "unsteady")
    for _ in range(2 * MISSED_LOOKS - 1):
        look(sightings, "unsteady")
    look(sightings)
    assert sightings.begin_search(100.0) == {"gone"}


def test_at_each_look_it_knocks_at_a_few_of_the_lost_in_turn() -> None:
    sightings = watching()
    assert sightings.knock_at() == []
    everybody = {f"peer {number}" for number in range(2 * KNOCKS + 1)}
    look(sightings, *everybody)
    look(sightings, times=MISSED_LOOKS)
    sightings.begin_search(100.0)
    tried = [sightings.knock_at() for _ in range(3)]
    assert [len(set(few)) for few in tried] == [KNOCKS] * 3 and set().union(*tried) == everybody
    look(sightings, *everybody - {"peer 1"})
    assert sightings.knock_at() == ["peer 1"]


def test_a_long_run_with_many_that_were_killed_does_not_dial_them_all() -> None:
    sightings = watching()
    for number in range(5 * MAX_SEARCHED):
        look(sightings, f"peer {number}")
        look(sightings, times=MISSED_LOOKS)
        sightings.begin_search(number * 100.0)
    assert len(sightings.wanted) == MAX_SEARCHED and sightings.wanted[0] == f"peer {5 * MAX_SEARCHED - 1}"
    assert len(sightings.known) <= MAX_SEARCHED + 1


# ---- rounds that reach nobody ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [report(1, 3), report(1, 2, "nobody came"), report(2, 5, "less than the quorum")])
def test_rounds_alone_are_told_after_three_and_again_with_growing_pauses(alone: RoundReport) -> None:
    sightings = watching()
    for now in range(ALONE_ROUNDS - 1):
        sightings.after_round(alone)
        assert sightings.begin_search(float(now)) is None
    sightings.after_round(alone)
    told = []
    for now in range(10, 500):
        look(sightings, "one", "two")
        sightings.after_round(alone)
        if sightings.begin_search(float(now)) is not None:
            told.append(now - 10)
    assert told == [0, 30, 90, 210, 450]


def test_a_round_that_meets_somebody_starts_the_count_anew() -> None:
    sightings = watching()
    for outcome in (report(1, 2), report(1, 2), report(2, 2), report(1, 2), report(1, 2)):
        sightings.after_round(outcome)
    assert not sightings.alone and sightings.begin_search(1000.0) is None


def test_the_only_peer_of_a_run_is_not_alone() -> None:
    sightings = watching()
    for _ in range(10):
        sightings.after_round(report(1, 1))
    assert not sightings.alone and sightings.begin_search(1000.0) is None


# ---- what others say of themselves -------------------------------------------------------------------------------


def entry(value: object) -> ValueWithExpiration:
    return ValueWithExpiration(value, 1e10)


def test_only_addresses_of_the_signer_count() -> None:
    keys = [RSASignatureValidator(RSAPrivateKey()).local_public_key for _ in range(4)]
    honest, liar, gone, _odd = (peer_id_of_key(key) for key in keys)
    own = f"/ip4/203.0.113.7/tcp/31337/p2p/{honest}"
    records = {
        keys[0]: entry([own, "nonsense", 7, f"/ip4/203.0.113.7/tcp/1/p2p/{liar}", "/ip4/203.0.113.7/tcp/1", "x" * 999]),
        keys[1]: entry([own] * 3),
        keys[2]: entry(None),
        keys[3]: entry({"no": "list"}),
        b"no key": entry([own]),
        "text": entry([own]),
    }
    assert addresses_in(ValueWithExpiration(records, 1e10)) == {honest: [own], liar: [], gone: None}


def test_one_peer_cannot_send_the_others_dialing_without_end() -> None:
    key = RSASignatureValidator(RSAPrivateKey()).local_public_key
    many = [f"/ip4/203.0.113.7/tcp/{port}/p2p/{peer_id_of_key(key)}" for port in range(1, 100)]
    assert addresses_in(ValueWithExpiration({key: entry(many)}, 1e10)) == {peer_id_of_key(key): many[:MAX_ADDRESSES]}


@pytest.mark.parametrize("answer", [None, ValueWithExpiration("text", 1e10), ValueWithExpiration(None, 1e10)])
def test_no_answer_means_that_nobody_is_in_sight(answer: ValueWithExpiration | None) -> None:
    assert addresses_in(answer) == {}


# ---- what a person reads -----------------------------------------------------------------------------------------


def test_each_message_is_one_line_and_names_peers_by_the_ends_of_their_ids() -> None:
    for message in (
        lost_sight_message({"Qm111111", "Qm222222"}, in_sight=3, lifetime=30.0),
        alone_message(3, 4, "nobody came within 5 s", client_mode=False),
        search_message(5, {"Qm111111"}, {"Qm111111"}, {"Qm222222"}),
        search_message(2, set(), set(), {"Qm111111", "Qm222222"}),
    ):
        assert "\n" not in message
    assert "2 of 5 other peers: 111111, 222222." in lost_sight_message({"Qm111111", "Qm222222"}, 3, 30.0)
    assert "1 of 1 other peers" in lost_sight_message({"Qm111111"}, 0, 30.0)
    assert "another peer was expected" in alone_message(3, 1, "", False)
    assert "4 other peers were expected" in alone_message(3, 4, "", False)


def test_a_message_says_what_the_loss_means() -> None:
    assert "fallen apart" in lost_sight_message({"Qm111111"}, in_sight=1, lifetime=30.0)
    assert "its network" in lost_sight_message({"Qm111111"}, in_sight=0, lifetime=30.0)
    assert "probably gone" in search_message(1, set(), set(), {"Qm111111"})
    assert "gone" not in search_message(1, {"Qm111111"}, {"Qm111111"}, set())
    assert "--client_mode" in alone_message(3, 1, "", client_mode=False)
    assert "--client_mode" not in alone_message(3, 1, "", client_mode=True)
    assert " and 92 more" in lost_sight_message({f"Qm{number:06}" for number in range(100)}, 0, 30.0)


# ---- real peers --------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


async def forget_everybody(_dht: DHT, node: DHTNode) -> None:
    """What is left of a DHT node's neighbours after its network was down: none."""
    for info in await node.p2p.list_peers():
        await node.p2p._client.disconnect(info.peer_id)
    table = node.protocol.routing_table
    for neighbour in list(table.uid_to_peer_id):
        del table[neighbour]


@pytest.fixture
def two_lookouts(start_peer: Callable[..., Peer], caplog: pytest.LogCaptureFixture) -> Iterator[list[Lookout]]:
    """Two peers that have seen each other. Neither joined through the other."""
    caplog.set_level(logging.WARNING, "collab.lookout")
    door = start_peer()
    peers = [start_peer(initial_peers=door.addresses()) for _ in range(2)]
    lookouts = [Lookout(peer, "ours", lifetime=2.0) for peer in peers]
    one, other = lookouts
    assert wait_for(lambda: one._sightings.in_sight and other._sightings.in_sight)
    door.close()
    yield lookouts
    for lookout in lookouts:
        lookout.stop()
        assert not lookout.failures


@pytest.mark.swarm
def test_two_halves_that_have_forgotten_each_other_find_each_other_again(
    two_lookouts: list[Lookout], caplog: pytest.LogCaptureFixture
) -> None:
    for lookout in 3 * two_lookouts:  # whom the other one asks in between, knows it again
        lookout.peer.dht.run_coroutine(forget_everybody)
    assert wait_for(lambda: "In sight again" in caplog.text), caplog.text
    assert "LOST SIGHT of 1 of 1 other peers" in caplog.text and "1 of 2 peers answered" in caplog.text
    one, other = two_lookouts
    assert wait_for(lambda: not one._sightings.lost and not other._sightings.lost)
    assert one._sightings.in_sight == {other.peer.peer_id} and other._sightings.in_sight == {one.peer.peer_id}


@pytest.mark.swarm
def test_nobody_is_missed_after_a_goodbye(two_lookouts: list[Lookout], caplog: pytest.LogCaptureFixture) -> None:
    stays, leaves = two_lookouts
    leaves.stop()
    assert wait_for(lambda: leaves.peer.peer_id not in stays._sightings.known)
    assert not stays._sightings.lost and leaves.peer.peer_id[-6:] not in caplog.text
