"""run_aux_peer.py that is killed in the middle of writing its third checkpoint, as by a power cut."""

import os
import signal
from itertools import count
from pathlib import Path

import run_aux_peer
from collab.processes import run_program
from tasks.mlm.task import MaskedLM

save_pretrained = MaskedLM.save_pretrained
turns = count(1)


def save_and_die(self: MaskedLM, folder: Path) -> None:
    save_pretrained(self, folder)
    if next(turns) == 3:
        os.kill(os.getpid(), signal.SIGKILL)


MaskedLM.save_pretrained = save_and_die  # type: ignore[method-assign]

if __name__ == "__main__":
    run_program(run_aux_peer.main)
