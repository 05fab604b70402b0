"""Where the numbers of a run are written: a file of JSON lines always, Trackio and Weights & Biases on request.

The file is the truth. A tracker says how far it has got, and is sent what it lacks from the file, in order: after an
outage, a failure of its own, or a `kill -9` at any moment it has each global step once, as the file does.
"""

import contextlib
import io
import json
import logging
import os
import re
import shlex
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from collab.errors import UserError
from collab.files import cannot_write, write_text

logger = logging.getLogger(__name__)

HISTORY = "metrics.jsonl"
REST = 10  # a tracker whose failure took t seconds is left alone for REST * t: it costs the run a tenth at most
SENT_AT_ONCE = 500  # global steps
SPACE_SECONDS = 20.0
MAX_WAITING = 100_000  # global steps in memory while the disk is full

Entry = dict[str, Any]
"""A global step as a line of `metrics.jsonl` has it: step, time (seconds since 1970) and the metrics."""


class Tracker(Protocol):
    last_step: int
    """The newest global step that it holds for good, also if this process is killed now; -1 if none."""

    def log(self, entries: Sequence[Entry]) -> None:
        """Record global steps that are newer than `last_step`, in order; or raise, and be given them again."""

    def close(self) -> None:
        """Write out what is still in memory."""

    def where(self) -> str:
        """What a person opens or types to see the numbers."""


class History:
    """One JSON object for each global step in `metrics.jsonl`, flushed at once: `kill -9` cuts the last line at most.

    :param run_folder: continues the file that an earlier process left there, without the line that it was cut in.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / HISTORY
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = max((entry["step"] for entry in read_history(self.path)), default=-1)
        """The newest step that was given to it."""
        self.written_step = self.last_step
        self._waiting: list[Entry] = []
        self._file = self.path.open("ab")
        # A cut line gets its end, so that the next record begins on a line of its own; readers skip what is left.
        if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")

    def add(self, entry: Entry) -> None:
        """Write a newer step; while the disk is full it waits in memory, and is written with a later one."""
        self._waiting.append(entry)
        self.last_step = entry["step"]
        try:
            self.write()
        except OSError as error:
            if len(self._waiting) == 1:
                logger.warning(
                    "%s cannot be written (%s). The run goes on; what is new waits in memory. Free some space.",
                    self.path,
                    error.strerror or error,
                )
            del self._waiting[:-MAX_WAITING]

    def write(self) -> None:
        """Write what waits.

        :raises OSError: it cannot be written; the file is as it was.
        """
        if self._file.closed:
            self._file = self.path.open("ab")
        end = self._file.tell()
        try:
            self._file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in self._waiting))
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):  # the buffer cannot be emptied either
                self._file.close()
            with contextlib.suppress(OSError):
                os.truncate(self.path, end)  # a line that was cut
            raise
        if self._waiting:
            self.written_step = self._waiting[-1]["step"]
            self._waiting.clear()

    def after(self, step: int) -> Iterator[list[Entry]]:
        """What was written after that step, in portions."""
        entries = [entry for entry in read_history(self.path) if entry["step"] > step]
        for start in range(0, len(entries), SENT_AT_ONCE):
            yield entries[start : start + SENT_AT_ONCE]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.write()
        with contextlib.suppress(OSError):
            self._file.close()


def read_history(path: Path) -> list[Entry]:
    """The records of a `metrics.jsonl` in their order.

    A line that was cut by a crash is skipped; a file that does not exist yet has no records.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class TrackioTracker:
    """Trackio's SQLite file inside the run folder; no account, no network, no server of ours.

    Steps are written in the calling thread under ids of their own, so that a failure is known at once and a step that
    is sent twice is there once (`Run.log` keeps them in memory for half a second and drops those that it cannot write).
    A damaged file is made again. Trackio fixes its folder when it is imported: one run folder for a process.
    """

    def __init__(self, run_folder: Path, project: str, run_name: str, config: dict[str, Any]) -> None:
        self._folder, self._project, self._name = (run_folder / "trackio").resolve(), project, run_name
        self._config = config
        self._storage = _import_trackio(run_folder).sqlite_storage.SQLiteStorage
        _set_aside_if_damaged(Path(self._storage.get_project_db_path(project)))
        newest = self._storage.get_max_step_for_run(project, run_name, run_id=run_name)
        self.last_step = -1 if newest is None else int(newest)

    def log(self, entries: Sequence[Entry]) -> None:
        self._storage.bulk_log(
            project=self._project,
            run=self._name,
            run_id=self._name,
            metrics_list=[_metrics(entry) for entry in entries],
            steps=[entry["step"] for entry in entries],
            timestamps=[_timestamp(entry) for entry in entries],
            log_ids=[f"{self._name}-{entry['step']}" for entry in entries],
            config=self._config if self.last_step < 0 else None,
        )
        self.last_step = entries[-1]["step"]

    def close(self) -> None:
        """Nothing is in memory."""

    def where(self) -> str:
        here = Path.cwd()
        folder = self._folder.relative_to(here) if self._folder.is_relative_to(here) else self._folder
        return f"TRACKIO_DIR={shlex.quote(str(folder))} trackio show --project {shlex.quote(self._project)}"


