"""Experts on other peers against the same experts here: a layer's time and throughput, and a run whose server dies.

Two servers and a trainer on this computer; one server is killed in the middle, and comes back.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import torch

from arguments import read_config
from benchmarks.report import Report, run_benchmark
from collab.experts.directory import ExpertDirectory
from collab.experts.mixture import Expert, Mixture
from collab.experts.plan import ExpertPlan
from collab.experts.server import TrainedExpert
from collab.manifest import fetch_manifest
from collab.metrics import run_validators
from collab.peer import Peer
from collab.processes import guard_children
from collab.trackers import read_history
from tasks import expert_plan

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = ("--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--nat_port_map", "false")
SERVERS = ("one", "two")
START_SECONDS, RUN_SECONDS = 180.0, 900.0
WARM_UP = 3


class Here:
    """All experts of a plan in this process, called without the network."""

    def __init__(self, plan: ExpertPlan) -> None:
        self._experts = {index: TrainedExpert(plan, index) for index in range(plan.total)}

    def alive(self) -> Mapping[int, Expert]:
        return self._experts

    def failed(self, expert: Expert, reason: str) -> None:
        raise AssertionError(reason)


@contextmanager
def programs() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Programs by name; what still runs is ended."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        yield running
    finally:
        for process in reversed(running.values()):
            process.terminate()
        for process in running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def start(folder: Path, name: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A program of this repository, with its output in `folder`/`name`.log."""
    command = [sys.executable, str(ROOT / program), *LOOPBACK, "--cache_dir", str(folder / "cache"), *arguments]
    with (folder / f"{name}.log").open("ab") as log:
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


def wait_for(folder: Path, name: str, text: str, times: int = 1, seconds: float = START_SECONDS) -> None:
    """Until a program has written `text` so many times."""
    give_up, path = time.monotonic() + seconds, folder / f"{name}.log"
    while (told := path.read_text(errors="replace")).count(text) < times:
        if time.monotonic() > give_up:
            raise AssertionError(f"{name} did not write {text!r}:\n{told}")
        time.sleep(0.05)


def seconds_of(mixture: Mixture, rows: torch.Tensor, calls: int) -> tuple[float, float]:
    """Median seconds of a forward and of a backward pass."""
    forward, backward = [], []
    for _ in range(WARM_UP + calls):
        began = time.monotonic()
        output = mixture(rows)
        done = time.monotonic()
        output.sum().backward()
        forward.append(done - began)
        backward.append(time.monotonic() - done)
    return statistics.median(forward[WARM_UP:]), statistics.median(backward[WARM_UP:])


def measure_layer(report: Report, folder: Path, address: str, tokens: Sequence[int], calls: int) -> None:
    """The layer of the run, remote and local, in turns."""
    with closing(Peer(initial_peers=[address], host_maddrs=LOOPBACK[1:2], nat_port_map=False)) as peer:
        manifest = fetch_manifest(peer, folder / "cache-of-benchmark")
        settings, files = manifest.settings, manifest.unpack(folder / "cache-of-benchmark")
        peer.dht.add_validators(run_validators(settings["run_id"], manifest.swarm_id, 30.0))
        plan = expert_plan(settings, files, manifest.swarm_id)
        assert plan is not None
        directory = ExpertDirectory(peer, plan, settings["run_id"], settings["metadata_expiration"])
        give_up = time.monotonic() + 30
        while len(directory.alive()) < plan.total and time.monotonic() < give_up:
            time.sleep(0.1)
        remote, local = Mixture(plan, 0), Mixture(plan, 0)
        local.load_state_dict(remote.state_dict())
        remote.experts, local.experts = directory, Here(plan)
        for count in tokens:
            rows = torch.randn(count, plan.hidden_size, requires_grad=True)
            there, here = seconds_of(remote, rows, calls), seconds_of(local, rows, calls)
            for name, mine, its in (("forward", there[0], here[0]), ("backward", there[1], here[1])):
                report.figure(f"{name} of {count} tokens, elsewhere", 1000 * mine, "ms")
                report.figure(f"{name} of {count} tokens, here", 1000 * its, "ms")
            report.figure(f"{count} tokens, elsewhere", count / sum(there), "tokens/s")
            report.figure(f"{count} tokens, share of the speed here", sum(here) / sum(there), "")
        assert directory.calls_failed == 0
        directory.stop()


