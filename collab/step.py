"""Forward and backward passes over a micro-batch, in the way that is fastest on this peer's devices."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from collab.device import PRECISIONS, pick_precision
from collab.errors import UserError
from collab.tuning import Batch, no_trace, seconds_of, size_of, split

logger = logging.getLogger(__name__)

TRIALS = 3
BUDGET_SECONDS = 3.0
GAIN = 1.05
GAIN_OF_COMPILING = 1.1


@dataclass(frozen=True)
class Way:
    """How the passes are computed. All ways are the same function, up to rounding."""

    precision: torch.dtype = torch.float32
    """Of the products; weights and gradients are float32 in any case."""
    fused_attention: bool = True
    """Attention in one piece (SDPA's own kernel) instead of three products; CPUs have a fast one for float32 only."""
    compiled: bool = False

    def __str__(self) -> str:
        words = [str(self.precision).removeprefix("torch.")]
        words += [] if self.fused_attention else ["plain attention"]
        words += ["compiled"] if self.compiled else []
        return ", ".join(words)


class Trainable(Protocol):
    """What of a task the step uses."""

    model: torch.nn.Module

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean over the samples."""


@dataclass(frozen=True)
class Passes:
    """What became of a micro-batch. The gradient is in the parameters' `grad`."""

    loss: float
    finite: bool
    """Whether the gradient is. If not, it must not be used: a NaN would reach all peers."""


class TrainingStep:
    """Computes the gradient of one micro-batch after the other.

    Every way, and any number of devices, gives the gradient of the plain one up to rounding (tests). With several
    devices each computes a part of the samples, on a copy of the model that is brought up to date each time: that costs
    one transfer of the parameters and one of the gradients for each micro-batch, a few per cent on PCIe.

    :param replicas: a task for each device, all alike. The first one's model is the one that is trained.
    :param devices: where they compute; each model is moved to its own.
    :param way: how to begin; `choose_way` and `try_compiled` may find a better one.
    """

    def __init__(self, replicas: Sequence[Trainable], devices: Sequence[torch.device], way: Way) -> None:
        for replica, device in zip(replicas, devices, strict=True):
            replica.model.to(device).train()
        self.model = replicas[0].model
        self._devices = list(devices)
        self._losses: list[Callable[[Batch], torch.Tensor]] = [replica.loss for replica in replicas]
        self._compiled: list[Callable[[Batch], torch.Tensor]] = []
        self._params = [_trained(replica.model) for replica in replicas]
        self._threads = ThreadPoolExecutor(len(replicas), "device") if len(replicas) > 1 else None
        # Losses are scaled for float16 only, whose small gradients would be zero, and gradients are unscaled at once.
        # The scaler wants an optimizer for nothing but its list of parameters.
        self._listing = torch.optim.SGD(self._params[0])
        self.way = way

    @property
    def way(self) -> Way:
        """How the passes are computed from now on."""
        return self._way

    @way.setter
    def way(self, way: Way) -> None:
        self._way = way
        self._scaler = torch.amp.GradScaler(self._devices[0].type, enabled=way.precision == torch.float16)
        self._scaler.scale(torch.zeros((), device=self._devices[0]))  # now, not in several threads at once
        if way.compiled and not self._compiled:  # the compiler takes a second to load
            self._compiled = [torch.compile(loss, dynamic=True) for loss in self._losses]

    def __call__(self, batch: Batch) -> Passes:
        """Both passes over `batch`: tensors on any device, the first dimension of each is that of the samples.

        :raises RuntimeError: memory ran out (`unless_out_of_memory`).
        """
        self.model.zero_grad(set_to_none=False)
        loss = self._passes(0, batch, 1.0) if self._threads is None else self._on_all_devices(batch)
        self._scaler.unscale_(self._listing)
        gradients = [param.grad for param in self._params[0] if param.grad is not None]
        # One reduction over all of them: the norm is finite if and only if every value is (or overflowed by summing).
        finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        self._scaler.update()
        return Passes(loss.item(), finite)

    def _passes(self, index: int, batch: Batch, share: float) -> torch.Tensor:
        device, way = self._devices[index], self._way
        batch = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, way.precision, enabled=way.precision != torch.float32))
            if not way.fused_attention:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            loss = (self._compiled if way.compiled else self._losses)[index](batch) * share
        scaled: torch.Tensor = self._scaler.scale(loss)
        scaled.backward()
        return loss.detach()

    def _on_all_devices(self, batch: Batch) -> torch.Tensor:
        assert self._threads is not None
        samples = size_of(batch)
        parts = list(split(batch, lambda: math.ceil(samples / len(self._devices))))

        def work(index: int) -> torch.Tensor:
            if index:
                with torch.no_grad():
                    for mine, newest in zip(self._params[index], self._params[0], strict=True):
                        mine.copy_(newest, non_blocking=True)
                        mine.grad = None
            return self._passes(index, parts[index], size_of(parts[index]) / samples)

        works = [self._threads.submit(work, index) for index in range(len(parts))]
        wait(works)  # also if memory runs out on one of them
        losses = [each.result() for each in works]
        for params in self._params[1 : len(parts)]:
            for total, part in zip(self._params[0], params, strict=True):
                if part.grad is not None:
                    gradient = part.grad.to(total.device)
                    total.grad = gradient if total.grad is None else total.grad.add_(gradient)
        return torch.stack([loss.to(self._devices[0]) for loss in losses]).sum()

    def choose_way(self, ways: Sequence[Way], trial: Batch) -> str:
        """Take the fastest of `ways`, the first unless another one clearly gains; measured in some seconds.

        :param trial: a few samples of the run.
        :returns: what was found, for a person.
        """
        if len(ways) == 1:
            self.way = ways[0]
            return f"Computes in {self.way}"
        seconds: dict[Way, float] = {}
        spent = 0.0
        with no_trace(self.model):
            for _ in range(TRIALS):
                for way in ways:
                    self.way = way
                    took = self._seconds(trial)
                    seconds[way] = min(took, seconds.get(way, math.inf))
                    spent += took
                if spent >= BUDGET_SECONDS:
                    break
        best = min(seconds, key=lambda way: seconds[way])
        gain = seconds[ways[0]] / seconds[best]
        self.way = best if gain >= GAIN else ways[0]
        if self.way == ways[0]:
            return f"Computes in {self.way}, the fastest of {len(ways)} ways here"
        return f"Computes in {self.way}: {gain:.2f}x as fast as {ways[0]}"

    def try_compiled(self, trial: Batch) -> str:
        """Let torch.compile fuse the passes, and keep that if it gains at least a tenth. Takes up to some minutes.

        :param trial: samples as many as a micro-batch has.
        :returns: what was found, for a person.
        """
        plain, began = self.way, time.monotonic()
        with no_trace(self.model):
            before = min(self._seconds(trial) for _ in range(TRIALS))
            self.way = replace(plain, compiled=True)
            try:
                self._seconds(trial)
                after = min(self._seconds(trial) for _ in range(TRIALS))
            except Exception as error:  # noqa: BLE001 - a compiler is not needed for training: it is told, and that is all
                self.way = plain
                reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
                return f"Not compiled: {type(error).__name__}: {reason}"
        gain = before / after
        if gain < GAIN_OF_COMPILING:
            self.way = plain
        took, kept = time.monotonic() - began, "kept" if self.way.compiled else "not kept"
        return f"Compiled, which is {gain:.2f}x as fast and was {kept}; trying it took {took:.0f} s"

    def _seconds(self, batch: Batch) -> float:
        took = seconds_of(self, batch)
        return math.inf if took is None else took


