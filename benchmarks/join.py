"""How long a newcomer waits: from the start of its process to its first samples in the common model.

The demo's swarm is running meanwhile, with three trainers, on the same cores.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.report import Report, run_benchmark
from collab.trackers import HISTORY, read_history
from scripts.local_swarm import LOOPBACK, ROOT, end, wait_for_address

TRAINERS = 3
COUNTS = re.compile(r"in it, after ([\d.]+) s \((.+)\)")


def measure(report: Report, newcomers: int) -> None:
    """Let `newcomers` join one after the other, and report medians."""
    with tempfile.TemporaryDirectory(prefix="samiti-") as scratch:
        folder, config = Path(scratch, "run"), Path(scratch, "run.yaml")
        settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
        config.write_text(yaml.safe_dump(settings | {"max_global_steps": 10_000}))
        swarm = start(
            Path(scratch, "swarm.log"), "scripts/local_swarm.py", "--config", str(config),
            "--trainers", str(TRAINERS), "--run_folder", str(folder),
        )  # fmt: skip
        try:
            address = wait_for_address(swarm, folder / "join.txt")
            wait(lambda: met(folder) == TRAINERS, 180, "the trainers did not meet")
            starts = [join(Path(scratch, f"newcomer-{number}.log"), address) for number in range(newcomers)]
        finally:
            swarm.send_signal(signal.SIGINT)  # it ends its peers, which takes a moment
            swarm.wait(180)
    report.at_most(
        "from the start to the first samples that count", statistics.median(sum(s.values()) for s in starts), "s", 60
    )
    for part in starts[0]:
        report.figure(f"  {part}", statistics.median(s[part] for s in starts), "s")


def join(log: Path, address: str) -> dict[str, float]:
    """Start a newcomer, wait until its samples count, and let it leave; gives the seconds of each part of its start."""
    program = start(
        log, "run_trainer.py", "--initial_peers", address, "--host_maddrs", LOOPBACK, "--public_name", "newcomer",
        "--threads", "1", "--cache_dir", str(log.with_suffix(".cache")),
    )  # fmt: skip
    try:
        wait(lambda: COUNTS.search(log.read_text()) is not None, 300, f"its samples never counted; see {log}")
    finally:
        program.send_signal(signal.SIGINT)
        end(program)
    found = COUNTS.search(log.read_text())
    assert found is not None
    return {name: float(seconds) for name, seconds in (part.rsplit(" ", 1) for part in found[2].split(", "))}


def met(folder: Path) -> int:
    """Peers in the latest round."""
    history = read_history(folder / HISTORY)
    return int(history[-1]["peers_met"]) if history else 0


def start(log: Path, *command: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        return subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment, cwd=ROOT)


def wait(condition: Callable[[], bool], seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        time.sleep(0.1)


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, newcomers=3)
