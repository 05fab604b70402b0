"""Trackers: the numbers survive crashes, restarts and each other's failures."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest

from collab.errors import UserError
from collab.trackers import HISTORY, History, Trackers, _Slot, make_trackers, read_history, wandb_history

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
        from collab.trackers import History
        history = History(Path({str(tmp_path)!r}))
        for step in range(10**9):
            history.add({{"step": step, "time": 0.0, "loss": 1.0, "text": "x" * 2000}})
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
    history = History(tmp_path)
    history.add({"step": 2, "time": 0.0, "loss": 1.5})
    history.close()
    assert [(r["step"], r["loss"]) for r in read_history(tmp_path / HISTORY)] == [(1, 2.0), (2, 1.5)]
    assert read_history(tmp_path / "nothing.jsonl") == []


class Moody:
    """A tracker that fails on the steps that it is told to, after having taken some of what it was given."""

    def __init__(self, bad: range = range(0)) -> None:
        self.bad = bad
        self.seen: list[int] = []
        self.last_step = -1

    def log(self, entries):
        for entry in entries:
            if entry["step"] in self.bad:
                self.bad = range(self.bad.start, self.bad.stop - 1)
                raise ConnectionError("no route to the tracker")
            self.seen.append(entry["step"])
            self.last_step = entry["step"]

    def close(self):
        raise OSError("cannot close")

    def where(self):
        return "nowhere"


def rested(trackers: Trackers) -> Trackers:
    """As if the pause after a failure were over."""
    for slot in trackers._slots:
        slot.rest_until = 0.0
    return trackers


def test_a_failing_tracker_is_told_once_gets_what_it_missed_and_harms_nobody(tmp_path, caplog):
    caplog.set_level("INFO")
    moody = Moody(range(2, 5))
    trackers = Trackers(History(tmp_path), [_Slot("moody", lambda: moody)])
    for step in range(1, 7):
        rested(trackers).log({"loss": 1.0}, step)
    assert moody.seen == [1, 2, 3, 4, 5, 6], "a step is missing, or there twice"
    trackers.close()
    assert steps(tmp_path / HISTORY) == [1, 2, 3, 4, 5, 6]
    told = [message for message in caplog.messages if "no route to the tracker" in message]
    assert len(told) == 1 and "moody" in told[0]
    assert any("has got what it missed" in message for message in caplog.messages)
    assert any("cannot close" in message for message in caplog.messages)


def test_a_tracker_that_starts_late_gets_the_whole_history(tmp_path):
    moody, attempts = Moody(), []

    def start():
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("not logged in")
        return moody

    trackers = Trackers(History(tmp_path), [_Slot("moody", start)])
    assert set(trackers.where()) == {HISTORY}
    for step in (1, 2, 3):
        rested(trackers).log({}, step)
    assert moody.seen == [1, 2, 3] and trackers.where()["moody"] == "nowhere"


def test_what_came_between_the_file_and_the_tracker_is_sent_at_the_next_start(tmp_path):
    """A kill right after a line was written: the tracker has not got it."""
    history = History(tmp_path)
    for step in (1, 2, 5):
        history.add({"step": step, "time": 0.0})
    moody = Moody()
    moody.last_step = 1
    Trackers(History(tmp_path), [_Slot("moody", lambda: moody)])
    assert moody.seen == [2, 5]


def test_a_full_disk_loses_nothing(tmp_path, caplog):
    moody = Moody()
    history = History(tmp_path)
    trackers = Trackers(history, [_Slot("moody", lambda: moody)])
    trackers.log({"loss": 1.0}, 1)
    history._file.close()
    history._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the system's own full disk
    history.path, real = Path("/dev/full"), history.path
    trackers.log({"loss": 2.0}, 2)
    assert steps(real) == [1] and moody.seen == [1] and "Free some space" in caplog.text
    history.path = real
    trackers.log({"loss": 3.0}, 3)
    assert steps(real) == [1, 2, 3] == moody.seen
    trackers.close()


def test_a_slow_failure_is_not_repeated_at_every_step(tmp_path):
    attempts = []

    def start():
        attempts.append(1)
        time.sleep(0.1)
        raise TimeoutError("the server does not answer")

    trackers = Trackers(History(tmp_path), [_Slot("slow", start)])
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


KILLED = RUN.replace("trackers.close()", "__import__('os').kill(__import__('os').getpid(), 9)").replace(
    '"peers": 3', '"peers": 3, "text": "x" * 1000'
)


def killed(program: str, **env: str) -> None:
    """The same, but the process dies without another word."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, env={**clean, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


def trackio_rows(folder: Path) -> list[tuple]:
    [database] = folder.glob("*.db")
    with sqlite3.connect(database) as connection:
        return connection.execute("SELECT run_id, run_name, step, metrics, timestamp FROM metrics").fetchall()


def trackio_steps(folder: Path) -> list[int]:
    return [row[2] for row in trackio_rows(folder)]


def wandb_files(folder: Path) -> list[Path]:
    run_id = (folder / "wandb-run-id.txt").read_text()
    return sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))


def wandb_steps(folder: Path) -> Counter[int]:
    return Counter(step for file in wandb_files(folder) for step, _ in wandb_history(file))


