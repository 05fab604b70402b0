"""A peer that trains a small regression on known samples, for comparing a swarm with a single process.

Everything is the product's own but the model and the data. It writes which samples went into which global step, the
verdict on every round, the gradients of the last one, and the CPU time that all its processes took.
"""

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file, save_model
from torch.optim.lr_scheduler import LambdaLR

from collab.agreement import sketch
from collab.assistant import Assistant
from collab.averager import Averager
from collab.optimizer import SwarmOptimizer, linear_schedule, make_optimizer, weight_decay_groups
from collab.peer import Peer
from collab.processes import StopSignal, guard_children, run_program

SETTINGS: dict[str, Any] = {
    "run_id": "regression",
    "max_global_steps": 100,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "min_learning_rate": 0.0,
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 1.0,
    "target_batch_size": 2000,
    "matchmaking_time": 1.0,
    "averaging_timeout": 15.0,
    "metadata_expiration": 10.0,
    "grad_compression": "none",
    "state_compression": "none",
    "average_state_every": 1000,
    "min_vector_size": 0,
    "quorum": 0.5,
    "failed_round": "retry",
    "rollback_after": 0,
    "snapshot_every": 50,
    "delay_optimizer_step": False,
    "delay_grad_averaging": False,
    "delay_state_averaging": False,
    "local_updates": False,
}


def make_model(width: int = 32, depth: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    hidden = (layer for _ in range(depth) for layer in (torch.nn.Linear(width, width), torch.nn.GELU()))
    return torch.nn.Sequential(
        torch.nn.Linear(16, width), torch.nn.LayerNorm(width), torch.nn.GELU(), *hidden, torch.nn.Linear(width, 4)
    )


def plain_optimizer(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """What `SETTINGS` mean in plain PyTorch, for a single process to compare with."""
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model, SETTINGS["weight_decay"]),
        lr=SETTINGS["learning_rate"],
        betas=(SETTINGS["adam_beta1"], SETTINGS["adam_beta2"]),
        eps=SETTINGS["adam_epsilon"],
    )
    schedule = LambdaLR(optimizer, linear_schedule(SETTINGS["warmup_steps"], SETTINGS["max_global_steps"], 0.0))
    return optimizer, schedule


def samples(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Micro-batch number `seed`: inputs [size, 16] and targets [size, 4]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 16, generator=generator)
    return inputs, torch.stack([inputs[:, :4].sum(1), inputs[:, 4], inputs[:, 5] * 2, inputs[:, 6].sin()], dim=1)


def loss_of(model: torch.nn.Module, seed: int, size: int) -> torch.Tensor:
    inputs, targets = samples(seed, size)
    return torch.nn.functional.mse_loss(model(inputs), targets)


@dataclass(frozen=True)
class PlainRun:
    """A plain PyTorch loop over micro-batches."""

    turns: int
    cpu_seconds: float


def run_plain_loop(seconds: float, turns_a_step: int, width: int, batch: int) -> PlainRun:
    """A peer's training in plain PyTorch, in this thread: accumulate, clip, AdamW, schedule."""
    torch.set_num_threads(1)
    model = make_model(width)
    optimizer, schedule = plain_optimizer(model)
    turns, began, cpu_before = 0, time.monotonic(), time.thread_time()
    while time.monotonic() < began + seconds:
        (loss_of(model, turns, batch) / turns_a_step).backward()
        turns += 1
        if turns % turns_a_step == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return PlainRun(turns, time.thread_time() - cpu_before)


def cpu_by_process() -> dict[str, float]:
    """CPU seconds of this process and everything it started, so far."""
    me = psutil.Process()
    classes = {child.pid: child.name.partition("-")[0] for child in multiprocessing.active_children()}
    seconds: dict[str, float] = {}
    for process in (me, *me.children(recursive=True)):
        name = "trainer" if process == me else classes.get(process.pid) or process.name()
        times = process.cpu_times()
        seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=0, help="which peer this is")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16], help="micro-batch sizes, in turn")
    parser.add_argument("--role", choices=["trainer", "client", "auxiliary"], default="trainer")
    parser.add_argument("--host", default="127.0.0.1", help="address of this computer to listen on")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=1, help="hidden layers of width * width")
    parser.add_argument("--pace", type=float, default=0.03, help="seconds that a micro-batch takes at least")
    parser.add_argument("--plain", type=float, default=0, help="seconds of a plain loop, before and after the training")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--initial_peers", nargs="*", default=[])
    return parser.parse_args()


