"""run_trainer.py whose weights all trainers ruin at the same global step, as a bad update would do it."""

from typing import Any

import torch

import run_trainer
from collab.optimizer import SwarmOptimizer, make_optimizer
from collab.processes import run_program
from tasks.mlm.task import MaskedLM

RUINED_AT = 20
healthy_loss = MaskedLM.loss
optimizers: list[SwarmOptimizer] = []
ruined = False


def make_and_keep(*args: Any, **options: Any) -> SwarmOptimizer:
    optimizers.append(make_optimizer(*args, **options))
    return optimizers[0]


def loss(self: MaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    global ruined
    if optimizers and optimizers[0].local_epoch == RUINED_AT and not ruined:
        ruined = True
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad(), optimizers[0].state_averager.get_tensors():
            for param in self.model.parameters():
                param.add_(torch.randn(param.shape, generator=noise), alpha=3.0)
    return healthy_loss(self, batch)


run_trainer.make_optimizer = make_and_keep
MaskedLM.loss = loss  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_trainer.main)
