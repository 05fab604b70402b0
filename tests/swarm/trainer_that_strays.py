"""run_trainer.py with one fault: after two rounds of three peers its weights change by themselves, as a memory fault
would do it."""

import torch

import run_trainer
from collab.metrics import PeerRecord
from collab.processes import run_program
from collab.reports import Reports
from tasks.mlm.task import MaskedLM

ROUNDS = 2
healthy_loss, add = MaskedLM.loss, Reports.add
rounds = 0


def add_and_count(self: Reports, record: PeerRecord) -> None:
    global rounds
    add(self, record)
    rounds += record.peers_met == 3


def loss(self: MaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    global rounds
    if rounds == ROUNDS:
        rounds += 1
        with torch.no_grad():
            for param in self.model.parameters():
                param.add_(torch.randn_like(param), alpha=0.1)
    return healthy_loss(self, batch)


Reports.add = add_and_count  # type: ignore[method-assign]
MaskedLM.loss = loss  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_trainer.main)
