"""The demo against what it promises: a swarm of three processes on this machine that averages in every round."""

import json
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks.report import Report, run_benchmark
from collab.trackers import read_history
from scripts.local_swarm import main as run_local_swarm


def measure(report: Report) -> None:
    """Run the demo in a folder of its own and read off its figures."""
    with tempfile.TemporaryDirectory(prefix="samiti-") as scratch:
        folder = Path(scratch, "run")
        run_local_swarm(
            ["--run_folder", str(folder), "--trainers", "2", "--", "--cache_dir", str(Path(scratch, "cache"))]
        )
        summary = json.loads((folder / "summary.json").read_text())
        history = read_history(folder / "metrics.jsonl")
    steps = summary["global_steps"]
    seconds = [after["time"] - before["time"] for before, after in pairwise(history)]
    report.at_most("wall time", summary["wall_seconds"], "s", 300)
    report.at_least("global steps", steps, "", 20)
    report.at_least("rounds averaged by all peers", summary["rounds_averaged"] / steps, "of all", 0.9)
    report.at_most("steps that a peer made alone", summary["rounds_alone"], "", 0)
    report.at_least("loss fell by", summary["first_loss"] - summary["last_loss"], "nats", 1.5)
    report.figure("samples", summary["samples"], "")
    report.figure("samples in a second, median", statistics.median(e["samples_per_second"] for e in history), "1/s")
    report.figure("global step, median", statistics.median(seconds), "s")
    report.figure("global step, longest", max(seconds), "s")


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure)
