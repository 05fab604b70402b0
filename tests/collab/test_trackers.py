"""Trackers: the numbers survive crashes, restarts and each other's failures."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from importlib import import_module
from pathlib import Path

import pytest

from collab.errors import UserError
from collab.trackers import HISTORY, JsonLinesTracker, Trackers, _Slot, make_trackers, read_history

ROOT = Path(__file__).parents[2]


def python(program: str, **env: str) -> subprocess.CompletedProcess:
    """Trackers hold state for a whole process, and a restart is a new one: each test has processes of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, env={**clean, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_history(path)]


def test_every_step_is_on_disk_at_once_and_a_restart_repeats_none(tmp_path):
    first = make_trackers([], tmp_path / "run", "assembly", "aux", {})
    for step in (1, 2, 3):
        first.log({"loss": 1 / step}, step)
    assert steps(tmp_path / "run" / HISTORY) == [1, 2, 3], "a line waits in a buffer"
    second = make_trackers([], tmp_path / "run", "assembly", "aux", {})
    assert second.last_step == 3
    for step in (2, 3, 4):
        second.log({"loss": 9.0}, step)
    second.close()
    assert [(r["step"], r["loss"]) for r in read_history(tmp_path / "run" / HISTORY)] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)
    ]  # fmt: skip


def test_a_kill_costs_the_last_line_at_most(tmp_path):
    program = f"""
        from pathlib import Path
        from collab.trackers import JsonLinesTracker
        tracker = JsonLinesTracker(Path({str(tmp_path)!r}))
        for step in range(10**9):
            tracker.log({{"loss": 1.0, "text": "x" * 2000}}, step)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT)
    end = time.monotonic() + 30
    while len(read_history(tmp_path / HISTORY)) < 50 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = steps(tmp_path / HISTORY)
    assert len(found) >= 50 and found == list(range(len(found)))


def test_a_cut_line_is_skipped_and_does_not_spoil_the_next(tmp_path):
    (tmp_path / HISTORY).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert steps(tmp_path / HISTORY) == [1]
    tracker = JsonLinesTracker(tmp_path)
    tracker.log({"loss": 1.5}, 2)
    tracker.close()
    assert [(r["step"], r["loss"]) for r in read_history(tmp_path / HISTORY)] == [(1, 2.0), (2, 1.5)]
    assert read_history(tmp_path / "nothing.jsonl") == []


class Moody:
    """A tracker that fails on the steps that it is told to."""

    def __init__(self, bad_steps: range) -> None:
        self.bad_steps = bad_steps
        self.seen: list[int] = []

    def log(self, metrics, step):
        if step in self.bad_steps:
            raise ConnectionError("no route to the tracker")
        self.seen.append(step)

    def close(self):
        raise OSError("cannot close")

    def where(self):
        return "nowhere"


def test_a_failing_tracker_is_told_once_tried_again_and_harms_nobody(tmp_path, caplog):
    caplog.set_level("INFO")
    moody, history = Moody(range(2, 5)), JsonLinesTracker(tmp_path)
    trackers = Trackers([_Slot("moody", lambda: moody), _Slot(HISTORY, lambda: history)])
    for step in range(1, 7):
        trackers.log({"loss": 1.0}, step)
        time.sleep(0.02)
    trackers.close()
    assert moody.seen == [1, 5, 6]
    assert steps(tmp_path / HISTORY) == [1, 2, 3, 4, 5, 6]
    told = [message for message in caplog.messages if "no route to the tracker" in message]
    assert len(told) == 1 and "moody" in told[0]
    assert any("it missed 3 steps" in message for message in caplog.messages)
    assert any("cannot close" in message for message in caplog.messages)


def test_a_tracker_that_starts_late_takes_part_from_then_on():
    moody, attempts = Moody(range(0)), []

    def start():
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("not logged in")
        return moody

    trackers = Trackers([_Slot("moody", start)])
    assert trackers.where() == {}
    for step in (1, 2, 3):
        time.sleep(0.02)
        trackers.log({}, step)
    assert moody.seen == [2, 3] and trackers.where() == {"moody": "nowhere"}


def test_a_slow_failure_is_not_repeated_at_every_step():
    attempts = []

    def start():
        attempts.append(1)
        time.sleep(0.1)
        raise TimeoutError("the server does not answer")

    trackers = Trackers([_Slot("slow", start)])
    for step in range(20):
        trackers.log({}, step)
    assert len(attempts) == 1


def test_unknown_and_missing_trackers_are_refused_with_what_to_type(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="trackio, wandb"):
        make_trackers(["tensorbord"], tmp_path, "p", "r", {})
    monkeypatch.setattr("collab.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        make_trackers(["wandb"], tmp_path, "p", "r", {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        make_trackers([], tmp_path / "file" / "run", "p", "r", {})


RUN = """
    import sys
    from pathlib import Path
    from collab.trackers import make_trackers
    assert "trackio" not in sys.modules and "wandb" not in sys.modules
    trackers = make_trackers([{name!r}], Path({folder!r}), "assembly of all", "aux", {{"lr": 0.5}})
    for step in {steps!r}:
        trackers.log({{"loss": 10.0 / step, "peers": 3}}, step)
    trackers.close()
    print(trackers.where()[{name!r}])
    """


def test_trackio_needs_no_network_keeps_to_the_run_folder_and_resumes(tmp_path):
    folder = tmp_path / "run"
    for part in ([1, 2], [2, 3, 4]):
        done = python(RUN.format(name="trackio", folder=str(folder), steps=part), HOME=str(tmp_path / "home"))
        assert done.stderr == ""
        assert done.stdout == f"TRACKIO_DIR={folder}/trackio trackio show --project 'assembly of all'\n"
    [database] = (folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        [(config,)] = connection.execute("SELECT config FROM configs").fetchall()
    assert len({run_id for run_id, *_ in rows}) == 1 and {name for _, name, *_ in rows} == {"aux"}
    assert [(step, json.loads(metrics)["loss"]) for _, _, step, metrics in rows] == [
        (step, pytest.approx(10.0 / step)) for step in (1, 2, 3, 4)
    ]
    assert json.loads(config)["lr"] == 0.5
    assert not (tmp_path / "home" / ".cache" / "huggingface" / "trackio").exists()


def test_wandb_offline_writes_the_values_and_keeps_the_run(tmp_path):
    folder = tmp_path / "run"
    for part in ([1, 2], [2, 3]):
        if folder.exists():
            time.sleep(1.1)  # wandb names the folders of offline runs by the second
        done = python(RUN.format(name="wandb", folder=str(folder), steps=part), WANDB_MODE="offline")
        assert done.stdout.startswith("wandb sync ")
        assert done.stderr == ""
    run_id = (folder / "wandb-run-id.txt").read_text()
    files = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2, list(folder.rglob("*.wandb"))
    assert [wandb_history(file) for file in files] == [[(1, 10.0), (2, 5.0)], [(3, 10.0 / 3)]]


def wandb_history(file: Path) -> list[tuple[int, float]]:
    """Steps and losses in an offline file: a seven-byte head, then LevelDB's log of protobuf records.

    Each record begins with seven bytes (checksum, length, type); a file as small as these fits into one block.
    """
    pb = import_module("wandb.proto.wandb_internal_pb2")
    data, at, rows = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        record = pb.Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.HasField("history"):
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            rows.append((json.loads(values["_step"]), json.loads(values["loss"])))
    return rows
