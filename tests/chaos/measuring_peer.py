"""benchmarks/regression_peer.py that measures its link, as run_trainer.py does, and goes by it when the test wants it.

In the environment: GIVEN, Mbit/s if its person says them; MEASURED, a file for what was measured; SHARE, the file at
whose appearance the averaging is shared accordingly.
"""

import os
import time
from pathlib import Path
from typing import Any

from benchmarks import regression_peer
from collab.bandwidth import measure_in_background, serve_bandwidth
from collab.optimizer import SwarmOptimizer, make_optimizer
from collab.peer import Peer
from collab.processes import run_program

LONGEST_WAIT = 300.0  # seconds; the test has ended long before


def make_and_measure(peer: Peer, *args: Any, **kwargs: Any) -> SwarmOptimizer:
    given = float(os.environ["GIVEN"]) if "GIVEN" in os.environ else None
    optimizer = make_optimizer(peer, *args, **kwargs, bandwidth=given)

    def keep(mbits: float) -> None:
        regression_peer.announce(Path(os.environ["MEASURED"]), str(mbits))
        give_up = time.monotonic() + LONGEST_WAIT
        while not Path(os.environ["SHARE"]).exists() and time.monotonic() < give_up:
            time.sleep(0.1)
        optimizer.use_measured_bandwidth(mbits)

    serve_bandwidth(peer)
    if given is None:
        measure_in_background(peer, keep)
    return optimizer


regression_peer.make_optimizer = make_and_measure

if __name__ == "__main__":
    run_program(regression_peer.main)
