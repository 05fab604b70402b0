"""benchmarks/regression_peer.py to which something happens at a named moment.

In the environment: FAULT and MOMENT, keys of `FAULTS` and `MOMENTS`; AT_STEP, the global step in whose making it
happens; STRUCK, a file that marks that it has: of several peers with the same file it happens to the first one only.
"""

import asyncio
import functools
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
from hivemind.averaging.control import StepControl

from benchmarks import regression_peer
from collab.averager import CountingAllReduce, StateAverager
from collab.matchmaking import SwarmMatchmaking, _round_number
from collab.optimizer import SwarmOptimizer
from collab.processes import run_program

MAIN = psutil.Process()  # averagers are forked from it
FAULT, MOMENT, AT_STEP = os.environ.get("FAULT", ""), os.environ.get("MOMENT", ""), int(os.environ.get("AT_STEP", "0"))
round_now = 0
"""The global step of the round in which this averager's process is."""


def kill() -> None:
    """As the out-of-memory killer does it: only the program itself."""
    MAIN.send_signal(signal.SIGKILL)
    signal.pause()  # whatever this process is, it gets no further


def freeze() -> None:
    """As a lid that is closed: all processes at once."""
    for process in [MAIN, *MAIN.children(recursive=True)]:
        if process.pid != os.getpid():
            process.suspend()
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, Callable[[], None]] = {"kill": kill, "freeze": freeze}


def strike(moment: str, step: int) -> None:
    """Called at each of the `MOMENTS`: it may be the one."""
    if (moment, step) != (MOMENT, AT_STEP):
        return
    try:
        Path(os.environ["STRUCK"]).touch(exist_ok=False)
    except FileExistsError:
        return
    print(f"{FAULT} {moment} of global step {step}", flush=True)
    FAULTS[FAULT]()


def before_matchmaking() -> None:
    """When the first samples of the step are there."""
    schedule = SwarmOptimizer._maybe_schedule_gradient_averaging

    def spoiled(self: SwarmOptimizer) -> None:
        strike(MOMENT, self.local_epoch + 1)
        schedule(self)

    SwarmOptimizer._maybe_schedule_gradient_averaging = spoiled  # type: ignore[method-assign]


def in_matchmaking() -> None:
    """While it leads or follows, all samples there."""
    lead, follow = SwarmMatchmaking._lead, SwarmMatchmaking._follow

    async def spoiled_lead(self: SwarmMatchmaking, step: StepControl) -> None:
        if step.triggered:
            strike(MOMENT, round_now)
        await lead(self, step)

    async def spoiled_follow(self: SwarmMatchmaking, leader: Any) -> None:
        if self.step_control.triggered:
            strike(MOMENT, round_now)
        await follow(self, leader)

    SwarmMatchmaking._lead = spoiled_lead  # type: ignore[method-assign]
    SwarmMatchmaking._follow = spoiled_follow  # type: ignore[method-assign]


def in_all_reduce() -> None:
    """When the first of its parts is on its way."""
    generate = CountingAllReduce._generate_input_for_peer

    async def spoiled(self: CountingAllReduce, peer_index: int) -> AsyncIterator[Any]:
        async for message in generate(self, peer_index):
            yield message
            await asyncio.sleep(0.05)  # it is out of the house
            strike(MOMENT, round_now)

    CountingAllReduce._generate_input_for_peer = spoiled  # type: ignore[method-assign]


def while_its_state_is_sent() -> None:
    """When a newcomer has the first piece of it; the step does not matter."""
    send = StateAverager.rpc_download_state

    @functools.wraps(send)  # hivemind reads the types of its messages there
    async def spoiled(self: StateAverager, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in send(self, request, context):
            yield message
            await asyncio.sleep(0.05)
            strike(MOMENT, AT_STEP)

    StateAverager.rpc_download_state = spoiled  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[], None]] = {
    "before matchmaking": before_matchmaking,
    "in matchmaking": in_matchmaking,
    "in all-reduce": in_all_reduce,
    "while its state is sent": while_its_state_is_sent,
}


def note_rounds() -> None:
    meet = SwarmMatchmaking._meet

    async def noted(self: SwarmMatchmaking, step: StepControl) -> None:
        global round_now
        round_now = _round_number(step)
        await meet(self, step)

    SwarmMatchmaking._meet = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    note_rounds()
    MOMENTS[MOMENT]()
    run_program(regression_peer.main)
