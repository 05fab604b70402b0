"""run_trainer.py on a computer whose clock is CLOCK_AHEAD seconds ahead of this one's; negative: behind.

On SIGUSR1 it jumps by CLOCK_JUMP seconds.
"""

import multiprocessing
import os
import signal
import time

true_time = time.time
ahead = multiprocessing.RawValue("d", float(os.environ.get("CLOCK_AHEAD", "0")))  # for children, too
time.time = lambda: true_time() + ahead.value  # before hivemind keeps a name of its own for it


def jump(number: int, frame: object) -> None:
    ahead.value += float(os.environ["CLOCK_JUMP"])


signal.signal(signal.SIGUSR1, jump)

import run_trainer  # noqa: E402
from collab.processes import run_program  # noqa: E402

if __name__ == "__main__":
    run_program(run_trainer.main)
