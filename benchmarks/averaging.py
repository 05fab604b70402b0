"""Averaging between real peers on this machine: who meets, what goes over the wire, what is lost, what it costs.

A global step lasts about three seconds, several times the time for matchmaking; were it shorter, the swarm would make
steps by time instead of by samples (hivemind's tracker goes on estimating while peers average).
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.regression_peer import run_plain_loop
from benchmarks.report import Report, run_benchmark
from collab.agreement import spread
from collab.codecs import CODECS, INT8_FROM_VALUES

ROOT = Path(__file__).resolve().parents[1]
Tensors = Mapping[str, torch.Tensor]

SWARMS = (("trainer",) * 2, ("trainer",) * 3, ("trainer",) * 4, ("trainer", "trainer", "auxiliary", "client"))
ROUNDS = 50
STEP_SECONDS = 3.0

# The all-reduce hands out whole parts of 131,072 values. The 18 parts of this model can be shared evenly by two and
# three reducers, and by four to within 4 % of the bytes.
WIDTH = 1536
BATCH, PACE = 16, 0.1

ERROR_BARS = {"none": 1e-6, "float16": 1e-3, "scaled_float16": 1e-3, "int8": 0.015}
ROUNDS_OF_CODECS = 3

# For the cost in CPU time: a micro-batch of 30 to 50 ms on one core, without pauses.
BUSY_WIDTH, BUSY_BATCH = 1024, 384
COST_BARS = {3: 1.10, 30: 1.03}
STEPS_OF_COST = {3: 8, 30: 2}
PLAIN_SECONDS = 12.0
LEAST_SHARE = 0.001  # of the plain loop's CPU; processes that took less are left out of the table


@dataclass(frozen=True)
class PeerRun:
    """What one peer left when it was done."""

    role: str
    log: dict[str, Any]
    weights: Tensors
    own: Tensors
    averaged: Tensors

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Its verdicts on the rounds, as in `RoundReport`."""
        reports: list[dict[str, Any]] = self.log["reports"]
        return reports

    def samples_of_last_step(self) -> int:
        batches = self.log["by_step"][str(self.reports[-1]["step"] - 1)]
        return sum(size for _, size in batches)


def sets_of_tensors(role: str, senders: int, reducers: int) -> float:
    """How often a peer sends, and receives, the whole set of tensors in one round.

    Each of R reducers averages 1 / R of the values; n peers put in gradients. A peer that puts in gradients sends what
    others average, and receives as much: 1 - 1/R of the set, or all of it if it averages nothing. A reducer receives
    its share from each of the n peers but itself, and answers with as much. So in each direction

    - a trainer has (1 - 1/R) + (n - 1)/R, which is 2 * (n - 1) / n if all are trainers;
    - a client has 1;
    - an auxiliary peer has n / R.
    """
    sends, reduces = role != "auxiliary", role != "client"
    share = reduces / reducers
    return sends * (1 - share) + share * (senders - sends)


def payload_formula(role: str, roles: Sequence[str], size: int) -> float:
    """Bytes that a peer of this role should send, and receive, in a round. `size`: bytes of one set of tensors."""
    senders = sum(other != "auxiliary" for other in roles)
    reducers = sum(other != "client" for other in roles)
    return size * sets_of_tensors(role, senders, reducers)


def rounds_met(reports_of_peers: Sequence[Sequence[Mapping[str, Any]]], rounds: int) -> set[int]:
    """The global steps in which every peer applied the whole average of all peers."""
    everybody = len(reports_of_peers)
    steps = set(range(1, rounds + 1))
    for reports in reports_of_peers:
        steps &= {r["step"] for r in reports if r["applied"] and r["met"] == everybody and r["parts"] == 1.0}
    return steps