def _set_aside_if_damaged(database: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            sound = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.OperationalError:  # full, read-only or in use: Trackio will say so
        return
    except sqlite3.DatabaseError:
        sound = False
    if not sound:
        aside = database.with_suffix(".damaged")
        logger.warning("%s is damaged. It is kept as %s, and made again from %s.", database, aside.name, HISTORY)
        database.replace(aside)
        for suffix in ("-wal", "-shm"):
            database.with_name(database.name + suffix).unlink(missing_ok=True)


class TrackioSpace:
    """Trackio's page for everybody: a Space on the Hub, or a Trackio server, through Trackio's client.

    It keeps a step that is sent twice once; how far it has got stands in a file in the run folder.

    :param space: ORG/NAME of a Space, which is made if it does not exist (the token is the Hub's own login), or the
      address of a server as `trackio show` prints it, with its `write_token`.
    """

    def __init__(self, run_folder: Path, project: str, run_name: str, config: dict[str, Any], space: str) -> None:
        trackio = _import_trackio(run_folder)
        self._address, self._project, self._name, self._config = space.partition("?")[0], project, run_name, config
        self._serialize = trackio.utils.serialize_values
        self._sent = run_folder / f"trackio-sent-{sha256(self._address.encode()).hexdigest()[:8]}.txt"
        self.last_step = -1
        with contextlib.suppress(FileNotFoundError, ValueError):  # damaged: it gets all of them again
            self.last_step = int(self._sent.read_text(encoding="utf-8"))
        self._token: str | None = None
        if "://" not in space:
            if self.last_step < 0:  # `init` makes the Space, and the bucket that keeps its numbers
                with _quiet():
                    run = trackio.init(project=project, name=run_name, space_id=space, resume="allow", embed=False,
                                       auto_log_gpu=False, auto_log_cpu=False)  # fmt: skip
                    run.finish()
            self._token = import_module("huggingface_hub").get_token()
        with _quiet():  # the token apart from the address, which is named when it does not answer
            self._client = import_module("trackio.remote_client").RemoteClient(
                self._address,
                hf_token=self._token,
                write_token=trackio.utils.parse_trackio_server_url(space)[1],
                httpx_kwargs={"timeout": SPACE_SECONDS},
                verbose=False,
            )

    def log(self, entries: Sequence[Entry]) -> None:
        logs = [
            {
                "project": self._project,
                "run": self._name,
                "run_id": self._name,
                "metrics": self._serialize(_metrics(entry)),
                "step": entry["step"],
                "config": self._config if self.last_step < 0 and entry is entries[0] else None,
                "log_id": f"{self._name}-{entry['step']}",
            }
            for entry in entries
        ]
        self._client.predict(api_name="/bulk_log", logs=logs, hf_token=self._token)
        self.last_step = entries[-1]["step"]
        write_text(self._sent, str(self.last_step))

    def close(self) -> None:
        """Nothing is in memory."""

    def where(self) -> str:
        return self._address if "://" in self._address else f"https://huggingface.co/spaces/{self._address}"


def _import_trackio(run_folder: Path) -> Any:
    folder = (run_folder / "trackio").resolve()
    os.environ["TRACKIO_DIR"] = str(folder)
    with _quiet():
        trackio = import_module("trackio")
        import_module("trackio.sqlite_storage")
    if Path(trackio.TRACKIO_DIR) != folder:
        raise RuntimeError(f"trackio was imported before and writes to {trackio.TRACKIO_DIR}")
    return trackio


class WandbTracker:
    """Weights & Biases, through its own client and login; with WANDB_MODE=offline nothing leaves the machine.

    The run's id lies in the run folder, so that a restarted process continues the same run. How far it has got is what
    W&B says when a run is resumed, and offline what is in its files: it writes them in blocks of 32 KiB, so that a
    `kill -9` takes the last steps along.
    """

    def __init__(self, run_folder: Path, project: str, run_name: str, config: dict[str, Any]) -> None:
        import wandb

        id_file = run_folder / "wandb-run-id.txt"
        run_id = id_file.read_text(encoding="utf-8", errors="replace").strip() if id_file.exists() else ""
        if not re.fullmatch(r"[\w-]+", run_id, re.ASCII):  # or damaged
            run_id = uuid.uuid4().hex[:12]
            write_text(id_file, run_id)
        files = run_folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
        kept = max((step for file in files for step, _ in wandb_history(file)), default=-1)
        self._run = wandb.init(
            project=project,
            name=run_name,
            id=run_id,
            resume="allow",
            dir=run_folder,
            config=config,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                x_disable_stats=True,
                x_disable_meta=True,
                init_timeout=20,  # seconds; without an answer the run goes on and asks again later
                finish_timeout=30,  # seconds; what is not uploaded by then stays on disk for `wandb sync`
            ),
        )
        self.last_step = kept if self._run.offline else int(self._run.starting_step) - 1

    def log(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._run.log(_metrics(entry) | {"_timestamp": entry["time"]}, step=entry["step"])
            self.last_step = entry["step"]

    def close(self) -> None:
        self._run.finish()

    def where(self) -> str:
        if self._run.offline:
            folder = shlex.quote(str(Path(self._run.dir).parents[1]))
            return f"wandb sync {folder}/offline-run-*-{self._run.id}"
        return str(self._run.url)


def wandb_history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The steps in a file of W&B's with their values, as far as it is whole.

    Such a file is a head of seven bytes and a log in LevelDB's format (its doc/log_format.md) of protobuf messages:
    blocks of 32 KiB, in each of them pieces of messages with a checksum of four bytes, a length of two, and a kind.
    """
    kinds = import_module("wandb.proto.wandb_internal_pb2")
    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if LEVELDB_BLOCK - at % LEVELDB_BLOCK < 7:  # no room for the head of a piece: zeros
            at += LEVELDB_BLOCK - at % LEVELDB_BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece = data[at + 7 : at + 7 + length]
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or len(piece) < length:  # cut here
            return
        message = piece if kind in (WHOLE, FIRST) else message + piece
        at += 7 + length
        if kind in (WHOLE, LAST):
            record = kinds.Record.FromString(message)
            if record.HasField("history"):
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                yield values["_step"], values


LEVELDB_BLOCK = 32768
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # pieces of a message

TRACKERS: dict[str, Callable[..., Tracker]] = {"trackio": TrackioTracker, "wandb": WandbTracker}


@dataclass
class _Slot:
    """One tracker with what is known about its health; `tracker` is None until it could be started."""

    name: str
    start: Callable[[], Tracker]
    tracker: Tracker | None = None
    failed: bool = field(default=False, init=False)
    rest_until: float = field(default=0.0, init=False)

    def attempt(self, action: Callable[[Tracker], None]) -> None:
        """Do something with the tracker, starting it if need be. Its failures are told here and end here."""
        before = time.monotonic()
        if before < self.rest_until:
            return
        try:
            if self.tracker is None:
                self.tracker = self.start()
            action(self.tracker)
        except Exception as error:  # noqa: BLE001 - numbers that could not be shown are no reason to lose a run
            self.rest_until = time.monotonic() + REST * (time.monotonic() - before)
            if not self.failed:
                logger.warning(
                    "Tracker %s failed (%s). The run goes on, and what it misses is sent later; %s keeps every number.",
                    self.name,
                    " ".join(f"{type(error).__name__}: {error}".split()),
                    HISTORY,
                )
            self.failed = True
        else:
            if self.failed:
                logger.info("Tracker %s works again, and has got what it missed.", self.name)
            self.failed = False


class Trackers:
    """Writes each global step down and gives it to every tracker; none of them can stop another or the caller."""

    def __init__(self, history: History, slots: list[_Slot]) -> None:
        self._history, self._slots = history, slots
        for slot in slots:
            slot.attempt(self._send_what_it_lacks)

    @property
    def last_step(self) -> int:
        """The newest step that was ever recorded for this run; -1 if none was."""
        return self._history.last_step

    def log(self, metrics: dict[str, float], step: int, made: float | None = None) -> None:
        """Record one global step; a step that was recorded before (a restart from a checkpoint) is left as it is.

        :param made: when, in seconds since 1970; now if it is left out.
        """
        if step <= self.last_step:
            return
        before = self.last_step
        entry = {"step": step, "time": time.time() if made is None else made, **metrics}
        self._history.add(entry)
        if self._history.written_step < step:
            return
        for slot in self._slots:
            slot.attempt(partial(self._send, entry, before))

    def _send(self, entry: Entry, before: int, tracker: Tracker) -> None:
        if tracker.last_step == before:
            tracker.log([entry])
        else:
            self._send_what_it_lacks(tracker)

    def _send_what_it_lacks(self, tracker: Tracker) -> None:
        for entries in self._history.after(tracker.last_step):
            tracker.log(entries)

    def close(self) -> None:
        self._history.close()
        for slot in self._slots:
            slot.rest_until = 0.0
            slot.attempt(self._send_what_it_lacks)
            if slot.tracker is not None:
                slot.attempt(lambda tracker: tracker.close())

    def where(self) -> dict[str, str]:
        """For each tracker that runs, what a person opens or types to see it."""
        return {HISTORY: str(self._history.path)} | {
            slot.name: slot.tracker.where() for slot in self._slots if slot.tracker is not None
        }


def make_trackers(
    report_to: list[str],
    run_folder: Path,
    project: str,
    run_name: str,
    config: dict[str, Any],
    trackio_space: str | None = None,
) -> Trackers:
    """Start the trackers of a run.

    :param report_to: names out of `TRACKERS`; `metrics.jsonl` is written in any case, also if the list is empty.
    :param run_folder: everything that a tracker keeps on this machine lies here; a restart with it continues.
    :param config: what the run was started with, shown by the trackers beside the curves.
    :param trackio_space: where Trackio shows the run in public; see `TrackioSpace`.
    :raises UserError: a name is unknown, its package is not installed, or the run folder cannot be written.
    """
    for name in report_to:
        if name not in TRACKERS:
            raise UserError(f"There is no tracker {name!r}. --report_to knows {', '.join(TRACKERS)}; give one of them.")
        if find_spec(name) is None:
            raise UserError(f"The package {name} is not installed, so nothing can be reported to it. "
                            f"Type `pip install {name}`, or leave {name} out of --report_to.")  # fmt: skip
    config = json.loads(json.dumps(config, default=str))
    try:
        history = History(run_folder)
    except OSError as error:
        raise UserError(cannot_write(run_folder / HISTORY, error)) from error
    start: dict[str, Callable[[], Tracker]] = {
        name: partial(TRACKERS[name], run_folder, project, run_name, config) for name in report_to
    }
    if trackio_space is not None and "trackio" in start:
        # by itself: neither of the two has to wait for the other
        start["trackio space"] = partial(TrackioSpace, run_folder, project, run_name, config, trackio_space)
    return Trackers(history, [_Slot(name, begin) for name, begin in start.items()])


def _metrics(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("step", "time")}


def _timestamp(entry: Entry) -> str:
    return datetime.fromtimestamp(entry["time"], UTC).isoformat()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Trackio prints a page of hints; the run prints the one line that matters by itself (`where`)."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
