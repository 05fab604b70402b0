"""run_trainer.py on a device whose memory is full with more than four samples of 32 tokens, as it notices in time."""

from itertools import count

import torch

import run_trainer
from collab.processes import run_program
from tasks.mlm.task import MaskedLM

roomy_loss = MaskedLM.loss
turns = count(1)


def loss(self: MaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if next(turns) > 20 and batch["labels"].numel() > 4 * 32:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return roomy_loss(self, batch)


MaskedLM.loss = loss  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_trainer.main)
