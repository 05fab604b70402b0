"""The optimizer that a whole swarm shares: hivemind's, with the repairs it needs, and a verdict on every round."""

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import hivemind
import torch
from hivemind.averaging.control import StepControl
from hivemind.compression import CompressionBase, Float16Compression, NoCompression, ScaledFloat16Compression
from hivemind.optim.grad_averager import GradientAverager
from torch.optim.lr_scheduler import LambdaLR

from collab.lamb import Lamb
from collab.peer import Peer

logger = logging.getLogger(__name__)

# A newcomer moves its schedule to the swarm's global step before its own first update, and has to.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before `optimizer.step")

ParamGroups = Sequence[dict[str, Any]]

CODECS: dict[str, CompressionBase] = {
    "none": NoCompression(),
    "float16": Float16Compression(),
    "scaled_float16": ScaledFloat16Compression(),
}


@dataclass(frozen=True)
class RoundReport:
    """What really happened when a global step was averaged."""

    step: int
    """The global step that this round made; the first one is 1."""
    met: int
    """Peers whose gradients are in the step, this one included: 1 if it was made alone."""
    expected: int
    """Peers that reported progress when the round began, this one included."""
    applied: bool
    """Whether the averaged gradient went into the step; if not, this peer's own did."""
    reason: str
    """Why it was not applied; empty if it was."""
    seconds: float
    """From the moment when enough samples were there to the averaged gradient."""


class Averager(GradientAverager):
    """hivemind's gradient averager, with two repairs. Every peer of a swarm has to use this very class.

    - *Zero gradients.* The optimizer empties the accumulators as soon as a round begins, so a round that fails would go
      on with gradients of zero (hivemind 1.1.12, optim/optimizer.py:529 and 611). A copy taken before the round is put
      back instead; it costs one more set of gradients in RAM.
    - *Uneven micro-batches.* Upstream divides the sum of gradients by the number of micro-batches times the size of
      the first one (optim/grad_averager.py:141, 215): right only if all have that size. Here it is the mean over
      samples.
    """

    _before_round: list[torch.Tensor] | None = None

    @torch.no_grad()
    def load_accumulators_into_averager_(self) -> None:
        """Put this peer's mean gradient where the average will be."""
        if self.local_samples_accumulated > 0:
            # Accumulated is the sum of (micro-batch size / anchor) * gradient.
            scale = self._anchor_batch_size / self.local_samples_accumulated
            own = [(accumulator * scale).to("cpu") for accumulator in self._grad_accumulators()]
            self._before_round = own
        elif self._before_round is not None:
            own = self._before_round
        else:
            return super().load_accumulators_into_averager_()
        with self.get_tensors() as tensors:
            for tensor, gradient in zip(tensors, own, strict=True):
                tensor.copy_(gradient)


class SwarmOptimizer(hivemind.Optimizer):
    """`hivemind.Optimizer` that says what became of each round. Made by `make_optimizer`.

    hivemind's word for a global step is epoch.
    """

    last_round: RoundReport | None = None
    """The verdict on the latest round. With delayed averaging it is the previous step's when a step is made."""
    states_loaded = 0
    """How often this peer took over the state of another one."""
    _round_began, _round_step, _expected = 0.0, 0, 1

    def __del__(self) -> None:
        """Only `shutdown` ends it: upstream does so too when any object that shares our `__dict__` is collected."""

    def _begin_averaging_gradients(self, grad_scaler: Any) -> bool:
        self._round_began, self._round_step = time.monotonic(), self.local_epoch + 1
        self._expected = max(1, self.tracker.global_progress.num_peers)
        began = super()._begin_averaging_gradients(grad_scaler)
        if not began:
            # Upstream loads the accumulated gradient only if matchmaking was still going on; otherwise the step would
            # use the last micro-batch alone (optim/optimizer.py:538-548).
            self._load_local_gradients_into_optimizer()
            self._report(met=1, reason="" if self._expected == 1 else "the round could not begin")
        return bool(began)

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control: StepControl | None) -> None:
        try:
            assert maybe_step_control is not None
            group = maybe_step_control.result(self.averaging_timeout)
            self._load_averaged_gradients_into_optimizer_()
            self._report(met=len(group), reason="")
        except BaseException as error:
            self._load_local_gradients_into_optimizer()
            self._report(met=1, reason=str(error) or type(error).__name__)
            logger.warning("Round %d was not averaged: %r", self._round_step, error)
            if not isinstance(error, Exception):
                raise

    def _report(self, met: int, reason: str) -> None:
        self.last_round = RoundReport(
            step=self._round_step,
            met=met,
            expected=max(met, self._expected),
            applied=met > 1,
            reason=reason,
            seconds=time.monotonic() - self._round_began,
        )

    def load_state_from_peers(self, **kwargs: Any) -> None:
        """Take over parameters, optimizer state, global step and schedule from the most advanced peer, if any."""
        before = self.local_epoch
        super().load_state_from_peers(**kwargs)
        self.states_loaded += self.local_epoch > before
        self.share_state_memory()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the optimizer's state and the global step from a checkpoint."""
        super().load_state_dict(state_dict)
        self.state_averager._update_scheduler()
        self.tracker.report_local_progress(self.local_epoch, samples_accumulated=0)
        self.share_state_memory()

    def offer_state(self) -> None:
        """Hand out this peer's state although it trains nothing: for the start from a checkpoint."""
        self.state_averager.allow_state_sharing = True
        self.state_averager.state_sharing_priority = self.local_epoch

    def share_state_memory(self) -> None:
        """Keep CPU state in shared memory from the start.

        When a newcomer downloads the state, hivemind hands the live tensors to another process, which moves their
        memory under a running step: garbage or NaN in 14 of 100 tries (`get_current_state`, optim/state_averager.py).
        Tensors that are shared already do not move.
        """
        for state in self.opt.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    value.share_memory_()


