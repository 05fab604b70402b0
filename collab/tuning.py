"""How large a micro-batch suits this device: measured in a few seconds on the run's own model and data."""

import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch

from collab.errors import UserError

Batch = dict[str, torch.Tensor]
T = TypeVar("T")

TRIAL_SAMPLES = 16
"""So many samples of the run are tried out, repeated for larger micro-batches."""
CALL_SECONDS = 1.0
"""hivemind advises a micro-batch every 0.5 to 1 s (examples/albert/README.md, "Tuning for hardware/network")."""
SHORT_SECONDS = 0.1
"""Nobody waits long for such a call, and what each call costs beside the passes, 1 or 2 ms, is nothing against it."""
BUDGET_SECONDS = 5.0
PASSES = 3
WINDOW_SECONDS = 0.2
GROWTH, GROWTH_OF_SHORT_CALLS = 1.05, 0.8
SHARE_OF_TARGET = 1 / 8
SHARE_OF_MEMORY = 0.5
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
)  # of CUDA and MPS, CPU on Linux, Windows


class MicroBatch:
    """The number of samples in the next micro-batch. A stream of batches asks for it each time."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> int:
        return self.size

    def halve(self) -> None:
        """:raises UserError: it is a single sample already."""
        if self.size == 1:
            raise UserError(
                "Memory ran out with a single sample: this device is too small for the run's model. End other programs "
                "that use its memory, give --offload_optimizer true (if it is a GPU's), or another --device."
            )
        self.size //= 2


@dataclass(frozen=True)
class Tuned:
    """What was found."""

    size: int
    """Samples in a micro-batch."""
    call_seconds: float
    """Of one forward and backward pass at that size."""
    seconds: float
    """That finding it took."""

    def as_line(self) -> str:
        """For a person at a terminal."""
        return (
            f"Micro-batch of {self.size} samples, found in {self.seconds:.1f} s: {self.call_seconds * 1000:.0f} ms a "
            f"call, {self.size / self.call_seconds:,.1f} samples/s"
        )


def tune_micro_batch(
    call: Callable[[Batch], Any],
    model: torch.nn.Module,
    trial: Batch,
    *,
    target_batch_size: int,
    matchmaking_time: float,
) -> Tuned:
    """Find the micro-batch for `call`, and leave no trace: no gradient, no other random number, no other buffer.

    Gradients are accumulated by the optimizer, call by call, until the swarm has its target batch. Accumulating some
    of them here first would save next to nothing: a call of `optimizer.step` costs 0.4 ms and one addition for each
    parameter, 8 ms for the 18 million of ALBERT-large on one core, where a single sample takes seconds.

    A peer in the middle of a micro-batch keeps the others waiting, and what it gathers after the target is reached
    comes on top; so a call is short against `matchmaking_time`, and its samples are few against the target.

    :param call: one forward and backward pass over a batch.
    :param trial: some samples of the run; the first dimension of each tensor is theirs.
    :param target_batch_size: samples of the whole swarm in a global step.
    :param matchmaking_time: seconds for which a round waits for a busy peer.
    :raises UserError: memory does not suffice for a single sample.
    """
    began = time.monotonic()
    samples = size_of(trial)
    on_cpu = next(model.parameters()).device.type == "cpu"

    def try_batch(size: int) -> float | None:
        rows = torch.arange(size) % samples
        batch = {key: tensor[rows] for key, tensor in trial.items()}
        return seconds_of(call, batch)

    with no_trace(model):
        size, seconds = find_micro_batch_size(
            try_batch,
            largest=max(1, int(target_batch_size * SHARE_OF_TARGET)),
            longest=min(CALL_SECONDS, matchmaking_time / 2),
            has_room=_watch_memory() if on_cpu else lambda: True,  # GPUs say when their memory is full
        )
    return Tuned(size, seconds, time.monotonic() - began)


def find_micro_batch_size(
    try_batch: Callable[[int], float | None],
    *,
    largest: int,
    longest: float = CALL_SECONDS,
    budget: float = BUDGET_SECONDS,
    has_room: Callable[[], bool] = lambda: True,
) -> tuple[int, float]:
    """The smallest power of two at which the device is about as fast as it gets and a call is not short, within limits.

    On a busy computer, such as one where other peers start at the same time, a short call is sometimes lucky and a long
    one never. So all sizes are timed over windows of about the same length, several times in turn.

    :param try_batch: seconds that a call with so many samples takes; None if memory ran out.
    :param largest: samples.
    :param longest: seconds that a call may take. A single sample is taken in any case.
    :param budget: seconds of calls after which no further one is made. The very first one, which loads libraries and
      starts threads, is not counted if it is shorter.
    :param has_room: whether there is memory for twice the size tried last.
    :returns: the size, and the seconds of a call.
    :raises UserError: memory does not suffice for a single sample.
    """
    seconds: dict[int, float] = {}
    spent, best = 0.0, 1
    for number in range(PASSES):
        size = 1
        while size <= largest:
            window: list[float] = []
            while sum(window) < WINDOW_SECONDS and spent < budget:
                call = try_batch(size)
                if call is None:
                    break
                window.append(call)
                is_first = not seconds and len(window) == 1
                spent += call if not is_first or call >= budget else 0.0
            if call is None:
                if size == 1:
                    MicroBatch(size).halve()
                seconds.pop(size, None)
                largest = size // 2
                break
            seconds[size] = min(seconds.get(size, math.inf), statistics.mean(window))
            best = _choose(seconds, longest)
            # One size that gains nothing may be chance, or a size that the device does not like; two are not.
            if seconds[size] > longest or spent >= budget or size >= 4 * best or not has_room():
                break
            size *= 2
        if spent >= budget or (number and seconds[1] > longest):
            break
    best = _choose(seconds, longest)
    return best, seconds[best]


def _choose(seconds: Mapping[int, float], longest: float) -> int:
    best = 1
    for size in sorted(seconds):
        growth = (size / seconds[size]) / (best / seconds[best])
        wanted = GROWTH_OF_SHORT_CALLS if seconds[best] < SHORT_SECONDS else GROWTH
        if seconds[size] <= longest and growth >= wanted:
            best = size
    return best


def seconds_of(call: Callable[[Batch], Any], batch: Batch) -> float | None:
    """How long `call` takes, with all that it leaves to a GPU; None if memory ran out."""
    began = time.monotonic()
    if unless_out_of_memory(call, batch) is None:
        return None
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.monotonic() - began


def unless_out_of_memory(call: Callable[[Batch], T], batch: Batch) -> T | None:
    """What `call` returns, or None if memory ran out; what it had taken of it is free again then."""
    try:
        return call(batch)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
    # Here the error is forgotten, and with it the frames that held the activations.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def split(batch: Batch, size: Callable[[], int]) -> Iterator[Batch]:
    """The same samples in smaller batches. `size` is asked for each of them: it may change on the way."""
    first = 0
    while first < size_of(batch):
        last = first + size()
        yield {key: tensor[first:last] for key, tensor in batch.items()}
        first = last


def size_of(batch: Batch) -> int:
    """The number of its samples: the first dimension of each tensor."""
    return len(next(iter(batch.values())))


@contextmanager
def no_trace(model: torch.nn.Module) -> Iterator[None]:
    """Passes over the model, with nothing of them left: dropout draws random numbers, batch norm keeps statistics."""
    device = next(model.parameters()).device
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _watch_memory() -> Callable[[], bool]:
    """For CPUs, where memory that runs out ends a program without a word: whether twice as much would leave enough."""
    before = psutil.Process().memory_info().rss

    def has_room() -> bool:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return 2 * (peak - before) < SHARE_OF_MEMORY * psutil.virtual_memory().available

    return has_room
