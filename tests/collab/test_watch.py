"""When a peer concludes that its model is another one than the others'."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

import collab.watch
from collab.watch import Doubt, ModelWatch, Sketches, TooEarly

GOOD, BAD = [1.0] * 16, [2.0] * 16


class Swarm:
    """What the DHT would answer."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def says(self, **steps: tuple[int, list[float]]) -> None:
        self.records = [
            SimpleNamespace(peer_id=name, step=step, sketch=sketch) for name, (step, sketch) in steps.items()
        ]

    def ask(self, *_: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_result(self.records)
        return answer


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> Swarm:
    swarm = Swarm()
    monkeypatch.setattr(collab.watch, "ask_for_records", swarm.ask)
    monkeypatch.setattr(collab.watch, "records_in", lambda records: records)
    return swarm


def watch(settle_steps: int = 10) -> ModelWatch:
    return ModelWatch(SimpleNamespace(peer_id="me"), "run", settle_steps)  # type: ignore[arg-type]


def test_a_model_like_the_others_is_no_stray(swarm: Swarm) -> None:
    mine = watch()
    for step in range(1, 10):
        swarm.says(a=(step, GOOD), b=(step, GOOD))
        assert not mine.has_strayed(step, GOOD)
    assert mine.doubtful == set()


def test_two_comparisons_in_a_row_are_needed(swarm: Swarm) -> None:
    mine, verdicts = watch(), []
    for step in range(1, 6):
        swarm.says(a=(step, GOOD), b=(step, GOOD))
        verdicts.append(mine.has_strayed(step, BAD))
    assert verdicts == [False, False, True, True, True]  # what was asked in one step is read in the next


def test_only_sketches_of_the_same_step_are_compared(swarm: Swarm) -> None:
    """The others move on while this peer still reports, and every step changes the model."""
    mine = watch()
    for step in range(1, 8):
        swarm.says(a=(step - 1, [step - 1.0] * 16), b=(step - 1, [step - 1.0] * 16))
        assert not mine.has_strayed(step, [float(step)] * 16)


def test_nobody_is_judged_before_most_have_published(swarm: Swarm) -> None:
    """The one whose model is another may be the fastest; against it alone, any healthy peer would look odd."""
    mine = watch()
    for step in range(1, 8):
        swarm.says(a=(step, BAD), b=(step - 1, GOOD))
        assert not mine.has_strayed(step, GOOD)
    mine, verdicts = watch(), []
    for step in range(1, 8):
        swarm.says(a=(step, GOOD), b=(step, GOOD), c=(step - 1, BAD))
        verdicts.append(mine.has_strayed(step, BAD))
    assert verdicts[0] is False and not any(verdicts), "two against two"
    for step in range(8, 12):
        swarm.says(a=(step, GOOD), b=(step, GOOD), c=(step, GOOD), d=(step - 1, BAD))
        verdicts.append(mine.has_strayed(step, BAD))
    assert verdicts[-1], "three of five are most"


def test_the_stray_is_another_one(swarm: Swarm) -> None:
    mine = watch()
    for step in range(1, 5):
        swarm.says(a=(step, GOOD), b=(step, BAD))
        assert not mine.has_strayed(step, GOOD)
    assert mine.doubtful == {"b"}


def test_of_two_parts_that_were_apart_the_one_that_is_ahead_keeps_its_model(swarm: Swarm) -> None:
    """The one behind takes over the newer state; nobody has the older one any more a step later."""
    mine = watch()
    for step in range(1, 21):
        apart = step - 3 if step < 10 else 6  # still at work on its own, then waiting for a state
        swarm.says(**dict.fromkeys("abc", (apart, BAD)))
        assert not mine.has_strayed(step, GOOD) and mine.doubtful == set()


def test_a_verdict_ends_when_those_who_gave_it_are_in_other_rounds(swarm: Swarm) -> None:
    mine, verdicts = watch(), []
    for step in range(1, 10):
        swarm.says(a=(min(step, 3), GOOD), b=(min(step, 3), GOOD))
        verdicts.append(mine.has_strayed(step, BAD))
    assert verdicts[:5] == [False, False, True, True, True] and not any(verdicts[6:])


def test_who_has_taken_over_a_state_is_left_alone_for_a_while(swarm: Swarm) -> None:
    mine = watch(settle_steps=10)
    mine.start_over(step=5)
    verdicts = {}
    for step in range(6, 20):
        swarm.says(a=(step, GOOD), b=(step, GOOD))
        verdicts[step] = mine.has_strayed(step, BAD)
    assert not any(verdicts[step] for step in range(6, 17)) and verdicts[18]


def test_a_dht_that_does_not_answer_is_no_verdict(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: Future[Any] = Future()
    lost.set_exception(ConnectionError("no route"))
    monkeypatch.setattr(collab.watch, "ask_for_records", lambda *_: lost)
    mine = watch()
    assert not any(mine.has_strayed(step, BAD) for step in range(1, 6))


# ---- whether a state that was taken over is the swarm's


def sketches(**steps: tuple[int, list[float]]) -> Sketches:
    found = Sketches()
    found.note([SimpleNamespace(peer_id=name, step=step, sketch=value) for name, (step, value) in steps.items()])  # type: ignore[misc]
    return found


def test_a_state_like_that_of_most_peers_counts_and_another_one_does_not() -> None:
    published = sketches(a=(7, GOOD), b=(7, GOOD), liar=(7, BAD))
    assert published.check(7, [1.001] * 16) == {"published": 3, "agreeing": 2, "distance": pytest.approx(0.001)}
    for other in (BAD, [float("nan")] * 16):
        with pytest.raises(Doubt, match="of 2 of 3 peers") as doubt:
            published.check(7, other)
        assert not isinstance(doubt.value, TooEarly)


def test_those_who_have_not_published_yet_are_waited_for() -> None:
    published = sketches(liar=(8, BAD), a=(7, GOOD), b=(7, GOOD))
    with pytest.raises(TooEarly, match="only 1 of 3 peers"):
        published.check(8, BAD)
    published.note([SimpleNamespace(peer_id=name, step=8, sketch=GOOD) for name in "ab"])  # type: ignore[misc]
    with pytest.raises(Doubt, match="differ by"):
        published.check(8, BAD)
    assert published.check(8, GOOD)["agreeing"] == 2


def test_a_global_step_that_nobody_has_made_is_doubted() -> None:
    published = sketches(a=(7, GOOD), b=(7, GOOD), liar=(10**6, BAD))
    for compared in (BAD, None):
        with pytest.raises(TooEarly, match="global step 1000000, and most peers have made 7"):
            published.check(10**6, compared)


def test_a_state_between_two_polls_is_compared_with_what_was_published_then() -> None:
    published = sketches(a=(7, GOOD), b=(7, GOOD))
    published.note([SimpleNamespace(peer_id=name, step=9, sketch=BAD) for name in "ab"])  # type: ignore[misc]
    assert published.check(7, GOOD)["published"] == 2
    assert published.check(8, GOOD) == {"not_compared": "no peer's sketch of global step 8 was seen"}
    published.note([SimpleNamespace(peer_id="b", step=10, sketch=BAD)])  # type: ignore[list-item]
    assert published.check(7, GOOD)["published"] == 1, "who is gone has no vote"


def test_what_could_not_be_compared_is_said() -> None:
    assert sketches().check(3, GOOD) == {"not_compared": "no peer had published anything"}
    assert sketches(a=(3, GOOD)).check(3, None) == {"not_compared": "peers have different weights when they publish"}