def make_optimizer(
    peer: Peer,
    param_groups: ParamGroups,
    settings: Mapping[str, Any],
    *,
    offload_optimizer: bool = False,
    bandwidth: float | None = None,
    auxiliary: bool = False,
) -> SwarmOptimizer:
    """Build the optimizer that a run's settings describe.

    Call it from the main thread (averagers cannot be started elsewhere), after the model has its first weights.

    :param param_groups: `[{"params": [...], "weight_decay": 0.01}, ...]`, the same on all peers.
    :param settings: the agreed arguments of the run (`OptimizerArguments`, `SwarmArguments`, run id and length).
    :param offload_optimizer: keep the optimizer's state, and a copy of the parameters, in RAM.
    :param bandwidth: Mbit/s; this peer's share of the averaging follows it. None: as much as the others on average.
    :param auxiliary: this peer puts in no gradients; it follows the run and holds its state.
    """
    for group in param_groups:
        for param in group["params"]:
            if param.device.type == "cpu":
                param.data.share_memory_()  # see SwarmOptimizer.share_state_memory

    def make_inner(groups: ParamGroups) -> torch.optim.Optimizer:
        kind = Lamb if settings["optimizer"] == "lamb" else torch.optim.AdamW
        inner = kind(
            groups,
            lr=settings["learning_rate"],
            betas=(settings["adam_beta1"], settings["adam_beta2"]),
            eps=settings["adam_epsilon"],
        )
        _make_state(inner)
        if settings["max_grad_norm"] > 0:
            inner.register_step_pre_hook(partial(_clip, settings["max_grad_norm"]))
        return inner

    schedule = linear_schedule(
        settings["warmup_steps"],
        settings["max_global_steps"],
        floor=settings["min_learning_rate"] / settings["learning_rate"],
    )
    averager_options = dict(bandwidth=bandwidth, request_timeout=_request_timeout(settings["matchmaking_time"]))
    swarm_optimizer = SwarmOptimizer(
        dht=peer.dht,
        run_id=settings["run_id"],
        params=list(param_groups),
        optimizer=make_inner,
        scheduler=lambda inner: LambdaLR(inner, schedule),
        target_batch_size=settings["target_batch_size"],
        matchmaking_time=settings["matchmaking_time"],
        averaging_timeout=settings["averaging_timeout"],
        average_state_every=settings["average_state_every"],
        delay_optimizer_step=settings["delay_optimizer_step"] and not auxiliary,
        delay_grad_averaging=settings["delay_grad_averaging"] and not auxiliary,
        delay_state_averaging=settings["delay_state_averaging"],
        offload_optimizer=offload_optimizer,
        grad_compression=CODECS[settings["grad_compression"]],
        state_averaging_compression=CODECS[settings["state_compression"]],
        # averager_opts reach only the averager of parameters (optim/optimizer.py:263), so gradients get theirs here.
        # Nobody has to download other peers' gradients: upstream offers them to newcomers beside the state.
        grad_averager_factory=partial(Averager, allow_state_sharing=False, **averager_options),
        averager_opts=averager_options,
        tracker_opts=dict(metadata_expiration=settings["metadata_expiration"], private_key=peer.private_key),
        client_mode=peer.client_mode,
        auxiliary=auxiliary,
    )
    swarm_optimizer.share_state_memory()
    return swarm_optimizer


def linear_schedule(warmup_steps: int, total_steps: int, floor: float) -> Callable[[int], float]:
    """Factor on the learning rate for the update that makes global step `done + 1`: linear warm-up, linear decay.

    The first update already has 1 / `warmup_steps` of the peak, and the last one is the only one at `floor`. A closed
    form, because a peer that joins late has to arrive at the same value (chainable schedules would decay twice).
    """

    def factor(done: int) -> float:
        step = done + 1
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return max(floor, 1.0 - (1.0 - floor) * progress)

    return factor


def weight_decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups in which biases and every normalisation layer, told by module type, have no weight decay."""
    norms = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._NormBase)
    undecayed = {
        id(param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name.endswith("bias")
    }
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in params if id(param) not in undecayed], "weight_decay": weight_decay},
        {"params": [param for param in params if id(param) in undecayed], "weight_decay": 0.0},
    ]


def _make_state(inner: torch.optim.Optimizer) -> None:
    """Give every parameter its (zero) optimizer state, so that there is something to load a newcomer's state into.

    Left to itself hivemind makes one real step with gradients of zero (optim/state_averager.py): weight decay would
    change the weights that were just loaded from a checkpoint, and the bias correction would be one step ahead.
    """
    params = [param for group in inner.param_groups for param in group["params"]]
    gradients, rates = [param.grad for param in params], [group["lr"] for group in inner.param_groups]
    for param in params:
        param.grad = torch.zeros_like(param)
    for group in inner.param_groups:
        group["lr"] = 0.0
    inner.step()
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
        inner.state[param]["step"].zero_()
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate


def _clip(max_norm: float, inner: torch.optim.Optimizer, *_: Any) -> None:
    """Clip what the optimizer is about to apply: the averaged gradient, on whichever copy of the model it works."""
    torch.nn.utils.clip_grad_norm_([p for group in inner.param_groups for p in group["params"]], max_norm)


def _request_timeout(matchmaking_time: float) -> float:
    """How long to wait for a leader's answer; has to be shorter than matchmaking_time (averaging/averager.py)."""
    return min(3.0, matchmaking_time / 2)
