"""Where the numbers of a run are written: a file of JSON lines always, Trackio and Weights & Biases on request."""

import contextlib
import io
import json
import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from collab.errors import UserError
from collab.files import cannot_write, write_text

logger = logging.getLogger(__name__)

HISTORY = "metrics.jsonl"
REST = 10  # a tracker whose failure took t seconds is left alone for REST * t: it costs the run a tenth at most


class Tracker(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of one global step; steps grow."""

    def close(self) -> None:
        """Write out what is still in memory."""

    def where(self) -> str:
        """What a person opens or types to see the numbers."""


class JsonLinesTracker:
    """One JSON object for each global step in `metrics.jsonl`, flushed at once: `kill -9` cuts the last line at most.

    :param run_folder: continues the file that an earlier process left there, without the line that it was cut in.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / HISTORY
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = max((record["step"] for record in read_history(self.path)), default=-1)
        self._file = self.path.open("ab")
        # A cut line gets its end, so that the next record begins on a line of its own; readers skip what is left.
        if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step <= self.last_step:
            return
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}).encode() + b"\n")
        self._file.flush()
        self.last_step = step

    def close(self) -> None:
        self._file.close()

    def where(self) -> str:
        return str(self.path)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` in their order: step, time (seconds since 1970) and the metrics.

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

    A run of the same name is continued. Trackio fixes its folder when it is imported: one run folder for a process.
    """

    def __init__(self, run_folder: Path, project: str, run_name: str, config: dict[str, Any]) -> None:
        self._folder, self._project = (run_folder / "trackio").resolve(), project
        os.environ["TRACKIO_DIR"] = str(self._folder)
        with _quiet():
            import trackio

            if Path(trackio.TRACKIO_DIR) != self._folder:
                raise RuntimeError(f"trackio was imported before and writes to {trackio.TRACKIO_DIR}")
            self._run = trackio.init(
                project=project,
                name=run_name,
                config=config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        with _quiet():
            import trackio

            self._run.finish()
            with contextlib.suppress(RuntimeError):  # no current run: this is not the thread that began it
                trackio.finish()

    def where(self) -> str:
        here = Path.cwd()
        folder = self._folder.relative_to(here) if self._folder.is_relative_to(here) else self._folder
        return f"TRACKIO_DIR={shlex.quote(str(folder))} trackio show --project {shlex.quote(self._project)}"


class WandbTracker:
    """Weights & Biases, through its own client and login; with WANDB_MODE=offline nothing leaves the machine.

    The run's id lies in the run folder, so that a restarted process continues the same run.
    """

    def __init__(self, run_folder: Path, project: str, run_name: str, config: dict[str, Any]) -> None:
        import wandb

        id_file = run_folder / "wandb-run-id.txt"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=run_name,
            id=id_file.read_text(encoding="utf-8").strip(),
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

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()

    def where(self) -> str:
        if self._run.offline:
            folder = shlex.quote(str(Path(self._run.dir).parents[1]))
            return f"wandb sync {folder}/offline-run-*-{self._run.id}"
        return str(self._run.url)


TRACKERS: dict[str, Callable[[Path, str, str, dict[str, Any]], Tracker]] = {
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}


@dataclass
class _Slot:
    """One tracker with what is known about its health; `tracker` is None until it could be started."""

    name: str
    start: Callable[[], Tracker]
    tracker: Tracker | None = None
    missed: int = 0
    rest_until: float = 0.0

    def attempt(self, action: Callable[[Tracker], None]) -> None:
        """Do something with the tracker, starting it if need be. Its failures are told here and end here."""
        before = time.monotonic()
        if before < self.rest_until:
            self.missed += 1
            return
        try:
            if self.tracker is None:
                self.tracker = self.start()
            action(self.tracker)
        except Exception as error:  # noqa: BLE001 - numbers that could not be shown are no reason to lose a run
            self.missed += 1
            self.rest_until = time.monotonic() + REST * (time.monotonic() - before)
            if self.missed == 1:
                logger.warning(
                    "Tracker %s failed (%s). The run goes on without it and tries again; %s keeps every number.",
                    self.name,
                    " ".join(f"{type(error).__name__}: {error}".split()),
                    HISTORY,
                )
        else:
            if self.missed:
                logger.info("Tracker %s works again; it missed %d steps.", self.name, self.missed)
            self.missed = 0


class Trackers:
    """Gives each global step to every tracker; none of them can stop another or the caller."""

    def __init__(self, slots: list[_Slot], last_step: int = -1) -> None:
        self._slots = slots
        self.last_step = last_step  # the newest step that was ever recorded for this run
        for slot in slots:
            slot.attempt(lambda tracker: None)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record one global step; a step that was recorded before (a restart from a checkpoint) is left as it is."""
        if step <= self.last_step:
            return
        self.last_step = step
        for slot in self._slots:
            slot.attempt(lambda tracker: tracker.log(metrics, step))

    def close(self) -> None:
        for slot in self._slots:
            if slot.tracker is not None:
                slot.rest_until = 0.0
                slot.attempt(lambda tracker: tracker.close())

    def where(self) -> dict[str, str]:
        """For each tracker that runs, what a person opens or types to see it."""
        return {slot.name: slot.tracker.where() for slot in self._slots if slot.tracker is not None}


def make_trackers(
    report_to: list[str], run_folder: Path, project: str, run_name: str, config: dict[str, Any]
) -> Trackers:
    """Start the trackers of a run.

    :param report_to: names out of `TRACKERS`; `metrics.jsonl` is written in any case, also if the list is empty.
    :param run_folder: everything that a tracker keeps on this machine lies here; a restart with it continues.
    :param config: what the run was started with, shown by the trackers beside the curves.
    :raises UserError: a name is unknown, its package is not installed, or the run folder cannot be written.
    """
    for name in report_to:
        if name not in TRACKERS:
            raise UserError(f"There is no tracker {name!r}. --report_to knows {', '.join(TRACKERS)}; give one of them.")
        if find_spec(name) is None:
            raise UserError(f"The package {name} is not installed, so nothing can be reported to it. "
                            f"Type `pip install {name}`, or leave {name} out of --report_to.")  # fmt: skip
    try:
        history = JsonLinesTracker(run_folder)
    except OSError as error:
        raise UserError(cannot_write(run_folder / HISTORY, error)) from error
    slots = [_Slot(HISTORY, lambda: history)]
    slots += [_Slot(name, partial(TRACKERS[name], run_folder, project, run_name, config)) for name in report_to]
    return Trackers(slots, history.last_step)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Trackio prints a page of hints; the run prints the one line that matters by itself (`where`)."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
