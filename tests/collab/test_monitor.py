"""The history of the swarm: each global step once, in order, as soon as it is known."""

import math
import time
from types import SimpleNamespace

import pytest

import collab.monitor
from collab.metrics import PeerRecord
from collab.monitor import PATIENCE, Monitor, StepSummary
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
    slow = [record("a", 1), record("b", 0)]
    assert monitor.update(slow) == []
    clock.seconds += PATIENCE - 0.1
    assert monitor.update(slow) == []
    clock.seconds += 0.2
    [summary] = monitor.update(slow)
    assert (summary.step, summary.peers) == (1, 1)


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
