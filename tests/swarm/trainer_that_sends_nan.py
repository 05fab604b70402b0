"""run_trainer.py with a fault behind its own check: it gives NaN to every round, as a hostile peer might."""

import torch

import run_trainer
from collab.processes import run_program

looked_at = run_trainer.gradients_are_finite


def spoil_after_looking(model: torch.nn.Module) -> bool:
    were_finite = looked_at(model)
    for param in model.parameters():
        if param.grad is not None:
            param.grad.fill_(float("nan"))
    return were_finite


run_trainer.gradients_are_finite = spoil_after_looking

if __name__ == "__main__":
    run_program(run_trainer.main)