def main() -> None:
    options = parse()
    folder, number, settings = options.folder, options.number, SETTINGS | options.settings
    torch.set_num_threads(1)
    turns_a_step = max(1, settings["target_batch_size"] // options.sizes[0])
    plain = []
    if options.plain:
        run_plain_loop(1.0, turns_a_step, options.width, options.sizes[0])  # the first micro-batches are slower
        plain.append(run_plain_loop(options.plain, turns_a_step, options.width, options.sizes[0]))
    guard_children()
    stop = StopSignal()
    peer = Peer(
        initial_peers=options.initial_peers,
        host_maddrs=[f"/ip4/{options.host}/tcp/0"],
        nat_port_map=False,
        client_mode=options.role == "client",
    )
    announce(folder / f"address-{number}", peer.addresses()[0] if options.role != "client" else "")
    model = make_model(options.width, options.depth)
    auxiliary = options.role == "auxiliary"
    optimizer = make_optimizer(
        peer,
        weight_decay_groups(model, settings["weight_decay"]),
        settings,
        swarm_id=settings["run_id"],
        auxiliary=auxiliary,
    )
    stop.listen()
    own = keep_own_gradients(optimizer.grad_averager)
    assistant = Assistant(optimizer) if auxiliary else None
    announce(folder / f"ready-{number}", "")
    deadline = time.monotonic() + 120
    while not (folder / "go").exists() and time.monotonic() < deadline and not stop.wait(0.02):
        pass
    began, cpu_before = time.monotonic(), cpu_by_process()
    by_step: dict[int, list[tuple[int, int]]] = {}
    reports: list[dict[str, Any]] = []
    sketches: dict[int, list[float]] = {}
    turn = 0
    try:
        while assistant is not None and not stop.wait(0.1):
            report = optimizer.last_round
            if report is not None and (not reports or reports[-1]["step"] != report.step):
                reports.append(asdict(report))
        while assistant is None and optimizer.local_epoch < options.steps and not stop:
            turn_began = time.monotonic()
            step, states_loaded = optimizer.local_epoch, optimizer.states_loaded
            seed, size = number * 1_000_000 + turn, options.sizes[turn % len(options.sizes)]
            turn += 1
            optimizer.zero_grad()
            loss_of(model, seed, size).backward()
            by_step.setdefault(step, []).append((seed, size))
            optimizer.step(batch_size=size)
            if optimizer.states_loaded > states_loaded:
                del by_step[step]  # a slow machine: the others went on without this peer, whose samples are lost
            elif optimizer.local_epoch > step:
                report = optimizer.last_round
                announce(folder / f"step-{number}", str(optimizer.local_epoch))
                if report is None:
                    continue  # it is averaged in the background
                assert report.step == step + 1 or settings["delay_grad_averaging"]
                reports.append(asdict(report))
                with (folder / f"reports-{number}.jsonl").open("a") as told:  # also of who is killed
                    told.write(json.dumps(reports[-1]) + "\n")
                sketches[report.step] = sketch(model.parameters())
                if not report.applied:
                    by_step.pop(report.step - 1, None)  # the step was made without these samples
            stop.wait(max(0.0, turn_began + options.pace - time.monotonic()))
        if assistant is None:
            optimizer.finish()
        cpu = {name: seconds - cpu_before.get(name, 0.0) for name, seconds in cpu_by_process().items()}
        wall = time.monotonic() - began
        if options.plain:
            plain.append(run_plain_loop(options.plain, turns_a_step, options.width, options.sizes[0]))
        log = {
            "plain": [asdict(run) for run in plain],
            "by_step": by_step,
            "reports": reports,
            "sketches": sketches,
            "cpu_seconds": sum(cpu.values()),
            "cpu_by_process": cpu,
            "wall_seconds": wall,
            "turns": turn,
            "assisted": assistant.rounds if assistant else 0,
        }
        if assistant is None:
            save_model(model, str(folder / f"weights-{number}.safetensors"))
            save_gradients(optimizer, own, folder, number)
        announce(folder / f"log-{number}.json", json.dumps(log))
    finally:
        if assistant is not None:
            assistant.stop()
        optimizer.leave()
        peer.close()


def keep_own_gradients(averager: Averager) -> list[torch.Tensor]:
    """A list that holds what this peer has put into the latest round, as soon as that is over."""
    own: list[torch.Tensor] = []
    forget = averager.end_round

    def end_round() -> None:
        own[:] = [accumulator * averager._before_round_scale for accumulator in averager._before_round or []]
        forget()

    averager.end_round = end_round  # type: ignore[method-assign]
    return own


def save_gradients(optimizer: SwarmOptimizer, own: list[torch.Tensor], folder: Path, number: int) -> None:
    """What this peer put into the last round, and what came out."""
    with optimizer.grad_averager.get_tensors() as averaged:
        save_file(
            {str(i): tensor.clone() for i, tensor in enumerate(averaged)}, folder / f"averaged-{number}.safetensors"
        )
    save_file({str(i): tensor for i, tensor in enumerate(own)}, folder / f"own-{number}.safetensors")


def announce(path: Path, text: str) -> None:
    """Write a small file at once, so that whoever waits for it never reads half of it."""
    scratch = path.with_suffix(".partial")
    scratch.write_text(text)
    scratch.rename(path)


if __name__ == "__main__":
    run_program(main)
