"""benchmarks/regression_peer.py whose weights all peers ruin at the same global step, as a bad update would do it.

In the environment: BLOW_UP_AT, that step, and SNAPSHOTS, a folder for them, or empty.
"""

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks import regression_peer
from collab.optimizer import SwarmOptimizer, make_optimizer
from collab.processes import run_program

BLOW_UP_AT, SNAPSHOTS = int(os.environ["BLOW_UP_AT"]), os.environ["SNAPSHOTS"]
optimizers: list[SwarmOptimizer] = []
ruined = False
healthy_loss = regression_peer.loss_of


def make_and_keep(*args: Any, **options: Any) -> SwarmOptimizer:
    options["snapshot_folder"] = Path(SNAPSHOTS) if SNAPSHOTS else None
    options["offload_optimizer"] = args[2]["delay_optimizer_step"]  # which needs it
    optimizers.append(make_optimizer(*args, **options))
    return optimizers[0]


def loss_of(model: torch.nn.Module, seed: int, size: int) -> torch.Tensor:
    global ruined
    if optimizers[0].local_epoch == BLOW_UP_AT and not ruined:
        ruined = True
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad(), optimizers[0].state_averager.get_tensors():
            for group in optimizers[0].opt.param_groups:
                for param in group["params"]:
                    param.add_(torch.randn(param.shape, generator=noise), alpha=3.0)
    loss = healthy_loss(model, seed, size)
    optimizers[0].spikes.add(loss.item(), size)
    return loss


regression_peer.make_optimizer = make_and_keep
regression_peer.loss_of = loss_of

if __name__ == "__main__":
    run_program(regression_peer.main)
