"""run_trainer.py with one fault: after a while its weights change by themselves, as a memory fault would do it."""

from itertools import count

import torch

import run_trainer
from collab.processes import run_program
from tasks.mlm.task import MaskedLM

FAULT_AT = 100
healthy_loss = MaskedLM.loss
turns = count(1)


def loss(self: MaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if next(turns) == FAULT_AT:
        with torch.no_grad():
            for param in self.model.parameters():
                param.add_(torch.randn_like(param), alpha=0.1)
    return healthy_loss(self, batch)


MaskedLM.loss = loss  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_trainer.main)
