"""run_trainer.py with a fault behind its own check: it gives NaN to every round, as a hostile peer might."""

import run_trainer
from collab.processes import run_program
from collab.step import Passes, TrainingStep
from collab.tuning import Batch

healthy_call = TrainingStep.__call__


def spoil_after_looking(self: TrainingStep, batch: Batch) -> Passes:
    passes = healthy_call(self, batch)
    for param in self.model.parameters():
        if param.grad is not None:
            param.grad.fill_(float("nan"))
    return passes


TrainingStep.__call__ = spoil_after_looking  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_trainer.main)
