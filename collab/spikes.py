"""When the loss jumps and stays up: how a peer judges that, what a group makes of it, and the weights to go back to."""

import fcntl
import logging
import math
import shutil
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from collab.errors import UserError
from collab.files import replacing

logger = logging.getLogger(__name__)

WINDOW, LEAST = 20, 10
"""So many healthy global steps are what the next one is compared with, at most and at least."""
NOISE, MARGIN = 6.0, 0.2
"""A loss is spiky above the median plus so many standard deviations, or this share of the median if that is more."""
GIVE_UP = 5
"""After so many times the patience without the others' consent, the new level is how it is on this peer's data."""
NORMAL = 1.4826  # standard deviations in a median absolute value of normal noise

WELL, NOWHERE = -1, 0  # what a peer says of its loss instead of a global step to go back to
NAN_IN_A_ROW = 50


class SpikeGuard:
    """Judges the mean loss of this peer's own samples, global step by global step.

    Noise is measured by the differences of neighbouring steps, so a loss that falls fast is no noisy one. Nobody is
    judged in its first `LEAST` steps: what a newcomer sees may be a loss that has jumped already.

    :param patience: spiky steps in a row after which this peer wants to go back; 0: never.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.healthy_until = 0
        """The latest global step whose loss was a healthy one."""
        self._healthy: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = self._dropped = 0
        self._on_trial = False  # since it went back, no step was healthy
        self._sum, self._weights = 0.0, 0.0

    def add(self, loss: float, weight: float) -> None:
        """Count the mean loss of a micro-batch that goes into this global step."""
        self._sum += loss * weight
        self._weights += weight
        self._dropped = 0

    def drop(self) -> bool:
        """Count a micro-batch without a usable gradient; whether that makes `NAN_IN_A_ROW` of them."""
        self._dropped += 1
        return self.patience > 0 and self._dropped % NAN_IN_A_ROW == 0

    def close(self, step: int) -> None:
        """Judge the global step that was made just now, if this peer had samples in it."""
        if self._weights:
            self._judge(step, self._sum / self._weights)
        self._sum, self._weights = 0.0, 0.0

    @property
    def is_settled(self) -> bool:
        """Whether this peer has seen enough to judge."""
        return self.patience > 0 and len(self._healthy) >= LEAST

    @property
    def is_well(self) -> bool:
        """Whether the latest loss was a healthy one."""
        return self.is_settled and not self._in_a_row

    @property
    def wants_back(self) -> bool:
        """Whether the loss has been up for longer than this peer has patience."""
        return self.is_settled and self._in_a_row >= self.patience

    def went_back(self) -> None:
        """The weights are earlier ones from now on."""
        self.took_over()
        self._on_trial = True
        if not self.is_settled:  # it has seen little but the jump
            self._healthy.clear()

    def took_over(self) -> None:
        """The weights are another peer's from now on."""
        self._in_a_row, self._sum, self._weights = 0, 0.0, 0.0

    def start_over(self) -> None:
        """Forget what losses are like, because the data or the rules have changed."""
        self._healthy.clear()
        self.took_over()
        self._on_trial = False

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. JSON."""
        return {"healthy": list(self._healthy), "in_a_row": self._in_a_row}

    def load_state_dict(self, state: object) -> None:
        """Go on as the peer that wrote a checkpoint would have; what is none of its states is ignored."""
        match state:
            case {"healthy": list(losses), "in_a_row": int(in_a_row)} if all(
                type(loss) is float and math.isfinite(loss) for loss in losses
            ):
                self._healthy.extend(losses)
                self._in_a_row = in_a_row

    def _judge(self, step: int, loss: float) -> None:
        if not self._is_spiky(loss):
            self._healthy.append(loss)
            self._in_a_row, self._on_trial, self.healthy_until = 0, False, step
            return
        self._in_a_row += 1
        if not self.patience:
            return
        if self._on_trial and self._in_a_row >= self.patience:
            logger.warning(
                "Going back has not helped: a loss of %.3f is not the weights' fault, and is normal now", loss
            )
            self.start_over()
        elif self._in_a_row >= GIVE_UP * self.patience:
            logger.warning("The loss has stayed up, at %.3f, and the swarm does not go back: it is normal now", loss)
            self.start_over()

    def _is_spiky(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._healthy) < LEAST:
            return False
        losses = list(self._healthy)
        usual = statistics.median(losses)
        changes = [abs(later - earlier) for earlier, later in pairwise(losses)]
        noise = NORMAL * statistics.median(changes) / math.sqrt(2)  # a difference has the noise of two steps
        return loss > usual + max(NOISE * noise, MARGIN * abs(usual))


def step_to_go_back_to(wishes: Iterable[object], before: int) -> int | None:
    """What a group of peers makes of their wishes: the same on all of them, because they all have the same list.

    More than half of those that can judge have to want to go back; then it is to the global step that most of them
    name, the earlier one of two.

    :param wishes: of each peer, a global step of which it keeps the weights, `NOWHERE` if it wants to go back and keeps
      none, `WELL`, or None if it cannot judge. Anything else that a stranger may say is ignored.
    :param before: the global step of this round.
    :returns: the global step, or None to go on.
    """
    said = [wish for wish in wishes if type(wish) is int and WELL <= wish < before]
    back = [wish for wish in said if wish != WELL]
    named = Counter(wish for wish in back if wish != NOWHERE)
    if not named or 2 * len(back) <= len(said):
        return None
    return max(named, key=lambda step: (named[step], -step))


class Snapshots:
    """The weights and the optimizer's state of some earlier global steps, on disk, while this process runs.

    Nothing is copied in memory, neither to write nor to read one. What processes that were killed have left is removed.

    :param folder: of all such processes on this computer.
    :param name: of this one.
    :param every: a snapshot is taken every so many global steps.
    """

    KEPT = 2

    def __init__(self, folder: Path, name: str, every: int) -> None:
        self.every = every
        self.steps: list[int] = []
        """The global steps that are kept, the earliest first."""
        self._folder, self._complained = folder / name, False
        self._lock: BinaryIO | None = None
        for left in folder.glob("*/lock"):
            if (lock := _locked(left)) is not None:
                shutil.rmtree(left.parent, ignore_errors=True)
                lock.close()

    @torch.no_grad()
    def save(self, step: int, inner: torch.optim.Optimizer) -> None:
        """Keep the state after a global step. A full disk costs no more than the snapshot."""
        try:
            if self._lock is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock = _locked(self._folder / "lock")
            with replacing(self._file(step)) as scratch:
                save_file({name: tensor.contiguous() for name, tensor in _tensors(inner)}, scratch)
        except (UserError, OSError, TypeError) as error:
            if not self._complained:
                logger.warning("No snapshot is kept to go back to if the loss should jump: %s", error)
            self._complained = True
            return
        self.steps.append(step)
        for old in self.steps[: -self.KEPT]:
            self._remove(old)

    @torch.no_grad()
    def restore(self, step: int, inner: torch.optim.Optimizer) -> bool:
        """Fill parameters and optimizer with the state of `step`, if it is there: all of it or, if not, nothing.

        Learning rates stay: the schedule goes on.
        """
        if step not in self.steps:
            return False
        try:
            with safe_open(self._file(step), framework="pt") as file:
                live = dict(_tensors(inner))
                if {name: list(tensor.shape) for name, tensor in live.items()} != {
                    name: file.get_slice(name).get_shape()
                    for name in file.keys()  # noqa: SIM118 (no iterator)
                }:
                    raise ValueError("it holds another state")
                for name, tensor in live.items():
                    tensor.copy_(file.get_tensor(name))
        except Exception as error:  # noqa: BLE001 - safetensors raises its own; the state comes from other peers then
            logger.warning("The snapshot of global step %d cannot be read: %s", step, error)
            return False
        return True

    def forget(self, after: int = -1) -> None:
        """Remove the snapshots of later global steps."""
        for step in [step for step in self.steps if step > after]:
            self._remove(step)

    def close(self) -> None:
        """Remove everything."""
        if self._lock is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()
        self.steps, self._lock = [], None

    def _remove(self, step: int) -> None:
        self.steps.remove(step)
        self._file(step).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:07d}.safetensors"


def _locked(file: Path) -> BinaryIO | None:
    """The file with a lock that lasts as long as its process; None if another process has it."""
    try:
        lock = file.open("ab")
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def _tensors(inner: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every tensor of its state, by name, in the optimizer's own memory."""
    params = [param for group in inner.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        yield f"{index}", param.detach()
        for key, value in sorted(inner.state[param].items()):
            if isinstance(value, torch.Tensor):
                yield f"{index}.{key}", value
            elif value is not None:
                raise TypeError(
                    f"the optimizer's state has a {type(value).__name__}, {key!r}, where a tensor should be"
                )