def measure(report: Report, steps: int, calls: int) -> None:
    torch.set_num_threads(1)
    guard_children()
    with tempfile.TemporaryDirectory(prefix="samiti-") as scratch, programs() as running:
        folder = Path(scratch)
        config = read_config(ROOT / "configs" / "moe.yaml")
        own = {"max_global_steps": steps, "report_to": ["none"], "page_port": 0}
        own |= {"target_batch_size": 128, "micro_batch_size": 64}  # short steps, in which a stall can be seen
        (folder / "run.yaml").write_text(json.dumps(config | own))
        settings = ("--config", str(folder / "run.yaml"), "--run_folder", str(folder / "run"))
        running["auxiliary"] = start(folder, "auxiliary", "run_aux_peer.py", *settings)
        wait_for(folder, "auxiliary", "Others join with")
        while not (folder / "run" / "join.txt").exists():
            time.sleep(0.05)
        address = (folder / "run" / "join.txt").read_text().split()[-1]

        def serve(name: str) -> None:
            own = ("--expert_folder", str(folder / name), "--serve_experts", "4", "--expert_save_seconds", "5")
            threads = ("--threads", "1", "--initial_peers", address)
            running[name] = start(folder, name, "run_expert_server.py", *own, *threads)

        for name in SERVERS:
            serve(name)
            wait_for(folder, name, "Serving the experts")
        measure_layer(report, folder, address, (256, 1024, 4096), calls)

        own_way = ("--threads", "1", "--precision", "float32", "--micro_batch_size", "64")
        running["trainer"] = start(folder, "trainer", "run_trainer.py", "--initial_peers", address, *own_way)
        wait_for(folder, "trainer", f"step {steps // 3}/", seconds=RUN_SECONDS)
        running["two"].send_signal(signal.SIGKILL)
        killed = time.time()
        running["two"].wait()
        wait_for(folder, "trainer", f"step {2 * steps // 3}/", seconds=RUN_SECONDS)
        serve("two")
        back = time.time()
        wait_for(folder, "two", "Serving the experts", times=2)
        assert running["trainer"].wait(RUN_SECONDS) == 0 and running["auxiliary"].wait(RUN_SECONDS) == 0
        history = read_history(folder / "run" / "metrics.jsonl")
        goes_on = re.findall(r"goes on after (\d+) steps", (folder / "two.log").read_text())
        state = json.loads((folder / f"run/checkpoints/step-{steps:07d}/trainer_state.json").read_text())

    seconds = [(after["time"], after["time"] - before["time"]) for before, after in pairwise(history)]
    usual = statistics.median(took for at, took in seconds if at < killed)
    around = max(took for at, took in seconds if at >= killed)
    report.figure("global step before the kill, median", usual, "s")
    report.figure("longest global step since the kill", around, "s")
    report.at_most("stall by the kill", around - usual, "s", 10)
    report.at_least("global steps", history[-1]["step"], "", steps)
    report.at_least("experts that went on from their saved state", len(goes_on), "", 4)
    for name, made in (
        ("first", history[0]),
        ("at the kill", next(each for each in history if each["time"] >= killed)),
        ("at the return", next(each for each in history if each["time"] >= back)),
        ("last", history[-1]),
    ):
        report.figure(f"loss, {name}", made["loss"], "nats")
    report.at_least("loss fell by", history[0]["loss"] - history[-1]["loss"], "nats", 1)
    report.figure("held-out loss", state["held_out_loss"], "nats")
    speeds = [each["samples_per_second"] for each in history if each["samples_per_second"]]
    report.figure("samples in a second, median", statistics.median(speeds), "1/s")


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, steps=24, calls=10)
