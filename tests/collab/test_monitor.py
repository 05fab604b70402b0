"""The history of the swarm: each global step once, in order, as soon as it is known."""

import math
import time
from types import SimpleNamespace

import pytest
from hivemind.optim.progress_tracker import GlobalTrainingProgress
from hypothesis import given
from hypothesis import strategies as st

import collab.monitor
from collab.metrics import AuxRecord, PeerRecord
from collab.monitor import MAX_LONE, PATIENCE, Monitor, StepSummary
from collab.trackers import HISTORY, History, make_trackers, read_history


@pytest.fixture
def clock(monkeypatch):
    """Swarm time, which stands still until it is moved."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(collab.monitor, "get_dht_time", lambda: START + now.seconds)
    return now


def watching(clock, history=(), **options) -> Monitor:
    """A monitor that has been there for a minute."""
    monitor = Monitor(history, **{"lifetime": 1e6, **options})
    clock.seconds += 60
    return monitor


def record(peer: str, step: int, **changes) -> PeerRecord:
    given = dict(
        name=f"name of {peer}",
        peer_id=peer,
        version="0.1.0",
        step=step,
        loss=2.0,
        samples=10,
        samples_total=10 * step,
        samples_per_second=5.0,
        peers_met=2,
        peers_expected=2,
        applied=True,
        skipped_batches=0,
        parts=1.0,
        bytes_sent=1000,
        bytes_received=1000,
        matchmaking_seconds=1.0,
        allreduce_seconds=0.5,
        grad_norm=1.0,
        sketch=[1.0] * 16,
        client_mode=False,
        data_wait=0.25,
        compute_share=0.5,
        averaging_wait=0.125,
        tokens_per_second=500.0,
        mfu=0.0,
        memory=10**9,
        time=START,
        reported=START,
        device="cpu, 2 threads",
        tokens=1000,
        round_samples=20.0,
    )
    return PeerRecord(**{**given, **changes})


START = 1.7e9


def steps(summaries) -> list[int]:
    return [summary.step for summary in summaries]


# ---- when a step is complete -------------------------------------------------------------------------------------


def test_nothing_is_complete_at_first(clock):
    monitor = watching(clock)
    assert monitor.update([]) == [] and monitor.step == 0 and monitor.samples == 0


def test_a_step_is_complete_when_everybody_reported(clock):
    monitor = watching(clock)
    assert monitor.update([record("a", 1), record("b", 0)]) == []
    assert steps(monitor.update([record("a", 1), record("b", 1)])) == [1]
    assert monitor.step == 1


def test_a_step_is_complete_when_patience_is_over(clock):
    monitor = watching(clock)
    slow = [record("a", 1), record("b", 1), record("c", 0)]
    assert monitor.update(slow) == []
    clock.seconds += PATIENCE - 0.1
    assert monitor.update(slow) == []
    clock.seconds += 0.2
    [summary] = monitor.update(slow)
    assert (summary.step, summary.peers) == (1, 2)


def test_each_step_comes_once(clock):
    monitor = watching(clock)
    for _ in range(3):
        monitor.update([record("a", 1)])
        clock.seconds += PATIENCE
    monitor.update([record("a", 1), record("late", 1)])
    assert steps(monitor.history) == [1]


def test_a_peer_that_was_faster_than_our_look_is_kept(clock):
    """Between two looks, a peer may report two steps: only the latest is seen, and the step before has the others."""
    monitor = watching(clock)
    monitor.update([record("a", 1), record("b", 0)])
    assert steps(monitor.update([record("a", 2), record("b", 1)])) == [1]
    assert monitor.history[0].peers == 2
    assert steps(monitor.update([record("a", 2), record("b", 2)])) == [2]


def test_steps_come_in_order_even_if_a_later_one_was_seen_first(clock):
    monitor = watching(clock)
    seen = []
    seen += monitor.update([record("a", 5), record("c", 3)])
    seen += monitor.update([record("a", 5), record("c", 3)])
    clock.seconds += PATIENCE - 1
    seen += monitor.update([record("a", 5), record("b", 4), record("c", 3)])
    clock.seconds += 1.5  # step 5 has waited long enough, step 4 has not
    seen += monitor.update([record("a", 5), record("b", 4), record("c", 3)])
    clock.seconds += PATIENCE
    seen += monitor.update([record("a", 5), record("b", 4), record("c", 3)])
    clock.seconds += PATIENCE
    seen += monitor.update([record("a", 5), record("b", 5), record("c", 5)])
    assert steps(seen) == sorted(set(steps(seen))) and seen == monitor.history
    assert monitor.step == 5


def test_everybody_left_in_the_middle_of_a_step(clock):
    """Records expire; what was already reported is not lost."""
    monitor = watching(clock)
    monitor.update([record("a", 1), record("b", 0)])
    assert steps(monitor.update([])) == [1]
    assert monitor.live == []


# ---- what a step says --------------------------------------------------------------------------------------------


def test_the_loss_is_a_mean_over_samples(clock):
    [summary] = watching(clock).update([record("a", 1, loss=1.0, samples=30), record("b", 1, loss=5.0, samples=10)])
    assert summary.loss == pytest.approx(2.0) and summary.samples == 40
    assert summary.samples_per_second == pytest.approx(10.0)


def test_a_step_without_samples_has_no_loss(clock):
    [summary] = watching(clock).update([record("a", 1, loss=0.0, samples=0)])
    assert math.isnan(summary.loss) and summary.samples == 0


def test_the_verdict_is_that_of_the_worst_peer(clock):
    together = [record(peer, 1, peers_met=2, peers_expected=3) for peer in "ab"]
    alone = record("c", 1, peers_met=1, peers_expected=3, applied=False, reason="no group")
    [summary] = watching(clock).update([*together, alone])
    assert (summary.peers, summary.peers_met, summary.peers_expected) == (3, 1, 3)
    assert (summary.peers_averaged, summary.peers_alone) == (2, 1)


def test_a_single_peer_is_not_called_alone(clock):
    [summary] = watching(clock).update([record("a", 1, peers_met=1, peers_expected=1, applied=False)])
    assert summary.peers_alone == 0


def test_peers_are_listed_by_what_they_gave(clock):
    monitor = watching(clock)
    monitor.update(
        [record("a", 1, samples_total=10), record("c", 1, samples_total=70), record("b", 1, samples_total=70)]
    )
    assert [live.peer_id for live in monitor.live] == ["b", "c", "a"]


# ---- over a restart ----------------------------------------------------------------------------------------------


def test_a_restart_repeats_no_step(clock, tmp_path):
    first = watching(clock)
    trackers = make_trackers([], tmp_path, "p", "r", {})
    for step in (1, 2):
        for summary in first.update([record("a", step), record("b", step, samples=0)]):
            trackers.log(summary.as_metrics(), summary.step, summary.time)
    trackers.close()

    second = watching(clock, [StepSummary.from_metrics(entry) for entry in read_history(tmp_path / HISTORY)])
    assert (second.step, second.samples) == (first.step, first.samples) == (2, 20)
    assert second.update([record("a", 2), record("b", 2)]) == []
    assert steps(second.update([record("a", 3), record("b", 3)])) == [3]
    assert steps(second.history) == [1, 2, 3]


@pytest.mark.parametrize("loss", [2.25, math.nan])
def test_a_summary_survives_the_metrics_file(tmp_path, loss):
    written = StepSummary(
        step=7, loss=loss, samples=123, samples_per_second=4.5, peers=3, peers_met=2, peers_expected=4,
        peers_averaged=2, peers_alone=1, peers_full=0, tokens=12300, parts=0.5, bytes_per_peer=10.0, model_spread=0.1,
        matchmaking_seconds=1.0, allreduce_seconds=0.1, data_wait=0.0, compute_share=1.0, averaging_wait=0.0,
        tokens_per_second=500.0, time=time.time(),
    )  # fmt: skip
    history = History(tmp_path)
    history.add({"step": written.step, "time": written.time, **written.as_metrics()})
    history.close()
    [entry] = read_history(tmp_path / HISTORY)
    read = StepSummary.from_metrics(entry)
    assert read.time == pytest.approx(written.time, abs=5)
    for key in ("step", "samples", "samples_per_second", "peers", "peers_met", "peers_expected"):
        assert getattr(read, key) == getattr(written, key) and type(getattr(read, key)) is type(getattr(written, key))
    assert (read.peers_averaged, read.peers_alone) == (2, 1)
    del entry["data_wait"]  # the history of a run goes on after an update
    assert math.isnan(StepSummary.from_metrics(entry).data_wait)
    assert read.loss == loss or (math.isnan(loss) and math.isnan(read.loss))


# ---- who lies, and who has left ----------------------------------------------------------------------------------


def live(clock, peer: str, step: int, **changes) -> PeerRecord:
    """A record that was said just now, of a step that was made just now."""
    return record(peer, step, **{"time": START + clock.seconds, "reported": START + clock.seconds, **changes})


def at_step(clock, step: int, peers: str = "abc", seconds: float = 20.0, **options) -> Monitor:
    """A monitor that has seen these peers make so many steps."""
    monitor = watching(clock, **{"lifetime": 60.0, **options})
    for made in range(1, step + 1):
        clock.seconds += seconds
        monitor.update([live(clock, peer, made) for peer in peers])
    assert steps(monitor.history) == list(range(1, step + 1)) and (step < 3 or monitor.pace == seconds)
    return monitor


def test_a_peer_that_has_left_or_says_nothing_is_left_out(clock):
    monitor = watching(clock, lifetime=30.0)
    silent = live(clock, "silent", 5)
    clock.seconds += 31
    gone = live(clock, "gone", 5, left=True)
    future = live(clock, "future", 5, reported=START + clock.seconds + 3600)
    monitor.update([silent, gone, future, live(clock, "there", 5)])
    assert [peer.peer_id for peer in monitor.live] == ["there"]
    assert monitor.view().roles == {"trainer": 1, "client": 0, "auxiliary": 0}


def test_who_left_right_after_a_step_still_counts_in_it(clock):
    monitor = at_step(clock, 3, "ab")
    clock.seconds += 20
    [summary] = monitor.update([live(clock, "a", 4), live(clock, "b", 4, left=True)])
    assert summary.peers == 2 and [peer.peer_id for peer in monitor.live] == ["a"]


@pytest.mark.parametrize("claim", [10**9, 1000, 12, 0], ids=["beyond the end", "the end", "soon", "stands still"])
@pytest.mark.parametrize("honest", ["a", "ab", "abcd"])
def test_a_liar_neither_ends_the_run_nor_opens_a_gap_nor_stops_it(clock, honest, claim):
    monitor = at_step(clock, 10, honest, last_step=1000)
    for made in range(10, 40):
        when = START + clock.seconds
        for _ in range(40):  # looks within a step of 20 seconds
            clock.seconds += 0.5
            lie = live(clock, "liar", claim, samples=10**15, samples_total=10**15, loss=1e4)
            monitor.update([live(clock, peer, made, time=when) for peer in honest] + [lie])
            assert monitor.step <= made
    assert steps(monitor.history) == list(range(1, monitor.step + 1))
    assert monitor.step >= (37 if claim or honest != "a" else 35), "the history has fallen behind"


@pytest.mark.parametrize("honest", ["ab", "abcd"])
def test_a_liar_that_is_always_one_step_ahead_gains_nothing(clock, honest):
    monitor = at_step(clock, 10, honest, last_step=1000)
    for made in range(10, 30):
        for _ in range(40):
            clock.seconds += 0.5
            lie = live(clock, "liar", monitor.step + 1, loss=0.0, samples=10**15)
            monitor.update([live(clock, peer, made) for peer in honest] + [lie])
            assert monitor.step <= made


def test_of_two_peers_that_disagree_neither_makes_the_history_faster_than_it_was(clock):
    monitor = at_step(clock, 10, "a", last_step=1000)
    for _ in range(400):
        clock.seconds += 0.5
        monitor.update([live(clock, "a", 10), live(clock, "liar", monitor.step + 1)])
    assert 10 < monitor.step <= 10 + 200 / 20


def test_a_lone_liar_cannot_jump_to_the_end(clock):
    monitor = at_step(clock, 10, "a", last_step=1000)
    clock.seconds += 20
    assert monitor.update([live(clock, "a", 1000)]) == [] and monitor.step == 10


def test_a_lone_peer_is_believed_also_after_a_long_time_and_when_it_becomes_faster(clock):
    monitor = at_step(clock, 10, "a")
    clock.seconds += 2000
    assert steps(monitor.update([live(clock, "a", 110)])) == [110]
    for made in range(111, 200):
        clock.seconds += 1
        monitor.update([live(clock, "a", made)])
    assert monitor.step >= 197


def test_a_minority_is_believed_at_last_when_the_others_hang(clock):
    monitor = at_step(clock, 10, "abc")
    for _ in range(250):
        clock.seconds += 1
        monitor.update([live(clock, "a", 11), live(clock, "b", 10), live(clock, "c", 10)])
    assert monitor.step == 11


def test_one_liar_among_three_moves_neither_loss_nor_speed_nor_sums(clock):
    monitor = at_step(clock, 5, "abc", target_batch_size=4096)
    clock.seconds += 20
    honest = [live(clock, peer, 6, samples=1300, tokens=130_000, round_samples=3900.0, samples_per_second=100.0,
                   tokens_per_second=6500.0, peers_met=4) for peer in "abc"]  # fmt: skip
    lie = live(
        clock, "liar", 6, loss=1e4, samples=10**15, tokens=10**15, round_samples=1e15, samples_per_second=1e9,
        tokens_per_second=1e12, bytes_sent=10**15, matchmaking_seconds=1e6, peers_expected=10**6, peers_met=4,
        time=START + 10**9,
    )  # fmt: skip
    [summary] = monitor.update([*honest, lie])
    assert summary.loss == pytest.approx(2.0, rel=0.07)
    assert 3900 <= summary.samples <= 1.1 * 3900 and summary.tokens == pytest.approx(100 * summary.samples, rel=0.1)
    assert summary.samples_per_second < 1000 and summary.tokens_per_second < 2 * 19_500
    assert summary.bytes_per_peer < 3000 and summary.matchmaking_seconds < 2 and summary.peers_expected == 2
    assert summary.time <= START + clock.seconds


@given(
    st.lists(st.tuples(st.floats(0.5, 12), st.integers(1, 4096)), min_size=3, max_size=8),
    st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 10**15)), max_size=2),
)
def test_the_curve_stays_within_reach_of_the_honest_losses(honest, liars):
    records = [record(f"honest {i}", 1, loss=loss, samples=n) for i, (loss, n) in enumerate(honest)]
    records += [record(f"liar {i}", 1, loss=loss, samples=n) for i, (loss, n) in enumerate(liars)]
    monitor = Monitor(lifetime=math.inf, target_batch_size=4096)
    [summary] = monitor.update(records)
    low, high = min(loss for loss, _ in honest), max(loss for loss, _ in honest)
    reach = max(3 * (high - low), 0.06 * high) + 1e-9
    assert low - reach <= summary.loss <= high + reach
    assert summary.samples <= sum(n for _, n in honest) + 1.25 * 4096 * len(liars) + 1


# ---- steps that nobody watched -----------------------------------------------------------------------------------


def test_steps_that_are_missing_are_named_and_come_in_order_once_they_are_known(clock):
    monitor = at_step(clock, 3, "ab")
    clock.seconds += 100
    monitor.look([live(clock, "a", 8), live(clock, "b", 8)])
    assert monitor.missing() == range(4, 8)
    monitor.learn(record(peer, step, time=START + 120 + 20 * step) for peer in "ab" for step in (4, 5, 6, 7))
    assert not monitor.missing()
    made = monitor.complete()
    assert steps(made) == [4, 5, 6, 7, 8] and [summary.peers for summary in made] == [2] * 5
    assert [summary.time for summary in made] == sorted(summary.time for summary in made)


def test_what_nobody_knows_stays_missing(clock):
    monitor = at_step(clock, 3, "ab")
    clock.seconds += 100
    assert steps(monitor.update([live(clock, "a", 8), live(clock, "b", 8)])) == [8]


def test_a_step_of_which_a_single_stranger_tells_is_asked_for(clock):
    monitor = at_step(clock, 3, "abc")
    clock.seconds += 100
    monitor.look([live(clock, "liar", 5, loss=0.0)])
    monitor.look([live(clock, peer, 6) for peer in "abc"] + [live(clock, "liar", 6)])
    assert monitor.missing() == range(4, 6)


def test_a_liar_who_tells_of_a_new_step_at_every_look_makes_few_wait(clock):
    monitor = at_step(clock, 3, "abc")
    for lie in range(5, 5 + 2 * MAX_LONE):
        clock.seconds += 0.01
        monitor.update([*(live(clock, peer, 3) for peer in "abc"), live(clock, "liar", lie)])
    assert len(monitor._open) == MAX_LONE and monitor.step == 3
    clock.seconds += 20
    assert steps(monitor.update([live(clock, peer, 4) for peer in "abc"])) == [4]


def test_all_that_a_trainer_has_kept_is_taken_in(clock):
    """After a long absence of the auxiliary peer one trainer may be the only one that has been there all the time."""
    monitor = at_step(clock, 3, "abc")
    last = 4 + 2 * MAX_LONE
    monitor.look([live(clock, peer, last) for peer in "abc"])
    monitor.learn([live(clock, "a", step) for step in range(4, last)])
    monitor.look([live(clock, peer, last) for peer in "abc"])
    assert steps(monitor.complete()) == list(range(4, last + 1))


# ---- the swarm's figures -----------------------------------------------------------------------------------------


def progress(samples: int, of: int, seconds: float, peers: int = 2) -> GlobalTrainingProgress:
    return GlobalTrainingProgress(10, samples, of, peers, 0, collab.monitor.get_dht_time() + seconds, 0.0)


def test_one_gap_in_the_history_does_not_change_what_is_left(clock):
    monitor = at_step(clock, 5, "ab", last_step=105)
    clock.seconds += 86400  # nobody was there
    monitor.update([live(clock, peer, 6) for peer in "ab"])
    assert monitor.view().seconds_to_end == pytest.approx(99 * 20)


def test_the_view_has_the_swarms_figures(clock):
    monitor = at_step(clock, 10, "ab", last_step=110)
    monitor.auxiliaries = [
        AuxRecord(name="x", peer_id="p", version="1", rounds=3, saved_step=9, reported=START + clock.seconds)
    ]
    view = monitor.view(progress(samples=250, of=1000, seconds=15.0))
    assert (view.step, view.samples, view.tokens) == (10, 200, 20_000)
    assert view.steps_per_hour == pytest.approx(180) and view.seconds_to_end == pytest.approx(100 * 20)
    assert view.roles == {"trainer": 2, "client": 0, "auxiliary": 1}
    assert view.full_rounds == view.full_rounds_recent == 1.0 and view.utilisation == 0.5
    assert view.bytes_per_step == 4000
    assert (view.step_progress, view.seconds_to_next_step) == (0.25, 15.0)
    assert view.as_numbers()["peers_trainer"] == 2.0
    again = Monitor(monitor.history, lifetime=60.0)
    assert (again.samples, again.tokens) == (200, 20_000), "totals do not survive a restart"


def test_the_view_of_an_empty_swarm_has_no_figures(clock):
    view = watching(clock).view()
    assert view.samples == 0 and math.isnan(view.loss) and math.isnan(view.steps_per_hour)
    assert math.isnan(watching(clock).view(progress(samples=0, of=100, seconds=5.0, peers=0)).seconds_to_next_step)
