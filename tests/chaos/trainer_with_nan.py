"""run_trainer.py with one fault: every third loss of this peer is NaN, and every fifth so large that its gradient is
infinite."""

from itertools import count

import torch

import run_trainer
from collab.processes import run_program
from tasks.mlm.task import MaskedLM

healthy_loss = MaskedLM.loss
turns = count(1)


def loss(self: MaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    value, turn = healthy_loss(self, batch), next(turns)
    if turn % 3 == 0:
        return value * float("nan")
    return value * 1e38 * 1e38 if turn % 5 == 0 else value


MaskedLM.loss = loss  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_trainer.main)
