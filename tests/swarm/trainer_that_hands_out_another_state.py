"""run_trainer.py with one fault: it trains like the others, and gives whoever asks for its state another one; it says
that it is the most advanced of all."""

from typing import Any

import torch
from hivemind.optim.state_averager import TrainingStateAverager

import run_trainer
from collab.averager import StateAverager
from collab.processes import run_program

healthy_state = StateAverager.get_current_state
priority = TrainingStateAverager.state_sharing_priority


def get_current_state(self: StateAverager) -> tuple[dict[str, Any], list[torch.Tensor], list[Any]]:
    metadata, tensors, infos = healthy_state(self)
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return metadata, tensors, infos


StateAverager.get_current_state = get_current_state  # type: ignore[method-assign]
StateAverager.state_sharing_priority = property(  # type: ignore[assignment]
    priority.fget, lambda self, value: priority.fset(self, 1e6)
)

if __name__ == "__main__":
    run_program(run_trainer.main)
