"""Whether the auxiliary peer's numbers are true: what it wrote, beside what the trainers themselves have counted.

The demo's swarm runs with three trainers that come and go. At the end the page's JSON, Trackio's file, W&B's offline
file and the JSON lines are compared with the trainers' own consoles: global steps exactly, samples to 1 %.
"""

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.join import start, wait
from benchmarks.report import Report, run_benchmark
from collab.trackers import HISTORY, read_history, wandb_history
from scripts.local_swarm import LOOPBACK, ROOT, end, wait_for_address

TRAINERS = 3
STAYS, AWAY = (60.0, 150.0), (5.0, 20.0)  # seconds
STEP = re.compile(r"^step (\d+)/.*  ([\d,]+) samples given", re.MULTILINE)


class Visitor:
    """A trainer that stays for a while, leaves, and comes again."""

    def __init__(self, number: int, address: str, scratch: Path) -> None:
        self.name, self.address, self.scratch = f"visitor-{number}", address, scratch
        self.logs: list[Path] = []
        self.order = random.Random(number)
        self.program: subprocess.Popen[bytes] | None = None
        self.turn_at = 0.0

    def turn(self) -> None:
        """Come or go if it is time."""
        if time.monotonic() < self.turn_at:
            return
        if self.program is None:
            self.logs.append(self.scratch / f"{self.name}-{len(self.logs)}.log")
            self.program = start(
                self.logs[-1], "run_trainer.py", "--initial_peers", self.address, "--host_maddrs", LOOPBACK,
                "--public_name", self.name, "--threads", "1", "--cache_dir", str(self.scratch / "cache"),
            )  # fmt: skip
            self.turn_at = time.monotonic() + self.order.uniform(*STAYS)
        else:
            self.leave()
            self.turn_at = time.monotonic() + self.order.uniform(*AWAY)

    def leave(self) -> None:
        if self.program is not None:
            self.program.send_signal(signal.SIGINT)
            self.program.wait(60)
            self.program = None

    def counted(self) -> tuple[set[int], int]:
        """The global steps that it has told of, and the samples that it gave in all its sessions."""
        sessions = [STEP.findall(log.read_text()) for log in self.logs]
        steps = {int(step) for session in sessions for step, _ in session}
        return steps, sum(int(session[-1][1].replace(",", "")) for session in sessions if session)


def measure(report: Report, minutes: int) -> None:
    """Run the swarm for `minutes`, then compare."""
    with tempfile.TemporaryDirectory(prefix="samiti-") as temporary:
        scratch, folder, config = Path(temporary), Path(temporary, "run"), Path(temporary, "run.yaml")
        settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
        settings |= {"max_global_steps": 100_000, "report_to": ["trackio", "wandb"], "page_port": 0}
        config.write_text(yaml.safe_dump(settings))
        os.environ["WANDB_MODE"] = "offline"
        auxiliary = start(
            scratch / "auxiliary.log", "run_aux_peer.py", "--config", str(config), "--run_folder", str(folder),
            "--host_maddrs", LOOPBACK, "--cache_dir", str(scratch / "cache"),
        )  # fmt: skip
        visitors: list[Visitor] = []
        try:
            address = wait_for_address(auxiliary, folder / "join.txt")
            visitors += [Visitor(number, address, scratch) for number in range(TRAINERS)]
            give_up = time.monotonic() + 60 * minutes
            while time.monotonic() < give_up:
                for visitor in visitors:
                    visitor.turn()
                time.sleep(0.5)
            for visitor in visitors:
                visitor.leave()
            steps = set.union(*(visitor.counted()[0] for visitor in visitors))
            wait(lambda: newest(folder) >= max(steps), 60, f"the last step is not written down; see {folder}")
            auxiliary.send_signal(signal.SIGINT)
            auxiliary.wait(120)
        finally:
            for visitor in visitors:
                if visitor.program is not None:
                    end(visitor.program)
            end(auxiliary)
        samples = sum(visitor.counted()[1] for visitor in visitors)
        report.figure("sessions of trainers", sum(len(visitor.logs) for visitor in visitors), "")
        report.figure("global steps, by the trainers", len(steps), "")
        report.figure("samples, by the trainers", samples, "")
        for name, (found, total) in told(folder).items():
            wrong = len(set(found) ^ steps) + len(found) - len(set(found))
            report.at_most(f"{name}: steps missing or doubled", wrong, "", 0)
            report.at_most(f"{name}: samples off by", abs(total / samples - 1), "of all", 0.01)


def newest(folder: Path) -> int:
    return max((int(entry["step"]) for entry in read_history(folder / HISTORY)), default=0)


def told(folder: Path) -> dict[str, tuple[list[int], float]]:
    """Global steps and samples by what each of the auxiliary peer's outputs says."""
    lines = read_history(folder / HISTORY)
    [database] = (folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics").fetchall()
    offline = [entry for file in folder.glob("wandb/offline-run-*/*.wandb") for entry in wandb_history(file)]
    status = json.loads((folder / "status.json").read_text())
    return {
        "JSON lines": ([int(entry["step"]) for entry in lines], sum(entry["samples"] for entry in lines)),
        "Trackio": ([step for step, _ in rows], sum(json.loads(metrics)["samples"] for _, metrics in rows)),
        "W&B offline": ([step for step, _ in offline], sum(values["samples"] for _, values in offline)),
        "the page": (list(range(min(entry["step"] for entry in lines), status["global_step"] + 1)), status["samples"]),
    }


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, minutes=10)
