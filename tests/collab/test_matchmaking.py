"""Who belongs in a round, and who leads it. Whole groups are formed in tests/swarm."""

import pytest
from hivemind.optim.progress_tracker import LocalTrainingProgress
from hivemind.p2p import PeerID

from collab.matchmaking import SILENT_SECONDS, Roster, draw_up_roster, patience_with

NOW = 1000.0
ME, ONE, TWO, HELPER, CLIENT = (PeerID(bytes([number]) * 34) for number in range(5))


def record(
    peer: PeerID, step: int, *, client: bool = False, auxiliary: bool = False, seconds_ago: float = 0.0
) -> LocalTrainingProgress:
    return LocalTrainingProgress(
        peer_id=peer.to_bytes(),
        epoch=step,
        samples_accumulated=0 if auxiliary else 100,
        samples_per_second=0.0 if auxiliary else 12.5,
        time=NOW - seconds_ago,
        client_mode=client,
    )


def roster(*records: LocalTrainingProgress, round_number: int = 8, lag: int = 0, **absent: int) -> Roster:
    missing = {PeerID(bytes([int(name[1:])]) * 34): number for name, number in absent.items()}
    return draw_up_roster(list(records), ME, round_number, lag, missing, NOW)


def test_everybody_at_this_step_or_just_before_belongs_in_the_round() -> None:
    found = roster(record(ME, 7), record(ONE, 7), record(TWO, 6), record(HELPER, 7, auxiliary=True))
    assert found.trainers == {ONE, TWO} and found.auxiliaries == {HELPER} and found.ahead == 0


def test_newcomers_that_still_download_are_not_waited_for() -> None:
    assert roster(record(ONE, 7), record(TWO, 0)).trainers == {ONE}


def test_clients_belong_in_the_round_and_lead_none() -> None:
    found = roster(record(CLIENT, 7, client=True))
    assert found.trainers == {CLIENT} and found.candidates == ()


def test_auxiliary_peers_lead_only_if_nobody_else_can() -> None:
    found = roster(record(HELPER, 7, auxiliary=True), record(ONE, 7), record(TWO, 7))
    assert found.candidates[-1] == HELPER and set(found.candidates) == {ONE, TWO, HELPER}


def test_all_peers_choose_the_same_leader() -> None:
    peers = [PeerID(bytes([number]) * 34) for number in range(20)]
    records = [record(peer, 7) for peer in peers]
    orders = set()
    for me in peers:
        others = draw_up_roster(records, me, 8, 0, {}, NOW).candidates
        assert me not in others
        orders.add(next(peer for peer in draw_up_roster(records, PeerID(b"x" * 34), 8, 0, {}, NOW).candidates))
        assert others[0] == next(iter(orders)) or me == next(iter(orders))
    assert len(orders) == 1


def test_who_did_not_come_is_not_waited_for_until_it_has_got_further() -> None:
    assert roster(record(ONE, 6), record(TWO, 7), p1=7).trainers == {TWO}
    assert roster(record(ONE, 7), record(TWO, 7), p1=7).trainers == {ONE, TWO}, "it has made step 7 since"


def test_who_missed_a_step_and_has_said_nothing_since_is_not_waited_for() -> None:
    silent = SILENT_SECONDS + 1
    assert roster(record(ONE, 6, seconds_ago=silent), record(TWO, 6, seconds_ago=1)).trainers == {TWO}
    found = roster(record(ONE, 7, seconds_ago=silent), record(HELPER, 6, seconds_ago=silent, auxiliary=True))
    assert found.trainers == {ONE}, "it has made that step, and may be in the middle of a long micro-batch"
    assert found.auxiliaries == {HELPER}, "they report seldom"


def test_a_repeated_round_waits_for_those_who_missed_it_at_first() -> None:
    assert roster(record(ONE, 7), record(TWO, 7), p1=8).trainers == {ONE, TWO}


@pytest.mark.parametrize(
    ("steps", "lag", "ahead"), [((8, 8), 0, 8), ((8,), 0, 8), ((8, 7), 0, 0), ((8, 8), 1, 0), ((9, 10), 1, 10)]
)
def test_a_round_is_left_behind_when_most_of_the_others_have_got_further(steps, lag, ahead) -> None:
    """With delayed averaging, peers count a step as soon as its averaging begins."""
    others = [record(peer, step) for peer, step in zip([ONE, TWO], steps, strict=False)]
    assert roster(*others, lag=lag).ahead == ahead


def test_a_single_record_from_the_far_future_does_not_end_the_round() -> None:
    honest = [record(ONE, 7), record(TWO, 7)]
    assert roster(*honest, record(PeerID(b"y" * 34), 10**9)).ahead == 0


def test_an_auxiliary_peer_that_is_ahead_leaves_nobody_behind() -> None:
    assert roster(record(ONE, 7), record(HELPER, 9, auxiliary=True)).ahead == 0


def test_peers_with_short_micro_batches_are_not_waited_for_as_long() -> None:
    assert patience_with([ONE, TWO], {ONE: 0.2, TWO: 2.0, CLIENT: 9.0}, at_most=15.0) == 5.0 + 3 * 2.0
    assert patience_with([ONE, TWO], {ONE: 0.2, TWO: 9.0}, at_most=15.0) == 15.0


@pytest.mark.parametrize("said", [{}, {ONE: 0.1}, *({ONE: 0.1, TWO: odd} for odd in (-1.0, "1", None, float("nan")))])
def test_the_organizers_time_holds_for_peers_of_unknown_speed(said) -> None:
    assert patience_with([ONE, TWO], said, at_most=15.0) == 15.0
    assert patience_with([], said, at_most=15.0) == 15.0
