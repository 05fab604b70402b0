"""Train any LightningModule together with other computers: `Trainer(strategy=SwarmStrategy(target_batch_size=8192))`.

Lightning is an optional dependency, which nothing else here imports. docs/lightning.md says what to change in a script.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from hivemind.utils import get_dht_time

from arguments import PeerArguments, SwarmArguments, agreed_settings, checked, pick
from collab.bandwidth import measure_in_background, serve_bandwidth
from collab.console import show_log
from collab.errors import UserError
from collab.files import write_text
from collab.initial_state import ParamGroups, params_of, refuse_unknown_ways, same_over
from collab.lookout import Lookout
from collab.manifest import versions_here
from collab.optimizer import RoundReport, SwarmOptimizer, make_optimizer
from collab.peer import Peer, peer_id_in
from collab.processes import guard_children, scratch_folder
from collab.reachability import start_peer
from collab.schedules import ReplayedSchedule
from collab.selftest import self_test

try:
    from lightning.pytorch import LightningModule, Trainer, callbacks
    from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.utilities.data import extract_batch_size
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_info
except ImportError as error:
    raise UserError(
        f"SwarmStrategy needs Lightning, which cannot be imported here ({error}). Type: pip install lightning==2.6.6"
    ) from error

logger = logging.getLogger(__name__)

ADDRESSES_IN = ("INITIAL_PEERS", "PL_INITIAL_PEERS")  # the second is what lightning-hivemind 0.1.0 reads
FOREVER = sys.maxsize  # global steps
PROTOCOL = "samiti/lightning/1"  # under this name a peer serves what its script has to have in common with others
MAX_SCRIPT_BYTES = 16 * 2**20
ASK_SECONDS = 30.0
SHOWN_DIFFERENCES, SHOWN_LETTERS = 6, 200
OWN_CHOICE = {"params", "foreach", "fused", "capturable", "differentiable"}  # of each computer, not of the run
# The first two say nothing: the script has its own optimizer. Losses of any module may jump by intention.
UNLESS_GIVEN = {"learning_rate": 1.0, "warmup_steps": 0, "rollback_after": 0}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
UNSUITABLE = {
    callbacks.GradientAccumulationScheduler: "peers accumulate up to target_batch_size together",
    callbacks.StochasticWeightAveraging: "it changes the weights and the schedule of this peer alone",
    callbacks.LearningRateFinder: "it trains for trials, and so would others; find the rate with another strategy",
    callbacks.BatchSizeFinder: "it trains for trials, and so would others; find the size with another strategy",
    callbacks.BaseFinetuning: "it adds parameters while the swarm trains; give the optimizer all of them at first",
}

_guard_children, _show_log = cache(guard_children), cache(show_log)  # once in a process

# Nobody has to: the optimizer of an offloaded copy gets a copy of the schedule.
warnings.filterwarnings("ignore", message="Seems like `optimizer.step\\(\\)` has been overridden")


class SwarmStrategy(SingleDeviceStrategy):
    """Trains with all computers that run the same script: their gradients make one step together.

    A global step is made when the peers have seen `target_batch_size` samples together, whoever computed how many. The
    first peer prints what the others have to set. The network lives as long as `trainer.fit`; other entry points of the
    Trainer start none.

    :param target_batch_size: samples of all peers together in a global step. One should last several times longer than
      `matchmaking_time`.
    :param run_id: name of the run; scripts with another one never meet.
    :param initial_peers: addresses of one or more peers of the swarm, a list or a text with commas or spaces. None:
      those in the environment variable INITIAL_PEERS, or, if it is not set either, this peer starts a new swarm.
    :param batch_size: samples in each batch. None: the size of the first dimension of what the data loader gives.
    :param max_global_steps: the run ends after so many. None: when the Trainer's own limits say so, which count epochs
      and batches of this computer.
    :param max_grad_norm: the averaged gradient is clipped to this norm; 0 leaves it alone.
    :param offload_optimizer: keep the optimizer's state, and a copy of the parameters, in RAM.
    :param options: of this computer's place in the network, and of the averaging: the fields of
      `arguments.PeerArguments` and `arguments.SwarmArguments`, which have their help.
    :raises UserError: an option does not exist, or has an impossible value.
    """

    strategy_name = "swarm"
    num_nodes = 1  # the Trainer sets this and the next one
    parallel_devices: Sequence[torch.device] | None = None

    def __init__(
        self,
        target_batch_size: int,
        *,
        run_id: str = "lightning_run",
        initial_peers: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        max_global_steps: int | None = None,
        max_grad_norm: float = 0.0,
        offload_optimizer: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        options = _checked(options)
        names = {field.name for field in fields(PeerArguments)}
        self.network = pick(PeerArguments, options | {"initial_peers": _addresses(initial_peers)})
        agreed = {name: value for name, value in options.items() if name not in names}
        agreed |= {"run_id": run_id, "target_batch_size": target_batch_size, "max_grad_norm": max_grad_norm}
        agreed["max_global_steps"] = FOREVER if max_global_steps is None else max_global_steps
        self.settings = agreed_settings(UNLESS_GIVEN | agreed)
        self.batch_size, self.offload_optimizer = batch_size, offload_optimizer
        self.peer: Peer | None = None
        """This computer's place in the network, while it trains."""
        self.swarm: SwarmOptimizer | None = None
        """The optimizer that all share, while it trains."""
        self.skipped_batches = 0
        """Batches whose gradient was not finite; they were dropped."""
        self._step = self._states_loaded = self._samples = 0
        self._going = contextlib.ExitStack()

    @property
    def global_step(self) -> int:
        """Steps that the swarm has made; `trainer.global_step` counts the batches of this computer."""
        return self._step if self.swarm is None else self.swarm.local_epoch

    @property
    def num_peers(self) -> int:
        """Peers that train, as far as this one knows, itself included."""
        return 1 if self.swarm is None else max(1, self.swarm.tracker.global_progress.num_peers)

    @property
    def last_round(self) -> RoundReport | None:
        """The verdict on the latest round, while it trains."""
        return self.swarm and self.swarm.last_round

    # ---- join: before Lightning restores a checkpoint, so that it is restored into the optimizer of the swarm

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        module = self.lightning_module
        assert module is not None
        _refuse(trainer, module, self)
        [optimizer], configs = self.optimizers, self.lr_scheduler_configs
        scheduler = configs[0].scheduler if configs else None
        if configs and configs[0].interval == "epoch" and module.automatic_optimization:
            logger.warning(
                "%s counts global steps in a swarm, which has no common epochs. To say that you mean it: "
                '"interval": "step" in configure_optimizers',
                type(scheduler).__name__,
            )
        refuse_unknown_ways(partial(same_over, optimizer), optimizer.param_groups)
        if scheduler is not None:
            ReplayedSchedule(scheduler)  # refuses what peers cannot share
        script = _script(self.settings, module, optimizer, scheduler)

        _guard_children()
        _show_log()
        self.peer = start_peer(**self.network.peer_options())
        self._going.callback(self.peer.close)
        self_test([self.settings["grad_compression"], self.settings["state_compression"]], self.peer)
        refuse_other_scripts(self.peer, script)
        folder = self._going.enter_context(tempfile.TemporaryDirectory(prefix="samiti-", dir=scratch_folder()))
        write_text(Path(folder, "script.json"), json.dumps(script))
        self.peer.serve(PROTOCOL, Path(folder, "script.json"))
        serve_bandwidth(self.peer)

        swarm_id = f"{self.settings['run_id']}_{_fingerprint(script)}"
        before = signal.getsignal(signal.SIGINT)  # hivemind lets it be ignored
        try:
            self.swarm = make_optimizer(
                self.peer,
                optimizer.param_groups,
                self.settings,
                swarm_id=swarm_id,
                optimizer=lambda groups: optimizer if _same(groups, optimizer) else same_over(optimizer, groups),
                scheduler=(lambda inner: _bound(scheduler, optimizer, inner, module)) if configs else None,
                offload_optimizer=self.offload_optimizer,
                bandwidth=self.network.bandwidth,
                snapshot_folder=Path(trainer.default_root_dir, "snapshots"),
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self._going.callback(self.swarm.leave)
        if self.network.bandwidth is None and not self.peer.on_loopback_only:
            measure_in_background(self.peer, self.swarm.use_measured_bandwidth)
        self._lookout = Lookout(self.peer, swarm_id, self.settings["metadata_expiration"])
        self._going.callback(self._lookout.stop)
        self.optimizers = [self.swarm]
        for config in configs:
            config.scheduler = _SteppedBySwarm(self.swarm)  # type: ignore[assignment]
        _see_other_data(self.peer)

    def on_train_start(self) -> None:
        assert self.swarm is not None and self.peer is not None
        if self.network.initial_peers:
            self.swarm.load_state_from_peers()
            rank_zero_info(f"Starting from global step {self.swarm.local_epoch}")
        else:
            rank_zero_info(join_message(self.peer.addresses()))
        self._step, self._states_loaded = self.swarm.local_epoch, self.swarm.states_loaded
        self.swarm.tracker.performance_ema.reset_timer()  # what was before is no training

    # ---- train: one batch of the data loader is one micro-batch of the swarm

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.batch_size is not None:
            self._samples = self.batch_size
            return
        try:
            self._samples = extract_batch_size(batch)
        except (MisconfigurationException, RecursionError) as error:
            raise UserError(
                f"How many samples are in a batch cannot be told from it (it is a {type(batch).__name__}), and samples "
                f"decide how much this peer counts for. Say it: SwarmStrategy(batch_size=...)"
            ) from error

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any | None = None, **kwargs: Any
    ) -> Any:
        """Count a batch, and make a global step if the swarm has its target batch."""
        module, swarm = self.lightning_module, self.swarm
        assert module is not None and swarm is not None
        loss = closure()
        if loss is None and module.automatic_optimization:  # training_step gave nothing
            return None
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            # At once: gradients that are added up, and averaged, need one scale.
            scaler.unscale_(swarm)
        self.precision_plugin._after_closure(module, optimizer)  # hooks that look at gradients
        gradients = [param.grad for group in swarm.param_groups for param in group["params"] if param.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if scaler is not None:
            scaler.update()
        if finite:
            if self.settings["rollback_after"] and loss is not None:
                swarm.spikes.add(float(loss), self._samples)
            swarm.step(batch_size=self._samples)
        else:  # a NaN must not reach the others; the next batch may be fine
            swarm.drop()
            self.skipped_batches += 1
            if self.skipped_batches & (self.skipped_batches - 1) == 0:  # at 1, 2, 4, 8, ... of them
                logger.warning("%d batches with a NaN or infinite gradient were dropped so far", self.skipped_batches)
        self._tell(module.trainer, module)
        return loss

    def _tell(self, trainer: Trainer, module: LightningModule) -> None:
        """Log what became of a global step, if one was made; stop the Trainer after the last one."""
        swarm = self.swarm
        assert swarm is not None
        step, report = swarm.local_epoch, swarm.last_round
        if step >= self.settings["max_global_steps"]:
            trainer.should_stop = True
        if swarm.states_loaded > self._states_loaded:
            rank_zero_info(f"Took over global step {step} from the others")
        elif step == self._step:
            return
        elif report is not None and not report.left_behind:
            rank_zero_info(f"Global step {step}: averaged {report.met} of {report.expected} peers")
            if report.expected > 1 and not report.applied:
                logger.warning("Global step %d was made alone: %s", step, report.reason or "no other peer came")
            verdict = {
                "applied": report.applied,
                "peers_met": report.met,
                "peers_expected": report.expected,
                "matchmaking_seconds": report.matchmaking_seconds,
                "allreduce_seconds": report.allreduce_seconds,
                "grad_norm": swarm.guard.grad_norm,
                "global_step": step,
            }
            for each in trainer.loggers:
                each.log_metrics(
                    {f"swarm/{name}": float(value) for name, value in verdict.items()}, trainer.global_step
                )
            self._lookout.after_round(report)
        self._step, self._states_loaded = step, swarm.states_loaded
        module.log("swarm/global_step", float(step), prog_bar=True, logger=False, on_step=True, batch_size=1)

    # ---- what goes on in the background goes into the model before it is saved or left

    def finish(self) -> None:
        """Wait for the global step that is still made in the background, if any, and take it into the model."""
        if self.swarm is not None:
            self.swarm.finish()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.finish()
        return super().lightning_module_state_dict()

    def on_train_end(self) -> None:
        self.finish()

    def teardown(self) -> None:
        if self.swarm is not None:
            self._step, self.swarm = self.swarm.local_epoch, None
        self.peer = None
        self._going.close()
        super().teardown()

    # ---- one computer, one device

    @property
    def root_device(self) -> torch.device:
        if not isinstance(self.accelerator, CPUAccelerator | CUDAAccelerator | MPSAccelerator):
            raise UserError(
                f"SwarmStrategy trains on a CPU, on a GPU with CUDA, or on Apple's; not with "
                f'{type(self.accelerator).__name__}. Give the Trainer accelerator="cpu", "cuda" or "mps".'
            )
        return torch.device(self.parallel_devices[0]) if self.parallel_devices else torch.device("cpu")


class _SteppedBySwarm:
    """Stands in for the scheduler that Lightning steps: the swarm steps the real one, once in a global step."""

    def __init__(self, swarm: SwarmOptimizer) -> None:
        self.optimizer = swarm

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def get_last_lr(self) -> list[Any]:
        rates: list[Any] = self.optimizer.state_averager.scheduler.get_last_lr()
        return rates

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state_averager.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: where the schedule is follows from the global step, which is in the optimizer's state."""


def join_message(addresses: Sequence[str]) -> str:
    """What the first peer tells those who want to join."""
    peers = ",".join(addresses)
    return (
        f"This is a new swarm. Other computers join with the same script:\n"
        f"  INITIAL_PEERS={peers} python {Path(sys.argv[0]).name}\n"
        f'or with the argument SwarmStrategy(..., initial_peers="{peers}")'
    )


def refuse_other_scripts(peer: Peer, script: Mapping[str, Any]) -> None:
    """Ask the peers that `peer` joined through what their scripts have agreed on, and compare.

    Peers with another swarm id never average together, whatever this finds; it is for the person who would otherwise
    train alone without knowing why.

    :raises UserError: it is something else than `script`, or nobody answers.
    """
    failures = []
    for address in peer.initial_peers:
        try:
            theirs = json.loads(peer.fetch(peer_id_in(address), PROTOCOL, ASK_SECONDS, MAX_SCRIPT_BYTES))
            if not isinstance(theirs, dict):
                raise ValueError("it says something else")
        except (OSError, ValueError, RecursionError) as error:
            failures.append(f"{address}: {error}")
            continue
        absent = object()
        names = [name for name in {**script, **theirs} if script.get(name, absent) != theirs.get(name, absent)]
        if not names:
            return
        lines = [f"{_short(name)}: {_side(script, name)} here, {_side(theirs, name)} there" for name in names]
        lines[SHOWN_DIFFERENCES:] = [f"and {len(lines) - SHOWN_DIFFERENCES} more"] if lines[SHOWN_DIFFERENCES:] else []
        raise UserError(
            f"This script is not the one that the peer at {address} runs. They differ in\n  "
            + "\n  ".join(lines)
            + "\nTheir gradients do not fit together. Run the same script everywhere; or start a swarm of your own, "
            "without INITIAL_PEERS."
        )
    if failures:
        raise UserError(
            "The swarm answered, but no peer says what its script trains:\n  "
            + "\n  ".join(failures)
            + "\nUse an address that a script with SwarmStrategy has printed, and the same version of this code."
        )


def _side(script: Mapping[str, Any], name: str) -> str:
    return _short(script[name]) if name in script else "nothing"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= SHOWN_LETTERS else text[:SHOWN_LETTERS] + " ..."


def _script(
    settings: Mapping[str, Any], module: LightningModule, optimizer: torch.optim.Optimizer, scheduler: Any | None
) -> dict[str, Any]:
    """What all peers have to have in common, flat, by names that a person understands; as JSON."""
    agreed = ["run_id", "max_global_steps", "max_grad_norm", *(field.name for field in fields(SwarmArguments))]
    script = {name: settings[name] for name in agreed}
    script["optimizer"] = type(optimizer).__name__
    for number, group in enumerate(optimizer.param_groups):
        own = {name: value for name, value in group.items() if name not in OWN_CHOICE}
        script |= {f"parameter group {number}, {name}": value for name, value in own.items()}
    script["schedule"] = scheduler and {"class": type(scheduler).__name__, **scheduler.state_dict()}
    names = {id(param): name for name, param in module.named_parameters()}
    for param in params_of(optimizer):
        script[f"parameter {names.get(id(param), len(script))}"] = list(param.shape)
    script |= {f"version of {name}": version for name, version in versions_here().items()}
    return dict(json.loads(json.dumps(script, default=_described)))


def _described(value: Any) -> Any:
    """For JSON: numbers in tensors; of functions and other objects their names."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return getattr(value, "__qualname__", type(value).__qualname__)


def _fingerprint(script: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(script, sort_keys=True).encode()).hexdigest()[:12]


def _addresses(given: str | Sequence[str] | None) -> list[str]:
    if given is None:
        given = next((os.environ[name] for name in ADDRESSES_IN if os.environ.get(name)), "")
    return given.replace(",", " ").split() if isinstance(given, str) else [str(address) for address in given]


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, each one known and of its type."""
    elsewhere = {"initial_peers", "organizer", "cache_dir"}
    known = {field.name for cls in (PeerArguments, SwarmArguments) for field in fields(cls)} - elsewhere
    if unknown := sorted(options.keys() - known):
        raise UserError(
            f"SwarmStrategy has no option {', '.join(unknown)}. Beside its own arguments it has: "
            f"{', '.join(sorted(known - {'target_batch_size'}))}. See docs/lightning.md."
        )
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return checked(lists, (PeerArguments, SwarmArguments), "SwarmStrategy")


def _refuse(trainer: Trainer, module: LightningModule, strategy: SwarmStrategy) -> None:
    """Refuse what would train something else than people expect, with the reason; before anything is started."""
    for impossible, why in (
        (
            trainer.accumulate_grad_batches != 1,
            "Peers accumulate gradients up to target_batch_size together, so the Trainer must not: leave out "
            "accumulate_grad_batches, and give SwarmStrategy a larger target_batch_size.",
        ),
        (
            bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", module),
            "The Trainer would clip the gradient of each batch, and not that of the global step: leave out "
            "gradient_clip_val (and configure_gradient_clipping), and give SwarmStrategy max_grad_norm.",
        ),
        (
            len(strategy.parallel_devices or ()) > 1 or strategy.num_nodes != 1,
            "Each peer trains on one device: give the Trainer devices=1 (or devices=[NUMBER]) and num_nodes=1, and "
            "start the script once for each device, with INITIAL_PEERS.",
        ),
        (
            trainer.precision not in PRECISIONS,
            f"precision is {trainer.precision}, but weights and gradients travel in float32: give the Trainer one of "
            f"{', '.join(PRECISIONS)}.",
        ),
        (
            len(strategy.optimizers) != 1,
            f"The peers share one optimizer, but configure_optimizers gives {len(strategy.optimizers)}. Put all "
            f"parameters into one, in several parameter groups if their options differ.",
        ),
        (
            len(strategy.lr_scheduler_configs) > 1,
            "configure_optimizers gives several schedules for one optimizer. Make one of them: SequentialLR or "
            "ChainedScheduler.",
        ),
        (
            any(config.frequency != 1 for config in strategy.lr_scheduler_configs),
            "The schedule steps once in each global step, so that its frequency has to be 1. Let it count in global "
            "steps itself.",
        ),
        (
            is_overridden("lr_scheduler_step", module),
            "The swarm steps the schedule, so that lr_scheduler_step is never called. Leave it out, and use a schedule "
            "that needs nothing for its step().",
        ),
        (
            not module.automatic_optimization and strategy.batch_size is None,
            "With manual optimization nobody can tell how many samples are in a step: give SwarmStrategy batch_size, "
            "the samples of each call of the optimizer's step().",
        ),
    ):
        if impossible:
            raise UserError(why)
    for kind, why in UNSUITABLE.items():
        if any(isinstance(each, kind) for each in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(f"{kind.__name__} does not work in a swarm: {why}. Leave out this callback.")
    if strategy.settings["local_updates"]:
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.modules.batchnorm._NormBase) and layer.track_running_stats:
                raise UserError(
                    f"{name} is a {type(layer).__name__} with running statistics, which are no parameters: with "
                    f"local_updates each peer would keep its own. Leave out local_updates, or use GroupNorm."
                )
    frozen = {id(param): name for name, param in module.named_parameters() if not param.requires_grad}
    for param in params_of(strategy.optimizers[0]):
        if id(param) in frozen:
            raise UserError(
                f"{frozen[id(param)]} is frozen (requires_grad is False), and yet the optimizer has it: it would be "
                f"averaged, and decay. Give the optimizer only parameters that are trained."
            )


def _same(groups: ParamGroups, optimizer: torch.optim.Optimizer) -> bool:
    """Whether these are the optimizer's own parameters, not copies."""
    params = [param for group in groups for param in group["params"]]
    return len(params) == len(params_of(optimizer)) and all(map(_is, params, params_of(optimizer)))


def _is(one: object, other: object) -> bool:
    return one is other


def _bound(
    scheduler: Any, optimizer: torch.optim.Optimizer, inner: torch.optim.Optimizer, module: LightningModule
) -> Any:
    """The schedule for `inner`, which may be the optimizer of an offloaded copy."""
    if inner is optimizer:
        return scheduler
    return deepcopy(scheduler, {id(optimizer): inner, id(module): module})


def _see_other_data(peer: Peer) -> None:
    """Seed this peer's shuffling and dropout. With the seed of a script that all run, all would see the same data."""
    seed = int.from_bytes(hashlib.sha256(f"{peer.peer_id} {get_dht_time()}".encode()).digest()[:4])
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