def possible_ways(wanted: str, device: torch.device, allowed: Sequence[str] = tuple(PRECISIONS)) -> list[Way]:
    """Ways to compute that are worth trying on `device`; the first one is what to take without trying.

    On CPUs `auto` leaves the choice to measurement: some compute bfloat16 at twice the speed, others emulate it.

    :param wanted: a precision, or auto.
    :param allowed: precisions that the run's organizer admits.
    :raises UserError: the wanted one is not among them.
    """
    precisions = [pick_precision(wanted, device, allowed)]
    if device.type != "cpu":
        return [Way(precisions[0])]
    if wanted == "auto" and "bfloat16" in allowed and torch.bfloat16 not in precisions and _has_bfloat16():
        precisions.append(torch.bfloat16)
    fused = [Way(precision) for precision in precisions]
    plain = [Way(precision, fused_attention=False) for precision in precisions if precision != torch.float32]
    return fused + plain


def _has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Keep only the inputs of the layers for the backward pass, and compute the rest again (Chen et al. 2016).

    The saved activations shrink to a small part, for about a third more computing. A layer is an entry of a list of
    modules that is in no other list. (transformers' own switch does not know ALBERT.)

    :raises UserError: the model has no such list.
    """
    inside: set[torch.nn.Module] = set()
    found = 0
    for module in model.modules():  # parents come before their children
        if isinstance(module, torch.nn.ModuleList) and module not in inside:
            inside.update(module.modules())
            for layer in module:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
                found += 1
    if not found:
        raise UserError("This model has no list of layers to checkpoint. Leave out --gradient_checkpointing.")


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]