def test_trackio_needs_no_network_keeps_to_the_run_folder_and_resumes(tmp_path):
    folder = tmp_path / "run"
    for part in ([1, 2], [2, 3, 4]):
        done = python(RUN.format(name="trackio", folder=str(folder), steps=part), HOME=str(tmp_path / "home"))
        assert done.stderr == ""
        assert done.stdout == f"TRACKIO_DIR={folder}/trackio trackio show --project 'assembly of all'\n"
    rows = trackio_rows(folder / "trackio")
    assert {run_id for run_id, *_ in rows} == {name for _, name, *_ in rows} == {"aux"}
    assert [(step, json.loads(metrics)["loss"]) for _, _, step, metrics, _ in rows] == [
        (step, pytest.approx(10.0 / step)) for step in (1, 2, 3, 4)
    ]
    [database] = (folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        [(config,)] = connection.execute("SELECT config FROM configs").fetchall()
    assert json.loads(config)["lr"] == 0.5
    assert not (tmp_path / "home" / ".cache" / "huggingface" / "trackio").exists()


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_database_of_trackio_is_made_again_from_the_history(tmp_path, damage):
    folder = tmp_path / "run"
    python(RUN.format(name="trackio", folder=str(folder), steps=[1, 2]))
    [database] = (folder / "trackio").glob("*.db")
    whole = database.read_bytes()
    database.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"x" * len(whole))
    done = python(RUN.format(name="trackio", folder=str(folder), steps=[2, 3]))
    assert "is damaged. It is kept as" in done.stderr and "failed" not in done.stderr
    assert trackio_steps(folder / "trackio") == [1, 2, 3]
    assert database.with_suffix(".damaged").exists()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_after_a_kill_the_tracker_has_each_step_once(tmp_path, name):
    """W&B's offline file loses up to 32 KiB with the process."""
    folder = tmp_path / "run"
    killed(KILLED.format(name=name, folder=str(folder), steps=list(range(1, 60))), WANDB_MODE="offline")
    History(folder).add({"step": 60, "time": 1.7e9, "loss": 0.5})  # and it died before it could send this one
    if name == "wandb":
        time.sleep(1.1)  # wandb names the folders of offline runs by the second
    python(RUN.format(name=name, folder=str(folder), steps=[60, 61]), WANDB_MODE="offline")
    written = steps(folder / HISTORY)
    assert written == list(range(1, 62))
    if name == "trackio":
        assert trackio_steps(folder / "trackio") == written
        assert trackio_rows(folder / "trackio")[59][4].startswith("2023-11-14"), "not the time when it was made"
    else:
        assert wandb_steps(folder) == Counter(written)
        losses = {step: values["loss"] for file in wandb_files(folder) for step, values in wandb_history(file)}
        assert losses == {entry["step"]: entry["loss"] for entry in read_history(folder / HISTORY)}


def test_wandb_offline_writes_the_values_and_keeps_the_run(tmp_path):
    folder = tmp_path / "run"
    for part in ([1, 2], [2, 3]):
        if folder.exists():
            time.sleep(1.1)  # wandb names the folders of offline runs by the second
        done = python(RUN.format(name="wandb", folder=str(folder), steps=part), WANDB_MODE="offline")
        assert done.stdout.startswith("wandb sync ")
        assert done.stderr == ""
    found = [[(step, values["loss"]) for step, values in wandb_history(file)] for file in wandb_files(folder)]
    assert found == [[(1, 10.0), (2, 5.0)], [(3, 10.0 / 3)]]


SERVER = """
    import sys, trackio
    shown = trackio.show(open_browser=False, block_thread=False, server_port=int(sys.argv[1]))
    sys.stdin.read()
    """

REMOTE = """
    import sys
    from pathlib import Path
    from collab.trackers import make_trackers
    trackers = make_trackers(["trackio"], Path({folder!r}), "assembly", "aux", {{"lr": 0.5}}, {space!r})
    for step in {steps!r}:
        for slot in trackers._slots:
            slot.rest_until = 0.0
        trackers.log({{"loss": 10.0 / step, "nothing": float("nan")}}, step)
    trackers.close()
    print(trackers.where())
    """


def test_a_trackio_server_gets_every_step_once_even_if_it_was_away(tmp_path):
    """Trackio's own server and client. A Space on the Hub is the same server, and made by the client."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, folder = "a-token-of-our-own", tmp_path / "run"
    space = f"http://127.0.0.1:{port}?write_token={token}"
    done = python(REMOTE.format(folder=str(folder), space=space, steps=[1, 2]))
    assert trackio_steps(folder / "trackio") == [1, 2], "a server that is away keeps the file from being written"
    assert "trackio space failed" in done.stderr and token not in done.stderr + done.stdout

    env = {"TRACKIO_DIR": str(tmp_path / "server"), "TRACKIO_WRITE_TOKEN": token}
    command = [sys.executable, "-c", textwrap.dedent(SERVER), str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
    ) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if "write_token=" in line:
                    space = line.split()[-1]
                    break
            for part in ([3], [4]):
                done = python(REMOTE.format(folder=str(folder), space=space, steps=part))
            (file,) = folder.glob("trackio-sent-*.txt")
            assert file.read_text() == "4"
            file.write_text("2")  # killed after the server had it, and before that was noted
            done = python(REMOTE.format(folder=str(folder), space=space, steps=[5]))
        finally:
            server.kill()
    assert trackio_steps(tmp_path / "server") == [1, 2, 3, 4, 5]
    assert "write_token" not in done.stdout
