"""Joining from a notebook: the trainer runs beside the kernel, and the cell shows what it says until it ends.

    from scripts.notebook import join
    join("/ip4/203.0.113.7/tcp/31337/p2p/QmRunOrganizer", public_name="Asha")

Stopping the cell (the square button) lets the trainer leave the swarm in good order. The cell can be run again.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

from IPython.display import Markdown, display

ROOT = Path(__file__).resolve().parent.parent
SHOWN_LINES = 15
GIVEN = re.compile(r"step (\d+)/(\d+)  loss ([\d.]+) .*peers (\d+/\d+).*  ([\d,]+) samples given")


def join(initial_peers: str, public_name: str = "", *options: str) -> int:
    """Take part in a run until it is complete or the cell is stopped.

    :param initial_peers: one or more addresses, as the organizer gave them, separated by blanks.
    :param public_name: the name under which your samples are listed.
    :param options: further options of run_trainer.py.
    :returns: the trainer's exit status: 0 if it left in good order.
    """
    command = [sys.executable, "run_trainer.py", "--initial_peers", *initial_peers.split(), *options]
    if public_name:
        command += ["--public_name", public_name]
    trainer = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # stopping the cell interrupts the kernel's whole process group
        preexec_fn=_end_with_the_kernel,
    )
    lines: deque[str] = deque(maxlen=SHOWN_LINES)
    view = display(Markdown(_as_markdown(lines)), display_id=True)
    assert trainer.stdout is not None
    while True:
        try:
            for line in trainer.stdout:
                lines.append(line.rstrip())
                view.update(Markdown(_as_markdown(lines)))
            return trainer.wait()
        except KeyboardInterrupt:
            trainer.send_signal(signal.SIGINT)


def _as_markdown(lines: deque[str]) -> str:
    """The latest step in large letters, and below it what the trainer said last."""
    found = next((match for line in reversed(lines) if (match := GIVEN.search(line))), None)
    head = "### Joining the swarm ..."
    if found:
        step, last, loss, peers, given = found.groups()
        head = (
            f"### {given} samples given to the common model\nglobal step {step} of {last}, loss {loss}, peers {peers}"
        )
    return f"{head}\n```text\n" + "\n".join(lines) + "\n```"


def _end_with_the_kernel() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
