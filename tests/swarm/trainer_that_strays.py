"""run_trainer.py with one fault: after two rounds of three peers its weights change by themselves, as a memory fault
would do it."""

from typing import Any

import torch

import run_trainer
from collab.metrics import PeerRecord
from collab.processes import run_program
from tasks.mlm.task import MaskedLM

ROUNDS = 2
healthy_loss, publish = MaskedLM.loss, run_trainer.publish_record
rounds = 0


def publish_record(peer: Any, run_id: str, record: PeerRecord, lifetime: float) -> None:
    global rounds
    publish(peer, run_id, record, lifetime)
    rounds += record.peers_met == 3


def loss(self: MaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    global rounds
    if rounds == ROUNDS:
        rounds += 1
        with torch.no_grad():
            for param in self.model.parameters():
                param.add_(torch.randn_like(param), alpha=0.1)
    return healthy_loss(self, batch)


run_trainer.publish_record = publish_record
MaskedLM.loss = loss  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_trainer.main)
