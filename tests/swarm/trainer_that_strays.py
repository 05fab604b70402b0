"""run_trainer.py with one fault: after a while this peer's weights are not those of the others any more."""

import torch

import run_trainer
from collab.optimizer import SwarmOptimizer
from collab.processes import run_program

healthy_step = SwarmOptimizer.step


def step(self: SwarmOptimizer, **options: object) -> None:
    before = self.local_epoch
    healthy_step(self, **options)
    if self.local_epoch == 3 and before == 2:
        with torch.no_grad():
            for param in self.state_averager.main_parameters:
                param.add_(torch.randn_like(param) * 0.5)


SwarmOptimizer.step = step

if __name__ == "__main__":
    run_program(run_trainer.main)