def weighted_mean(gradients: Sequence[Tensors], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The mean over all samples, in float64."""
    total = sum(weights)
    pairs = list(zip(gradients, weights, strict=True))
    return {name: sum((g[name].double() * (w / total) for g, w in pairs), torch.tensor(0.0)) for name in gradients[0]}


def relative_error(found: Tensors, true: Tensors) -> float:
    """norm(found - true) / norm(true), over all tensors together."""
    squared_error = sum(float((found[name].double() - true[name].double()).square().sum()) for name in true)
    squared_norm = sum(float(tensor.double().square().sum()) for tensor in true.values())
    return float((squared_error / squared_norm) ** 0.5)


def largest_difference(peers: Sequence[Tensors]) -> float:
    """Between any value of the first peer and the same value of another one."""
    first = peers[0]
    return max(float((first[name] - other[name]).abs().max()) for other in peers[1:] for name in first)


def size_of(tensors: Tensors) -> int:
    """Bytes in float32."""
    return 4 * sum(tensor.numel() for tensor in tensors.values())


def describe(roles: Sequence[str]) -> str:
    """For the table: "2 trainers, 1 client"."""
    counts = {role: roles.count(role) for role in dict.fromkeys(roles)}
    return ", ".join(f"{count} {role}{'s' * (count > 1)}" for role, count in counts.items())


def run_peers(
    roles: Sequence[str],
    steps: int,
    *,
    target_batch_size: int,
    step_seconds: float,
    width: int = WIDTH,
    batch: int = BATCH,
    pace: float = PACE,
    plain: float = 0,
    **settings: Any,
) -> list[PeerRun]:
    """Let peers train together for `steps` global steps, all from the same moment. The first has to be a trainer.

    :param plain: seconds of a plain loop that each peer runs before and after.
    :raises RuntimeError: a peer failed, or the swarm took several times as long as it should; with the peer's output.
    """
    print(f"{describe(roles)}: {steps} global steps ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="samiti-") as scratch, ExitStack() as programs:
        folder = Path(scratch)
        settings |= {"target_batch_size": target_batch_size, "max_global_steps": max(100, steps)}
        options = ["--steps", str(steps), "--width", str(width), "--sizes", str(batch), "--pace", str(pace)]
        options += ["--plain", str(plain)]
        options += ["--settings", json.dumps(settings)]

        processes: list[subprocess.Popen[bytes]] = []
        for number, role in enumerate(roles):
            joins = ["--initial_peers", (folder / "address-0").read_text()] if processes else []
            command = [sys.executable, "-m", "benchmarks.regression_peer", str(folder), "--number", str(number)]
            output = programs.enter_context((folder / f"output-{number}").open("wb"))
            process = subprocess.Popen(
                [*command, "--role", role, *options, *joins],
                stdout=output, stderr=output, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            processes.append(process)
            programs.callback(process.wait)
            programs.callback(process.kill)  # runs before the wait; the peer's own children end with it
            if number == 0:
                wait_for((folder / "address-0").exists, 60, processes, folder)
        wait_for(lambda: len(list(folder.glob("ready-*"))) == len(roles), 90, processes, folder)
        (folder / "go").touch()

        workers = [process for process, role in zip(processes, roles, strict=True) if role != "auxiliary"]
        limit = 60 + 5 * steps * step_seconds
        wait_for(lambda: all(worker.poll() == 0 for worker in workers), limit, processes, folder)
        for process in processes:
            if process not in workers:
                process.send_signal(signal.SIGINT)
        wait_for(lambda: all(process.poll() == 0 for process in processes), 30, processes, folder)
        return [read_run(folder, number, role) for number, role in enumerate(roles)]


def wait_for(
    condition: Callable[[], bool], seconds: float, processes: Sequence[subprocess.Popen[bytes]], folder: Path
) -> None:
    """:raises RuntimeError: it did not come true in time, or a process failed."""
    deadline = time.monotonic() + seconds
    while not condition():
        failed = [number for number, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            what = f"peer {failed[0]} failed" if failed else f"peers were not done after {seconds:.0f} s"
            output = (folder / f"output-{failed[0] if failed else 0}").read_text(errors="replace")
            raise RuntimeError(f"{what}:\n{output[-4000:]}")
        time.sleep(0.05)


def read_run(folder: Path, number: int, role: str) -> PeerRun:
    def tensors(what: str) -> Tensors:
        return {} if role == "auxiliary" else load_file(folder / f"{what}-{number}.safetensors")

    log = json.loads((folder / f"log-{number}.json").read_text())
    return PeerRun(role, log, tensors("weights"), tensors("own"), tensors("averaged"))


def target_for(roles: Sequence[str]) -> int:
    """Samples that these peers make in `STEP_SECONDS`."""
    return round(sum(role != "auxiliary" for role in roles) * BATCH * STEP_SECONDS / PACE)


def add_wire_rows(report: Report, runs: Sequence[PeerRun], rounds: int) -> None:
    """Who met, and the payload against the formula."""
    roles = [run.role for run in runs]
    name = describe(roles)
    training = [run for run in runs if run.role != "auxiliary"]
    met = rounds_met([run.reports for run in training], rounds)
    report.at_least(f"{name}: rounds met by all", len(met) / rounds, f"of {rounds}", 1.0)

    size = size_of(training[0].weights)
    for role in dict.fromkeys(roles):
        formula = payload_formula(role, roles, size)
        seen = [r for run in runs if run.role == role for r in run.reports if r["step"] in met]
        if not seen:
            continue  # no round was met: there is nothing to compare, and the row above has said so
        ratios = [statistics.mean(r[key] for r in seen) / formula for key in ("bytes_sent", "bytes_received")]
        for direction, ratio in zip(("sent", "received"), ratios, strict=True):
            report.figure(f"{name}: {direction}, {role}", ratio * formula / 1e6, "MB a round")
            report.figure(f"{name}: {direction}, {role}, to the formula", ratio, "x")
        off = max(abs(ratio - 1) for ratio in ratios)
        report.at_most(f"{name}: bytes off the formula, {role}", off, "of it", 0.05)
    for stage in ("matchmaking", "allreduce"):
        seconds = [r[f"{stage}_seconds"] for run in training for r in run.reports if r["step"] in met]
        if seconds:
            report.figure(f"{name}: {stage}, median", statistics.median(seconds), "s")
    steps = set.intersection(*(set(run.log["sketches"]) for run in training))
    apart = max((spread([run.log["sketches"][step] for run in training]) for step in steps), default=math.inf)
    report.at_most(f"{name}: models apart, largest of {len(steps)} steps", apart, "of their norm", 1e-5)
    difference = largest_difference([run.weights for run in training])
    report.at_most(f"{name}: parameters differ at the end by", difference, "", 1e-5)


def add_codec_rows(report: Report, codec: str, runs: Sequence[PeerRun]) -> None:
    """What a codec loses and weighs in the last round of two trainers."""
    true = weighted_mean([run.own for run in runs], [run.samples_of_last_step() for run in runs])
    # Over the tensors that int8 is used for. The small ones, sent in 16 bits, have most of this gradient's norm.
    large = {name: tensor for name, tensor in true.items() if tensor.numel() >= INT8_FROM_VALUES}
    error = max(relative_error(run.averaged, large) for run in runs)
    last_rounds = [run.reports[-1] for run in runs]
    if not all(last["applied"] and last["met"] == len(runs) for last in last_rounds):
        error = float("inf")  # the peers were not together: no figure of this round says anything about the codec
    if codec in ERROR_BARS:
        report.at_most(f"codec {codec}: error of the average", error, "", ERROR_BARS[codec])
    else:
        report.figure(f"codec {codec}: error of the average", error, "")
    # Of two trainers, each sends one whole set of tensors in a round.
    values = size_of(true) / 4
    report.figure(
        f"codec {codec}: size", statistics.mean(r["bytes_sent"] for r in last_rounds) / values, "bytes a value"
    )


def add_cost_rows(report: Report, name: str, logs: Sequence[Mapping[str, Any]], bar: float | None) -> None:
    """CPU time of all of the peers' processes to that of plain loops, for the same number of micro-batches."""
    turns = sum(log["turns"] for log in logs)
    plain = [run for log in logs for run in log["plain"]]
    per_turn = sum(run["cpu_seconds"] for run in plain) / sum(run["turns"] for run in plain)
    whole = sum(log["cpu_seconds"] for log in logs) / (turns * per_turn)
    if bar is None:
        report.figure(f"{name}: CPU to the plain loop", whole, "x")
    else:
        report.at_most(f"{name}: CPU to the plain loop", whole, "x", bar)
    for process in dict.fromkeys(process for log in logs for process in log["cpu_by_process"]):
        share = sum(log["cpu_by_process"].get(process, 0.0) for log in logs) / (turns * per_turn)
        if share >= LEAST_SHARE:
            report.figure(f"{name}: of this, {process}", share, "x")
    report.figure(f"{name}: plain loop, CPU of a micro-batch", per_turn * 1000, "ms")
    per_turns = [run["cpu_seconds"] / run["turns"] for run in plain]
    report.figure(f"{name}: plain loops, slowest to fastest", max(per_turns) / min(per_turns), "x")
    steps = max(1, sum(len(log["reports"]) for log in logs))
    report.figure(f"{name}: global step, mean", sum(log["wall_seconds"] for log in logs) / steps, "s")
    report.figure(f"{name}: micro-batches of a peer in a step", turns / steps, "")


def measure_cost(report: Report, roles: Sequence[str], every: int, bar: float | None) -> None:
    """Busy peers with a global step about every `every` seconds, each between two plain loops in its own process.

    The same loop takes a few percent more or less in another process, and whatever else the machine does changes it:
    the loops before and after tell by how much.
    """
    print(f"{describe(roles)} at a step every {every} s, and plain loops ...", file=sys.stderr, flush=True)
    run_plain_loop(1.0, 100, BUSY_WIDTH, BUSY_BATCH)  # the first micro-batches of a process are slower
    trial = run_plain_loop(3.0, 100, BUSY_WIDTH, BUSY_BATCH)
    # By CPU time: by the clock, a loop that others disturbed would make the steps of undisturbed peers too short.
    turns_a_step = max(1, round(every * trial.turns / trial.cpu_seconds))
    runs = run_peers(
        roles, STEPS_OF_COST[every], target_batch_size=len(roles) * turns_a_step * BUSY_BATCH, step_seconds=every,
        width=BUSY_WIDTH, batch=BUSY_BATCH, pace=0.0, plain=PLAIN_SECONDS,
    )  # fmt: skip
    add_cost_rows(report, f"{describe(roles)}, step every {every} s", [r.log for r in runs], bar)


def say_what_was_missed(runs: Sequence[PeerRun]) -> None:
    """One line for each round that was not what it should be."""
    everybody = sum(run.role != "auxiliary" for run in runs)
    for number, run in enumerate(runs):
        for r in run.reports:
            if not r["applied"] or r["met"] != everybody or r["parts"] != 1.0:
                reason = r["reason"] or f"met {r['met']} of {everybody}, {r['parts']:.0%} of the parts"
                print(f"  {run.role} {number}, global step {r['step']}: {reason}", file=sys.stderr, flush=True)


def measure(report: Report, rounds: int = ROUNDS) -> None:
    """Swarms of four kinds, every codec, and the cost."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the peers are ended too
    for roles in SWARMS:
        runs = run_peers(roles, rounds, target_batch_size=target_for(roles), step_seconds=STEP_SECONDS)
        say_what_was_missed(runs)
        add_wire_rows(report, runs, rounds)
    pair = SWARMS[0]
    for codec in CODECS:
        runs = run_peers(
            pair, ROUNDS_OF_CODECS, target_batch_size=target_for(pair), step_seconds=STEP_SECONDS,
            grad_compression=codec,
        )  # fmt: skip
        say_what_was_missed(runs)
        add_codec_rows(report, codec, runs)
    for every, bar in COST_BARS.items():
        measure_cost(report, ["trainer"], every, bar)
    measure_cost(report, pair, 3, None)


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, rounds=ROUNDS)
