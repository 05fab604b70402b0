"""A run as it could be, for the tests of what shows it."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from collab.background import Health
from collab.events import Event
from collab.view import PeerView, Round, RunView


def rounds(steps: int, met: Callable[[int], int] = lambda step: 3, now: float = 0.0) -> list[Round]:
    """A global step every ten seconds, the last one `now`; of three peers `met(step)` averaged together."""
    return [Round(s, now - (steps - s) * 10, 2 + 8 / s, 90.0, met(s), 3, 3) for s in range(1, steps + 1)]


def some_run(number: int = 3, **changes: Any) -> RunView:
    """A run of so many peers, after 100 of 1,000 steps."""
    now = time.time()
    run = RunView(
        run_id="bengali-albert",
        task="masked language modelling",
        started=now - 7200,
        updated=now,
        global_step=100,
        max_steps=1000,
        finished=False,
        history=rounds(100, lambda step: 2 if step == 97 else 3, now),
        peers=[
            PeerView(f"peer {i}", "client" if i % 3 else "trainer", 31.5 + i, 1000 * i, 100, 3, 3, 2.08, "NVIDIA T4",
                     0.02, 3 * 2**30, slow=i == 2) for i in range(number)
        ],
        join_command="python run_trainer.py --initial_peers /ip4/203.0.113.7/tcp/31337/p2p/QmRunOrganizer",
        checkpoint="runs/bengali-albert/checkpoints/step-0000100",
        tracker="trackio show --project bengali-albert",
        can_fill_mask=True,
        samples=12_345_678,
        seconds_to_next_step=12.4,
        seconds_to_end=7200.0,
        contributors=[(f"peer {i}", 1000 * i) for i in reversed(range(number))],
        duties=[Health("Keeping checkpoints", 1, "OSError: disk full", 3.0), Health("Watching the swarm", 0, "", 0.2)],
        events=[Event(now - 60 * i, "alone" if i == 1 else "joined", f"peer {i} came") for i in range(3)],
    )  # fmt: skip
    return replace(run, **changes)
