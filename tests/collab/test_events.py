"""The log of events: what changed since the last look, once, and never more than fits."""

from collab.background import Health
from collab.events import Events, Lookback
from tests.collab.test_monitor import record


def told(events: Events) -> list[tuple[str, str]]:
    return [(event.kind, event.text) for event in reversed(events.recent)]


def test_who_comes_and_goes_is_told_once() -> None:
    lookback = Lookback(events := Events())
    asha, bela = record("a", 1, name="asha"), record("b", 1, name="bela")
    for seen in ([asha], [asha], [asha, bela], [bela]):
        lookback.at_peers(seen)
    assert told(events) == [("joined", "asha joined"), ("joined", "bela joined"), ("left", "asha left")]


def test_a_crowd_is_one_event_and_the_log_is_bounded() -> None:
    lookback = Lookback(events := Events(most=10))
    for turn in range(50):
        crowd = [record(f"{turn}-{i}", 1, name=f"p{i}") for i in range(500)]
        lookback.at_peers(crowd)
    assert len(events.recent) == 10
    assert "and 497 others" in events.recent[0].text


def test_a_step_alone_and_one_that_was_not_averaged() -> None:
    lookback = Lookback(events := Events())
    lookback.at_peers([record("a", 1, name="asha")])
    alone = {"peers_expected": 3, "peers_met": 1, "applied": False}
    lookback.at_peers([record("a", 2, name="asha", **alone)])
    lookback.at_peers([record("a", 2, name="asha", **alone)])
    lookback.at_peers([record("a", 3, name="asha", reason="no group at /ip4/192.0.2.1", **alone)])
    assert told(events)[1:] == [
        ("alone", "asha made step 2 alone"),
        ("not averaged", "asha could not average in step 3: no group at /ip4/[address]"),
    ]


def test_a_duty_that_fails_again_is_told_again() -> None:
    lookback = Lookback(events := Events())
    for failures in (0, 1, 1, 2):
        lookback.at_duties([Health("Keeping checkpoints", failures, "OSError: disk full", 1.0)])
    assert told(events) == 2 * [("failed", "Keeping checkpoints failed, and goes on: OSError: disk full")]


def test_a_lost_connection_is_told_once_and_that_it_is_back() -> None:
    lookback = Lookback(events := Events())
    for cut_off in (False, True, True, False, False, True):
        lookback.at_connection(cut_off)
    lost = ("note", "Lost sight of everybody: this computer has lost its network, or all others are off")
    assert told(events) == [lost, ("note", "In sight of others again after 0 s"), lost]


def test_each_published_step_is_told_once() -> None:
    lookback = Lookback(events := Events())
    for step in (0, 100, 100, 200):
        lookback.at_published(step)
    assert told(events) == [("published", f"Published step {step}") for step in (0, 100, 200)]
