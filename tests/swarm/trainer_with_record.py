"""run_trainer.py that also appends what it reports of each global step to the file RECORDS, unrounded.

A micro-batch takes PACE seconds at least, most of them without a processor: many trainers fit on few cores.
"""

import json
import os
import time
from pathlib import Path

import torch

import run_trainer
from collab.metrics import PeerRecord
from collab.processes import run_program
from collab.reports import Reports
from tasks.mlm.task import MaskedLM

PACE = float(os.environ.get("PACE", "0"))
add, loss = Reports.add, MaskedLM.loss


def add_and_append(self: Reports, record: PeerRecord) -> None:
    add(self, record)
    with Path(os.environ["RECORDS"]).open("a") as file:
        file.write(json.dumps(record.dict()) + "\n")


def slow_loss(self: MaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    time.sleep(PACE)
    return loss(self, batch)


Reports.add = add_and_append  # type: ignore[method-assign]
MaskedLM.loss = slow_loss  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_trainer.main)
