"""A trainer's records: said again, taken back, kept, and handed out to whoever was away."""

import json
import time
from collections.abc import Callable

from collab import reports as module
from collab.contributions import FILE, Contributions
from collab.metrics import PeerRecord, is_live, read_records, run_validators
from collab.monitor import Monitor
from collab.peer import Peer
from collab.recorder import Recorder
from collab.reports import PROTOCOL, Reports, fetch_reports, reports_in
from collab.trackers import HISTORY, make_trackers, read_history
from tests.collab.test_monitor import record


def of(peer: Peer, step: int, **changes) -> PeerRecord:
    now = time.time()
    return record(peer.peer_id, step, **{"name": "a volunteer", "time": now, "reported": now, **changes})


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def swarm_of_two(start_peer) -> tuple[Peer, Peer]:
    first = start_peer()
    second = start_peer(initial_peers=first.addresses())
    for peer in (first, second):
        peer.dht.add_validators(run_validators("ours", "ours_1", 30.0))
    return first, second


def test_a_trainer_says_again_that_it_is_there_and_takes_it_back(start_peer):
    watcher, trainer = swarm_of_two(start_peer)
    reports = Reports(trainer, "ours", lifetime=3.0)
    reports.add(of(trainer, 1))
    assert wait_for(lambda: read_records(watcher, "ours"))
    [heard] = read_records(watcher, "ours")
    assert wait_for(lambda: read_records(watcher, "ours")[0].reported > heard.reported + 1)
    [again] = read_records(watcher, "ours")
    assert (again.step, again.time) == (heard.step, heard.time) and is_live(again, 10.0)
    reports.stop()
    assert wait_for(lambda: read_records(watcher, "ours")[0].left)
    assert not is_live(read_records(watcher, "ours")[0], 10.0) and reports.failures == 0


def test_the_last_steps_are_kept_and_handed_out(start_peer, monkeypatch):
    monkeypatch.setattr(module, "KEPT_STEPS", 5)
    watcher, trainer = swarm_of_two(start_peer)
    assert fetch_reports(watcher, [trainer.peer_id]) == {}, "nobody has kept anything yet"
    reports = Reports(trainer, "ours", lifetime=60.0)
    reports._kept = type(reports._kept)(maxlen=5)
    for step in range(1, 14):
        reports.add(of(trainer, step))
    kept = fetch_reports(watcher, [trainer.peer_id])[trainer.peer_id]
    assert [entry.step for entry in kept] == list(range(7, 14))
    reports.stop()


def test_what_a_liar_hands_out_is_checked_like_any_record():
    good = record("liar", 3)
    lines = [
        json.dumps(good.dict()),
        json.dumps(record("another", 4).dict()),
        json.dumps(good.dict() | {"step": 5, "loss": -1e9}),
        json.dumps(good.dict() | {"step": 6, "loss": float("nan")}),
        json.dumps(good.dict() | {"step": 7, "name": "x" * 10**6}),
        json.dumps(good.dict() | {"step": 8})[:-9],
        "[" * 4000,
        "\x00\xff",
        "{}",
    ]
    assert reports_in("\n".join(lines).encode("latin-1"), "liar") == [good]
    assert len(reports_in(b"\n".join([json.dumps(good.dict()).encode()] * 10**4), "liar")) == 1


def test_who_hands_out_too_much_is_not_heard(start_peer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 1000)
    watcher, liar = swarm_of_two(start_peer)
    (tmp_path / "much").write_bytes(b" " * 10_000)
    liar.serve(PROTOCOL, tmp_path / "much")
    assert fetch_reports(watcher, [liar.peer_id]) == {}


def test_steps_that_were_made_unobserved_are_asked_for_once_and_come_in_order(start_peer, tmp_path):
    watcher, trainer = swarm_of_two(start_peer)
    reports = Reports(trainer, "ours", lifetime=60.0)
    now = time.time()
    for step in range(1, 8):  # nobody watches; the DHT holds the last one
        reports.add(of(trainer, step, time=now - 700 + 100 * step, samples=100, samples_total=100 * step, tokens=9))
    told: list[int] = []
    trackers = make_trackers([], tmp_path, "p", "r", {})
    monitor = Monitor(lifetime=60.0, target_batch_size=1000, start=None)
    contributions = Contributions(tmp_path / FILE, most=1000)
    recorder = Recorder(
        watcher, "ours", monitor, contributions, trackers, lambda summary: told.append(summary.step)
    )  # fmt: skip
    assert wait_for(lambda: monitor.step == 7), recorder.health
    recorder.stop(15)
    trackers.close()
    entries = read_history(tmp_path / HISTORY)
    assert [entry["step"] for entry in entries] == told == list(range(1, 8))
    assert [round(entry["time"] - now) for entry in entries] == [100 * step - 700 for step in range(1, 8)]
    assert monitor.tokens == 63 and contributions.of_ids == {trainer.peer_id: 700}
    reports.stop()


def test_a_liar_in_the_dht_neither_ends_the_run_nor_changes_what_is_written(start_peer, tmp_path):
    watcher, first = swarm_of_two(start_peer)
    second, liar = (start_peer(initial_peers=watcher.addresses()) for _ in range(2))
    for peer in (second, liar):
        peer.dht.add_validators(run_validators("ours", "ours_1", 30.0))
    reports = [Reports(peer, "ours", lifetime=60.0) for peer in (first, second, liar)]
    reports[2].add(of(liar, 1000, loss=1e4, samples=10**15, samples_total=10**15))
    trackers = make_trackers([], tmp_path, "p", "r", {})
    monitor = Monitor(lifetime=60.0, target_batch_size=1000, last_step=1000)
    contributions = Contributions(tmp_path / FILE, most=1000)
    recorder = Recorder(watcher, "ours", monitor, contributions, trackers, lambda summary: None)
    for step in (1, 2, 3):
        for mine in reports[:2]:
            mine.add(of(mine._peer, step, samples=100, samples_total=100 * step))
        assert wait_for(lambda: monitor.step == step), (monitor.step, recorder.health)  # noqa: B023
    recorder.stop(15)
    trackers.close()
    entries = read_history(tmp_path / HISTORY)
    assert [(entry["step"], entry["loss"], entry["samples"]) for entry in entries] == [(n, 2.0, 200) for n in (1, 2, 3)]
    assert contributions.of_ids == {first.peer_id: 300, second.peer_id: 300}
    for each in reports:
        each.stop()
