"""A peer that trains a small regression on known samples, for comparing a swarm with a single process.

Everything is the product's own but the model and the data: it writes which samples went into which global step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from collab.optimizer import make_optimizer, weight_decay_groups
from collab.peer import Peer
from collab.processes import StopSignal, guard_children, run_program
from tests.swarm.processes import wait_until

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
    "quorum": 0.5,
    "failed_round": "local",
    "delay_optimizer_step": False,
    "delay_grad_averaging": False,
    "delay_state_averaging": False,
}


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), torch.nn.GELU(), torch.nn.Linear(32, 4))


def samples(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Micro-batch number `seed`: inputs [size, 16] and targets [size, 4]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 16, generator=generator)
    return inputs, torch.stack([inputs[:, :4].sum(1), inputs[:, 4], inputs[:, 5] * 2, inputs[:, 6].sin()], dim=1)


def loss_of(model: torch.nn.Module, seed: int, size: int) -> torch.Tensor:
    inputs, targets = samples(seed, size)
    return torch.nn.functional.mse_loss(model(inputs), targets)


def main() -> None:
    folder, number, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    sizes = [int(size) for size in sys.argv[4].split(",")]
    initial_peers = sys.argv[5:]
    torch.set_num_threads(1)
    guard_children()
    pace = StopSignal()
    peer = Peer(initial_peers=initial_peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    (folder / f"address-{number}.partial").write_text(peer.addresses()[0])
    (folder / f"address-{number}.partial").rename(folder / f"address-{number}")
    model = make_model()
    optimizer = make_optimizer(peer, weight_decay_groups(model, SETTINGS["weight_decay"]), SETTINGS)
    (folder / f"ready-{number}").touch()
    wait_until((folder / "go").exists, 60, lambda: "nobody said go")
    by_step: dict[int, list[tuple[int, int]]] = {}
    reports: list[dict[str, Any]] = []
    turn = 0
    try:
        while optimizer.local_epoch < steps:
            step, states_loaded = optimizer.local_epoch, optimizer.states_loaded
            seed, size = number * 1_000_000 + turn, sizes[turn % len(sizes)]
            turn += 1
            optimizer.zero_grad()
            loss_of(model, seed, size).backward()
            by_step.setdefault(step, []).append((seed, size))
            optimizer.step(batch_size=size)
            if optimizer.states_loaded > states_loaded:
                del by_step[step]  # a slow machine: the others went on without this peer, whose samples are lost
            elif optimizer.local_epoch > step:
                report = optimizer.last_round
                assert report is not None and report.step == step + 1
                reports.append({"step": report.step, "met": report.met, "applied": report.applied})
            pace.wait(0.03)  # stands for the time that a larger model computes
        save_model(model, str(folder / f"weights-{number}.safetensors"))
        (folder / f"log-{number}.json").write_text(json.dumps({"by_step": by_step, "reports": reports}))
    finally:
        optimizer.leave()
        peer.close()


if __name__ == "__main__":
    run_program(main)
