"""The optimizer that a whole swarm shares: hivemind's, with the repairs it needs, and a verdict on every round."""

import asyncio
import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import hivemind
import torch
from hivemind.averaging.control import AveragingStage, StepControl
from hivemind.optim.progress_tracker import GlobalTrainingProgress, LocalTrainingProgress, ProgressTracker
from hivemind.utils import ValueWithExpiration, get_dht_time
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from collab.adamw import AdamW8bit
from collab.averager import Averager, Gathered, RoundTally, StateAverager
from collab.codecs import CODECS
from collab.errors import UserError
from collab.initial_state import ParamGroups, make_state, params_of, refuse_unknown_ways, share_memory
from collab.lamb import Lamb
from collab.link import HICCUP_SECONDS, Link
from collab.matchmaking import SILENT_SECONDS, Astray, LeftBehind
from collab.memory import give_back_freed_memory
from collab.metrics import MAX_REASON
from collab.moments import float32_state
from collab.peer import Peer
from collab.schedules import ReplayedSchedule
from collab.spikes import NOWHERE, WELL, Snapshots, SpikeGuard, step_to_go_back_to

logger = logging.getLogger(__name__)

# A newcomer moves its schedule to the swarm's global step before its own first update, and has to.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before `optimizer.step")

LOAD_STATE_ATTEMPTS = 3
LOAD_STATE_PAUSE, LONGEST_LOAD_PAUSE = 1.0, 60.0
MOST_FAILED_LOADS = 5
PROGRESS_SECONDS = 0.5
LEAST_REPORTED = 0.5
LEAVE_SECONDS = 4.0

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lamb": Lamb,
    "adamw": partial(torch.optim.AdamW, fused=True),  # CPU, CUDA and MPS have it: a quarter of the time
    "lamb_8bit": partial(Lamb, eight_bit=True),
    "adamw_8bit": AdamW8bit,
}
"""The choices of the setting `optimizer`."""


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
    """Whether the averaged gradient went into the step; if not, this peer's own did, or none."""
    reason: str
    """Why it was not applied; empty if it was."""
    samples: float
    """Samples in the part of the average that this peer computed; 0 if others computed all of it."""
    parts: float
    """Share of the tensor parts that were averaged as they should."""
    bytes_sent: int
    bytes_received: int
    matchmaking_seconds: float
    """From the moment when enough samples were there until the group began to average."""
    allreduce_seconds: float
    rejected: tuple[str, ...]
    """Peer ids whose values were left out because they were not finite."""
    left_behind: bool = False
    """The others have made this step already: this peer has not made it, and takes over their state next."""

    def as_record(self) -> dict[str, Any]:
        """The fields of a `PeerRecord` that this verdict decides about."""
        same = ("applied", "parts", "bytes_sent", "bytes_received", "matchmaking_seconds", "allreduce_seconds")
        renamed = {"peers_met": self.met, "peers_expected": self.expected, "reason": self.reason[:MAX_REASON]}
        renamed["round_samples"] = float(self.samples)
        return {name: getattr(self, name) for name in same} | renamed


class RoundFailed(Exception):
    """A round ended, and does not count."""


class StepGuard:
    """Stands between the gradient that was averaged and the weights: clips it, or holds the step back.

    :param max_grad_norm: the gradient is clipped to this norm; 0 leaves it alone.
    """

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm
        self.hold_next = False
        """Set it to let the next step pass without effect."""
        self.held = 0
        """Steps that were held back."""
        self.grad_norm = 0.0
        """Norm of the latest gradient, before clipping; -1 if it was not finite."""
        self._set_aside: list[torch.Tensor | None] = []

    def attach(self, inner: torch.optim.Optimizer) -> None:
        """Guard every step of `inner` from now on."""
        inner.register_step_pre_hook(self._before)
        inner.register_step_post_hook(self._after)

    def _before(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        params = params_of(inner)
        norm = float(torch.nn.utils.clip_grad_norm_(params, self.max_grad_norm or math.inf))
        self.grad_norm = norm if math.isfinite(norm) else -1.0
        if self.hold_next or self.grad_norm < 0:
            # Optimizers pass over parameters without a gradient: neither momentum nor weight decay moves them.
            self._set_aside = [param.grad for param in params]
            for param in params:
                param.grad = None
            self.held += 1

    def _after(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        for param, gradient in zip(params_of(inner), self._set_aside, strict=False):
            param.grad = gradient
        self._set_aside, self.hold_next = [], False


@dataclass(frozen=True)
class _Counted:
    """What the others have computed for a global step, by their records at one moment."""

    step: int
    samples: float = 0.0
    """Reported, and what whoever reported lately has computed since then."""
    samples_per_second: float = 0.0
    """Of those who reported lately."""
    time: float = 0.0

    def by_now(self) -> float:
        return self.samples + (get_dht_time() - self.time) * self.samples_per_second


class _PacedEvent(threading.Event):
    """An event that can be set at most every `PROGRESS_SECONDS`, unless it is urgent."""

    def __init__(self) -> None:
        super().__init__()
        self.urgent = False
        self._last = -math.inf

    def set(self) -> None:
        if self.urgent or time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            super().set()


class Tracker(ProgressTracker):
    """Tells the swarm about this peer's progress at a measured pace.

    Upstream stores a record in the DHT after every micro-batch (optim/progress_tracker.py, `_progress_reporter`): the
    DHT's process then takes 7 % of a busy peer's CPU time, with this 1 %.
    """

    def __init__(self, *args: Any, start: bool, lag: int = 0, **kwargs: Any) -> None:
        self.lag = lag
        """Steps that peers count before they are averaged: 1 with delayed averaging."""
        self.trainers_step = -1
        """The global step that most trainers have made, by their reports; -1 if there is none. With an even number of
        them this peer's own step is one more voice."""
        self.call_seconds: float | None = None
        """How long this peer takes for a micro-batch, usually; None before the first one."""
        self.is_alone = True
        """Whether no other peer has reported anything lately."""
        self._presence = (-1, -math.inf)
        self._others = _Counted(-1)
        super().__init__(*args, start=False, **kwargs)
        self.should_report_progress: _PacedEvent = _PacedEvent()
        if start:
            self.start()

    @property
    def ready_to_update_epoch(self) -> bool:
        """Whether to make the global step now.

        Upstream goes by estimate alone: what a peer does not report it counts as computed at its usual speed, also
        while that peer averages or downloads, and until the record of a peer that has died expires. Global steps
        shorter than that ran away, and ticked by time instead of by samples (28 of them in 50 micro-batches); those
        after the death of one of three peers had 70 to 89 % of their samples. Here half of the samples have to be
        reported, who is silent computes nothing, and a lone peer counts its own, so that its steps do not depend on
        how fast it is.
        """
        progress, own = self.global_progress, self.local_progress
        if progress.epoch > own.epoch:
            return True
        if self.is_alone:
            return bool(own.samples_accumulated >= self.target_batch_size)
        others = self._others
        if others.step < own.epoch or progress.samples_accumulated < LEAST_REPORTED * self.target_batch_size:
            return False
        return bool(own.samples_accumulated + others.by_now() >= self.target_batch_size)

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # noqa: BLE001 - it is over for this thread; `VitalProcesses` sees that it has ended
            logger.warning("Following the others' progress has ended: %r", error)
            return
        # Upstream leaves its last task to the interpreter, which complains about it on the volunteer's screen.
        loop = asyncio.get_event_loop()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()

    def report_local_progress(self, local_epoch: int, samples_accumulated: int, **kwargs: Any) -> None:
        known = self.local_progress
        self.should_report_progress.urgent = (
            local_epoch != known.epoch or samples_accumulated < known.samples_accumulated
        )
        super().report_local_progress(local_epoch, samples_accumulated, **kwargs)
        samples = samples_accumulated - (known.samples_accumulated if local_epoch == known.epoch else 0)
        if samples > 0 and self.performance_ema.samples_per_second > 0:
            self.call_seconds = samples / self.performance_ema.samples_per_second

    def report_presence(self, step: int) -> None:
        """For auxiliary peers: tell the others that this one will take part in the round after global step `step`.

        Upstream does not announce auxiliary peers. A speed of exactly zero marks them. Call it as often as you like.
        """
        now = get_dht_time()
        if (step, now) < (self._presence[0], self._presence[1] + self.metadata_expiration / 3):
            return
        self._presence = step, now
        self.dht.store(
            self.training_progress_key,
            subkey=self._local_public_key,
            value=LocalTrainingProgress(
                peer_id=self.dht.peer_id.to_bytes(), epoch=step, samples_accumulated=0, samples_per_second=0.0,
                time=now, client_mode=False,
            ).dict(),
            expiration_time=now + self.metadata_expiration,
            return_future=True,
        )  # fmt: skip

    def withdraw(self) -> None:
        """Let nobody wait for this peer until it reports progress again."""
        self.dht.store(
            self.training_progress_key,
            subkey=self._local_public_key,
            value=None,
            expiration_time=get_dht_time() + self.metadata_expiration,
            return_future=True,
        )

    def _parse_swarm_progress_data(self, metadata: Any) -> GlobalTrainingProgress:
        self.trainers_step = -1
        if isinstance(metadata, dict):
            told = {key: entry for key, entry in metadata.items() if entry.value is not None}
            # those who train; not who only helps
            trainers = {key: entry for key, entry in told.items() if entry.value["samples_per_second"] > 0}
            steps = [entry.value["epoch"] for entry in trainers.values()]
            if steps:
                self.trainers_step = int(median(steps if len(steps) % 2 else [*steps, self.local_progress.epoch]))
            metadata = self._bounded(trainers, told)
        progress = super()._parse_swarm_progress_data(metadata)
        entries = metadata if isinstance(metadata, dict) else {}
        self._others = self._count(
            [entry.value for key, entry in entries.items() if key != self._local_public_key], progress.epoch
        )
        is_listed = self._local_public_key in entries
        self.is_alone = progress.num_peers <= is_listed
        if progress.num_peers and not is_listed and self.local_progress.samples_accumulated:
            progress.num_peers += 1  # this peer's first record is still on its way
        return progress

    @staticmethod
    def _count(records: list[dict[str, Any]], step: int) -> _Counted:
        """What the peers of these records have computed for global step `step` + 1."""
        now = get_dht_time()
        made = [record for record in records if record["epoch"] == step]
        lately = [record for record in made if now - record["time"] < SILENT_SECONDS]
        since = sum(max(0.0, now - record["time"]) * record["samples_per_second"] for record in lately)
        samples = sum(record["samples_accumulated"] for record in made) + since
        return _Counted(step, samples, sum(record["samples_per_second"] for record in lately), now)

    def _bounded(self, trainers: dict[Any, Any], told: dict[Any, Any]) -> dict[Any, Any]:
        """The trainers' records, none of them further than a second peer bears out.

        Upstream follows the most advanced peer, whatever it says: one that reports global step 1e9 had all others
        download states instead of training. A peer that is the only other one is believed.
        """
        others = {key: entry.value["epoch"] for key, entry in told.items() if key != self._local_public_key}
        if sum(key in trainers for key in others) < 2:
            return trainers
        furthest = sorted([*others.values(), self.local_progress.epoch])[-2] + self.lag
        bounded = {}
        for key, entry in trainers.items():
            if entry.value["epoch"] > furthest:  # its samples are not for this step
                known = entry.value | {"epoch": furthest, "samples_accumulated": 0}
                entry = ValueWithExpiration(known, entry.expiration_time)
            bounded[key] = entry
        return bounded

    def shutdown(self, timeout: float | None = None) -> None:
        self.should_report_progress.urgent = True
        super().shutdown(timeout)


class SwarmOptimizer(hivemind.Optimizer):
    """`hivemind.Optimizer` that says what became of each round. Made by `make_optimizer`.

    hivemind's word for a global step is epoch.
    """

    last_round: RoundReport | None = None
    """The verdict on the latest round. With delayed averaging it is the previous step's when a step is made."""
    states_loaded = 0
    """How often this peer took over the state of another one."""
    has_state = True
    """Whether this peer's weights are a state of the run, with which it can train and which it can hand out."""
    went_back_to: int | None = None
    """The global step to whose weights the swarm has gone back since this peer took over a state, if it has."""
    _agreed_step: int | None = None  # to go back to, at the next opportunity
    average_state_every: int
    _has_checkpoint = False  # a state to go on from if nobody hands out a newer one
    _failed_loads = 0  # in a row
    _state_round: StepControl | None = None  # with local updates: the latest, until there is a verdict on it
    _state_round_seconds = 0.0
    pause: Callable[[float], object] = staticmethod(time.sleep)
    """Waits so many seconds; a program that wants to leave at once meanwhile gives another one."""

    def __init__(
        self,
        *,
        guard: StepGuard,
        spikes: SpikeGuard,
        snapshots: Snapshots | None,
        link: Link,
        quorum: float,
        failed_round: str,
        last_step: int,
        has_state: bool = True,
        **kwargs: Any,
    ) -> None:
        self.guard, self.link, self.quorum, self.failed_round = guard, link, quorum, failed_round
        self.spikes, self.snapshots, self.has_state = spikes, snapshots, has_state
        self._round_began, self._round_step, self._round_samples, self._expected = 0.0, 0, 0, 1
        self._must_reload = self._gave_up = False
        self.scheduled_grads: StepControl | None = None
        super().__init__(**kwargs)
        self.state_averager.last_step = last_step
        self.state_averager.steps_in_flight = int(self.delay_grad_averaging)

    def __del__(self) -> None:
        """Only `shutdown` ends it: upstream does so too when any object that shares our `__dict__` is collected."""

    @property
    def state(self) -> dict[Any, Any]:
        """That of the inner optimizer, and the global step. Copies: whoever moves it to a device (Lightning does)
        would part an offloaded optimizer's state from its parameters."""
        return {key: dict(value) if isinstance(value, dict) else value for key, value in super().state.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the inner optimizer, which upstream has not."""
        return dict(self.opt.defaults)

    def step(self, *args: Any, weight: float | None = None, **kwargs: Any) -> Any:
        """Count a micro-batch, and make a global step if the swarm has its target batch.

        :param weight: of the micro-batch among those of this peer; None: its samples (`batch_size`). Peers among each
          other count by samples.
        """
        if self.auxiliary:
            self.tracker.report_presence(self.local_epoch)
        if self.grad_averager is not None:
            self.grad_averager.weight = weight
        return super().step(*args, **kwargs)

    def _make_progress_tracker(self, target_batch_size: int, **kwargs: Any) -> Tracker:
        return Tracker(
            dht=self.dht,
            prefix=self.run_id,
            target_batch_size=target_batch_size,
            client_mode=self.client_mode,
            start=True,
            **kwargs,
        )

    def _make_state_averager(self, **kwargs: Any) -> StateAverager:
        return StateAverager(
            dht=self.dht,
            prefix=f"{self.run_id}_state_averager",
            min_matchmaking_time=self.matchmaking_time,
            allreduce_timeout=self.allreduce_timeout,
            shutdown_timeout=self.shutdown_timeout,
            next_chunk_timeout=self.next_chunk_timeout,
            offload_optimizer=self.offload_optimizer,
            custom_gradients=self.offload_optimizer,
            client_mode=self.client_mode,
            auxiliary=self.auxiliary,
            initialize_optimizer=False,  # `make_state` has: see there
            start=True,
            **kwargs,
        )

    def _should_load_state_from_peers(self) -> bool:
        """Whether the others have made a step without this peer.

        Upstream lets a peer that is one step behind make that step from its own gradient (optim/optimizer.py:640): a
        newcomer would step with its first micro-batch, and its optimizer state would differ from then on. Only with
        delayed averaging is being one behind normal: there the others count a step when its averaging begins. (Once in
        each step upstream calls it out of sync there, too: steps as short as rounds then chased each other.) With local
        updates it is, too: what this peer has learnt since comes into the next average.
        """
        normal = int(self.delay_grad_averaging or self.use_local_updates)
        return self._must_reload or self.local_epoch < self.tracker.global_epoch - normal

    def _maybe_schedule_gradient_averaging(self) -> None:
        self.grad_averager.round_number = self.local_epoch + 1
        if self.tracker.global_progress.num_peers > 1:  # a lone peer need not look for others
            self.grad_averager.call_seconds = self.tracker.call_seconds
            self.grad_averager.wish = self._wish()
            if not self._is_averaging:
                super()._maybe_schedule_gradient_averaging()

    def _maybe_schedule_state_averaging(self) -> None:
        if not self.use_local_updates:  # nobody waits for those rounds, so they need not be begun early
            super()._maybe_schedule_state_averaging()

    @property
    def _is_averaging_state(self) -> bool:
        return self._state_round is not None and not self._state_round.done()

    def _begin_averaging_state(self) -> None:
        """With local updates: make room for the next round of parameters, which begins with the next global step."""
        if self._is_averaging_state:
            self.last_round = None  # the others are ahead: there is no verdict on it yet, and no other round beside it
            return
        self._judge_state_round()
        if self.tracker.global_progress.num_peers <= 1:
            self._look_who_is_there()
        # Who is two steps behind makes both at once: in the round of the first one nobody is left.
        self._round_began, self._round_step = time.monotonic(), max(self.local_epoch + 1, self.tracker.global_epoch)
        self._expected = max(1, self.tracker.global_progress.num_peers)
        if self._expected > 1:
            said = [self._round_step, self.tracker.local_progress.samples_accumulated]
            control = self.state_averager.schedule_step(gather=said, timeout=self.averaging_timeout)
            control.add_done_callback(self._note_end_of_state_round)
            self.scheduled_state = self._state_round = control

    def _note_end_of_state_round(self, control: Any) -> None:
        self._state_round_seconds = time.monotonic() - self._round_began

    def _judge_state_round(self) -> None:
        control, self._state_round = self._state_round, None
        if control is not None:
            tally, failure = self._finish(control)
            reason = "" if tally is not None else str(failure) or type(failure).__name__
            self._report(tally, reason, seconds=self._state_round_seconds)
        else:
            self._expected = self._expected if self._round_step else 1  # before the first step there was no other model
            self._round_step = self._round_step or self.local_epoch + 1
            self._report(None, "")

    @property
    def _is_averaging(self) -> bool:
        """Whether a global step is still being made in the background.

        A peer that joined the next round's group already could not keep up with it: the others would average without
        it and find it late again, in each of the rounds that follow.
        """
        return self.delay_grad_averaging and any(not update.done() for update in self.state_averager.pending_updates)

    def _begin_averaging_gradients(self, grad_scaler: Any) -> bool:
        self._round_began, self._round_step = time.monotonic(), self.local_epoch + 1
        if self._agreed_step is not None:  # in the round before, which was averaged in the background
            self._give_up_round_and_go_back(self._agreed_step)
        if self.tracker.global_progress.num_peers <= 1:
            self._look_who_is_there()  # who came since the tracker looked last would be left behind
        self._expected = max(1, self.tracker.global_progress.num_peers)
        if self.tracker.global_progress.epoch > self.local_epoch and not (self.auxiliary or self.delay_grad_averaging):
            self._load_local_gradients_into_optimizer()
            self._leave_the_step_to_the_others()
            self._report(None, "it was made without this peer", left_behind=True)
            return False
        self._round_samples = self.grad_averager.local_samples_accumulated
        scheduled = self.scheduled_grads
        if self._expected > 1 and (scheduled is None or scheduled.triggered or scheduled.done()):
            # No early search, or it failed. Upstream takes a failed one for the round itself (optim/optimizer.py:529),
            # and without any it begins one that has no deadline, for which a leader takes nobody in.
            self.scheduled_grads = self.grad_averager.schedule_step(timeout=self.averaging_timeout)
        began = super()._begin_averaging_gradients(grad_scaler)
        self.zero_grad()  # added up already
        if not began:
            # Upstream loads the accumulated gradient only if matchmaking was still going on; otherwise the step would
            # use the last micro-batch alone (optim/optimizer.py:538-548).
            self._load_local_gradients_into_optimizer()
            self._report(None, "" if self._expected == 1 else "the round could not begin")
            if self._expected == 1:
                self._follow_wishes([self._wish()])
        return bool(began)

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control: StepControl | None) -> None:
        assert maybe_step_control is not None
        try:
            self._average(maybe_step_control)
        finally:
            self.grad_averager.end_round()

    def _average(self, control: StepControl) -> None:
        give_up = time.monotonic() + self.averaging_timeout
        tally, failure = self._finish(control)
        # Once given up, the missing peers are not waited for so long again until somebody was met.
        while failure is not None and self.failed_round == "retry" and not self.auxiliary and not self._gave_up:
            self._look_who_is_there()
            left = give_up - time.monotonic()
            if isinstance(failure, LeftBehind) or self._expected == 1 or left < 2 * self.matchmaking_time:
                break
            logger.info("Round %d: %s; trying again", self._round_step, failure)
            control = self.grad_averager.retry(weight=self._round_samples, timeout=left)
            tally, failure = self._finish(control)
        self._gave_up = failure is not None and not isinstance(failure, LeftBehind)
        if failure is None:
            self._load_averaged_gradients_into_optimizer_()
            self._report(tally, "")
            self._follow_wishes(tally.wishes if tally is not None else ())
            return
        self.grad_averager.restore_own_gradient()
        self._load_averaged_gradients_into_optimizer_()
        left_behind = isinstance(failure, LeftBehind) and not self.auxiliary
        if isinstance(failure, Astray):
            self.average_state_every = sys.maxsize  # these weights are not for the others
        if left_behind:
            self._leave_the_step_to_the_others()
        elif self.spikes.wants_back and self._expected > 1:
            self.reload("the others may have gone back to earlier weights in a round that was lost here")
        elif self.failed_round == "skip":
            self.guard.hold_next = True
        reason = "" if self._expected == 1 else str(failure) or type(failure).__name__
        if reason:
            level = logging.DEBUG if self.auxiliary else logging.WARNING
            logger.log(level, "Round %d was not averaged: %s", self._round_step, reason)
        self._report(tally, reason, left_behind)

    def _update_global_epoch(self, grad_scaler: Any) -> None:
        average_state_every = self.average_state_every  # `_go_back` can put it off
        if self.use_local_updates:
            if self._is_averaging_state and self.tracker.global_epoch <= self.local_epoch:
                return  # a global step takes a round at least; this peer goes on training meanwhile
            self._begin_averaging_state()
        try:
            super()._update_global_epoch(grad_scaler)
        finally:
            self.average_state_every = average_state_every
        give_back_freed_memory()
        if self.auxiliary:
            if self.use_local_updates:
                self._judge_state_round()
            return
        step, snapshots = self.local_epoch, self.snapshots
        self.spikes.close(step)
        if snapshots is not None and step % snapshots.every == 0 and self.spikes.is_well and not self._must_reload:
            self.finish()
            snapshots.save(step, self.opt)

    def _wish(self) -> int | None:
        """What this peer says in the next round of its loss, see `step_to_go_back_to`."""
        if not self.spikes.is_settled:
            return None
        return max(self._good_snapshots(), default=NOWHERE) if self.spikes.wants_back else WELL

    def _good_snapshots(self) -> list[int]:
        """Those after which the loss stayed healthy for some time: a bad update shows only later."""
        kept = self.snapshots.steps if self.snapshots is not None else []
        return [step for step in kept if step + self.spikes.patience <= self.spikes.healthy_until]

    def _follow_wishes(self, wishes: Sequence[object]) -> None:
        if self.state_averager.went_back_at == self._round_step:
            return  # with delayed averaging, these wishes are from before
        self._agreed_step = step_to_go_back_to(wishes, before=self._round_step)
        if self._agreed_step is not None and not self.delay_grad_averaging:
            self._give_up_round_and_go_back(self._agreed_step)

    def _give_up_round_and_go_back(self, step: int) -> None:
        self.guard.hold_next = True  # the gradient is one of the weights that are left now
        self.average_state_every = sys.maxsize  # not with those who have not got their new weights yet
        self._agreed_step = None
        self._go_back(step)

    def _go_back(self, step: int) -> None:
        """Return to the weights and the optimizer's state of an earlier global step.

        The number of global steps, the schedule and the place in the data go on (as in PaLM, Chowdhery et al. 2022,
        section 5.1: an earlier checkpoint with other batches). Who does not keep that state takes over another peer's.
        """
        averager, now = self.state_averager, self._round_step
        self.went_back_to = step
        averager.went_back_at = averager.not_before = now
        if self.auxiliary:
            if averager.held_step is not None and averager.held_step > step:
                averager.allow_state_sharing = False  # until the next checkpoint
            return
        self.spikes.went_back()
        self.finish()
        with averager.get_tensors():  # nobody downloads half of it
            found = self.snapshots is not None and self.snapshots.restore(step, self.opt)
        if self.offload_optimizer:
            averager._apply_optimizer_parameters_()
        if self.snapshots is not None:
            self.snapshots.forget(after=step)
        if found:
            averager.not_before = 0
            logger.warning(
                "The loss jumped and stayed up: step %d goes back to the weights of step %d, and on with new batches",
                now, step,
            )  # fmt: skip
        else:
            self.reload(f"the loss jumped and stayed up, and the swarm has gone back to global step {step}")

    def drop(self) -> None:
        """Instead of `step`, for a micro-batch whose gradient is not finite.

        The peer keeps up with the others all the same. If nothing else comes any more, the weights are to blame: no
        global step can be made in which peers could agree to go back, so that each goes back by itself.
        """
        self.state_averager.step(apply_delayed_updates=True)
        if self._should_load_state_from_peers():
            self.load_state_from_peers()
        elif self.spikes.drop() and (good := self._good_snapshots()):
            self._round_step = self.local_epoch + 1
            self._go_back(max(good))
            self.grad_averager.reset_accumulated_grads_()
            self.tracker.report_local_progress(self.local_epoch, samples_accumulated=0)

    def _load_averaged_gradients_into_optimizer_(self) -> None:
        if not self.offload_optimizer:
            for param in params_of(self.opt):
                if param.grad is None:  # upstream would put one in RAM there, whatever the parameter's device
                    param.grad = torch.empty_like(param)
        super()._load_averaged_gradients_into_optimizer_()

    def _finish(self, control: StepControl) -> tuple[RoundTally | None, Exception | None]:
        """Wait for a round to end; gives what it was, and why it does not count if it does not."""
        try:
            result = control.result(self.averaging_timeout)
            tally: RoundTally = result.tally if isinstance(result, Gathered) else result
        except Exception as error:  # noqa: BLE001 - a round may fail in any way; training outlives it
            if not control.done():
                control.cancel()
            return None, error
        self.link.after_round(tally.bytes_received, tally.busy_seconds)
        self._announce_link()
        self._expected = max(self._expected, tally.expected)
        # More than the quorum, or both halves of a split swarm would go on, each with a model of its own.
        enough = len(tally.peers) > self.quorum * self._expected or len(tally.peers) >= self._expected
        if str(self.dht.peer_id) in tally.strays:
            self.state_averager.trusted = frozenset(tally.sound)  # others of its part may have been elsewhere
            return tally, Astray("peers that were apart from this one are back, and most have another model")
        if enough or self.auxiliary:
            return tally, None
        return tally, RoundFailed(f"met {len(tally.peers)} of {self._expected} peers, less than the quorum")

    def use_measured_bandwidth(self, mbits: float) -> None:
        """Let this peer's share of the averaging follow what was measured; what the person has said comes first.

        :param mbits: Mbit/s of the slower direction.
        """
        self.link.measured = mbits
        self._announce_link()

    def _announce_link(self) -> None:
        for averager in self.averagers:
            averager.bandwidth = self.link.mbits  # goes to the others with the next round's request

    @property
    def averagers(self) -> list[Any]:
        """Of parameters and, without local updates, of gradients; each is a process of its own."""
        return [each for each in (self.state_averager, self.grad_averager) if each is not None]

    def _look_who_is_there(self) -> None:
        """Ask at once how many peers live and how far they are; the tracker does not while updates are paused."""
        answer = self.dht.get(self.tracker.training_progress_key, latest=True)
        progress = self.tracker._parse_swarm_progress_data(answer.value if answer is not None else None)
        self.tracker.global_progress = progress
        self._expected = max(1, progress.num_peers)

    def reload(self, why: str, astray: bool = False) -> None:
        """Take over the others' state before the next micro-batch counts, and share this peer's with nobody before.

        :param why: for the console.
        :param astray: this peer's weights are not those of the others, and nor may be those that it keeps on disk.
        """
        if astray and self.snapshots is not None:
            self.snapshots.forget()
        logger.warning("Taking over the state of the others: %s", why)
        self._must_reload = True
        if not self.client_mode:
            self.state_averager.allow_state_sharing = False

    def note_model(self, sketch: Sequence[float] | None) -> None:
        """Say which weights this peer has now; those who have been apart compare them in the round in which they meet.

        :param sketch: `agreement.sketch` of the parameters after the latest global step. None: not to be compared.
        """
        if self.grad_averager is not None:
            self.grad_averager.sketch = sketch

    def _leave_the_step_to_the_others(self) -> None:
        self.reload(f"round {self._round_step} was made without this peer")
        self.guard.hold_next = True

    def _report(
        self, tally: RoundTally | None, reason: str, left_behind: bool = False, seconds: float | None = None
    ) -> None:
        if seconds is None:
            seconds = time.monotonic() - self._round_began
        met = len(tally.peers) if tally is not None else 1
        self.last_round = RoundReport(
            step=self._round_step,
            met=met,
            expected=max(met, self._expected),
            applied=tally is not None and not reason and met > 1,
            reason=reason,
            samples=tally.samples if tally is not None else 0.0,
            parts=tally.parts if tally is not None else 0.0,
            bytes_sent=tally.bytes_sent if tally is not None else 0,
            bytes_received=tally.bytes_received if tally is not None else 0,
            matchmaking_seconds=seconds - (tally.seconds if tally is not None else 0.0),
            allreduce_seconds=tally.seconds if tally is not None else 0.0,
            rejected=tally.rejected if tally is not None else (),
            left_behind=left_behind,
        )
        for peer in self.last_round.rejected:
            logger.warning(
                "Round %d: peer %s sent values that are not finite; they were left out", self._round_step, peer[-6:]
            )

    def load_state_from_peers(self, **kwargs: Any) -> bool:
        """Take over parameters, optimizer state, global step and schedule from the most advanced peer, if any.

        Upstream tries for ever (optim/optimizer.py:702), and downloads every donor's gradients beside its state.

        :returns: whether a state was taken over. False if nobody has one to offer, or no donor could deliver it. After
          that the next call waits first, longer each time: nothing that this peer computes counts before.
        """
        if self._failed_loads and not self.auxiliary:
            self.pause(min(LOAD_STATE_PAUSE * 2 ** min(self._failed_loads, 10), LONGEST_LOAD_PAUSE))
        self._abandon_scheduled_round()
        if not self.auxiliary:
            self.tracker.withdraw()
        self.finish()
        with self.tracker.pause_updates():
            loaded = 0
            for attempt in range(LOAD_STATE_ATTEMPTS):
                if attempt:
                    time.sleep(LOAD_STATE_PAUSE)  # donors may be about to finish the step that this peer has reached
                loaded += self.state_averager.load_state_from_peers(timeout=self.load_state_timeout, **kwargs)
                self._look_who_is_there()
                behind = self.tracker.global_epoch - self.local_epoch
                if (loaded and behind <= 0) or loaded == 2:
                    break
                if behind <= 0 and self.has_state and not self._must_reload:
                    break
            else:
                if not loaded:
                    logger.warning("No peer could hand out its state in %d attempts", LOAD_STATE_ATTEMPTS)
            if (loaded or self._has_checkpoint) and behind > 0 and not self.auxiliary:
                # It would never catch up if the swarm is faster than its downloads, or only a checkpoint is to be had.
                # One behind is normal: what the donor's peers are about to finish is not what they average next.
                if behind > 1:
                    logger.warning("Joins with a state %d steps old; the next averaging of parameters mends it", behind)
                self.state_averager.local_epoch = self.tracker.global_epoch
                self.state_averager._update_scheduler()
            self.tracker.report_local_progress(self.local_epoch, samples_accumulated=0)
            if self.grad_averager is not None:
                self.grad_averager.reset_accumulated_grads_()
            self.note_model(None)
            self.state_averager.trusted = frozenset()
            self.has_state |= bool(loaded)
            if self.auxiliary and loaded:
                self.state_averager.allow_state_sharing = False  # until it is checked: `hold_state`
            # The weights that the swarm has left would spread from here in the next averaging of parameters.
            has_ruined = bool(not loaded and self.state_averager.not_before and not self.tracker.is_alone)
            needs_another = has_ruined and self._failed_loads < MOST_FAILED_LOADS
            if self.has_state and not self.auxiliary and not self.client_mode and not needs_another:
                self.state_averager.allow_state_sharing = True
                self.state_averager.state_sharing_priority = self.local_epoch
        if not needs_another:
            self._must_reload, self.state_averager.not_before = False, 0
        self.states_loaded += bool(loaded)
        behind = self.tracker.global_epoch > self.local_epoch
        self._failed_loads = self._failed_loads + 1 if (behind or needs_another) and not loaded else 0
        self.spikes.took_over()
        if loaded:  # with delayed averaging the donor has gone back already, if a round has agreed on it
            self.went_back_to = self._agreed_step = None
        self.share_state_memory()
        give_back_freed_memory()
        return bool(loaded)

    def _abandon_scheduled_round(self) -> None:
        scheduled, self.scheduled_grads = self.scheduled_grads, None
        if scheduled is None or scheduled.done():
            return
        if scheduled.stage == AveragingStage.LOOKING_FOR_GROUP:
            scheduled.cancel()
        else:  # the group is complete and counts on this peer
            self._tag_along_with_zero_weight(scheduled)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the optimizer's state and the global step from a checkpoint.

        Rates and decays stay those of this run's settings: upstream replaces them with the checkpoint's.
        """
        ours = [{key: value for key, value in group.items() if key != "params"} for group in self.opt.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.opt.param_groups, ours, strict=True):
            group.update(own)
        self.state_averager.start_schedule_over()
        self.state_averager._update_scheduler()
        self._has_checkpoint = self.has_state = True
        if self.auxiliary:
            self.state_averager.hold_state(self.local_epoch)
        elif not self.client_mode:
            self.state_averager.state_sharing_priority = self.local_epoch
        self.tracker.report_local_progress(self.local_epoch, samples_accumulated=0)
        self.share_state_memory()

    def adopt(self, settings: Mapping[str, Any]) -> None:
        """Go by changed settings from the next micro-batch on.

        :param settings: the agreed arguments of the run. Those for which processes or tensors would have to be built
          anew cannot change; `arguments.CHANGEABLE` lists the others.
        """
        self.target_batch_size = self.tracker.target_batch_size = settings["target_batch_size"]
        for averager in self.averagers:
            averager.max_weight = settings["target_batch_size"]
        self.average_state_every = _average_state_every(settings)
        self.quorum, self.failed_round = settings["quorum"], settings["failed_round"]
        self.guard.max_grad_norm = settings["max_grad_norm"]
        self.spikes.patience = _rollback_after(settings)
        self.spikes.start_over()
        if self.snapshots is not None:
            self.snapshots.every = settings["snapshot_every"]
        averager = self.state_averager
        averager.last_step = settings["max_global_steps"]
        self.finish()
        scheduler, schedule = averager.scheduler, _schedule_of(settings)
        scheduler.base_lrs = [settings["learning_rate"]] * len(scheduler.base_lrs)
        scheduler.lr_lambdas = [schedule] * len(scheduler.base_lrs)
        for group in averager.optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * schedule(scheduler.last_epoch)

    def skip_to(self, step: int) -> None:
        """Follow the swarm to a later global step without its state; for auxiliary peers, which put in nothing."""
        self._abandon_scheduled_round()
        with self.tracker.pause_updates():
            self.state_averager.local_epoch = step
            self.tracker.update_epoch(step)

    def finish(self) -> None:
        """Wait for the global step that is still made in the background, if any, and take it into the model."""
        self.state_averager.step(wait_for_delayed_updates=True)

    def leave(self, timeout: float = LEAVE_SECONDS) -> bool:
        """Say goodbye and end the averagers, within `timeout` seconds.

        Upstream waits for rounds that are still pending: 13 to 33 seconds. Here they are abandoned; whoever is in a
        group with this peer notices at once that the connection is gone.

        :returns: whether all of it was done in time. What was not ends with the process (`guard_children`).
        """

        def say_goodbye() -> None:
            self.tracker.shutdown(1.0)
            for scheduled_round in (self.scheduled_grads, self.scheduled_state, self._state_round):
                if scheduled_round is not None and not scheduled_round.done():
                    scheduled_round.cancel()
            for averager in self.averagers:
                averager.shutdown_timeout = 1.0
                averager.shutdown()
            if self.snapshots is not None:
                self.snapshots.close()

        goodbye = threading.Thread(target=say_goodbye, name="goodbye", daemon=True)
        goodbye.start()
        goodbye.join(timeout)
        return not goodbye.is_alive()

    def share_state_memory(self) -> None:
        """Keep CPU state in shared memory from the start.

        When a newcomer downloads the state, hivemind hands the live tensors to another process, which moves their
        memory under a running step: garbage or NaN in 14 of 100 tries (`get_current_state`, optim/state_averager.py).
        Tensors that are shared already do not move.
        """
        share_memory(value for state in self.opt.state.values() for value in state.values())


def make_optimizer(
    peer: Peer,
    param_groups: ParamGroups,
    settings: Mapping[str, Any],
    *,
    swarm_id: str,
    optimizer: Callable[[ParamGroups], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    offload_optimizer: bool = False,
    bandwidth: float | None = None,
    auxiliary: bool = False,
    has_state: bool = True,
    snapshot_folder: Path | None = None,
) -> SwarmOptimizer:
    """Build the optimizer that a run's settings describe.

    Call it from the main thread (averagers cannot be started elsewhere), after the model has its first weights.

    :param param_groups: `[{"params": [...], "weight_decay": 0.01}, ...]`, the same on all peers.
    :param settings: the agreed arguments of the run (`OptimizerArguments`, `SwarmArguments`, run id and length).
    :param swarm_id: name under which peers find each other; only peers with the same one average together.
    :param optimizer: makes another one than the settings say, of the parameter groups that it is given; without a
      scheduler its learning rate stays as it is. It is tried first, on some small parameters.
    :param scheduler: makes a scheduler of torch for the optimizer that it is given; it steps once in a global step.
    :param offload_optimizer: keep the optimizer's state, and a copy of the parameters, in RAM. A run with delayed
      updates does so on all trainers.
    :param bandwidth: Mbit/s; this peer's share of the averaging follows it. None: what `use_measured_bandwidth` is told
      later, and until then as much as the others usually have.
    :param auxiliary: this peer puts in no gradients; it follows the run and holds its state.
    :param has_state: False if the model's weights mean nothing yet: they are handed to nobody, and
      `load_state_from_peers` has to replace them before the first step.
    :param snapshot_folder: of this computer, for the states that the run can go back to. None: it keeps none, and takes
      over the others' when they go back.
    :raises UserError: the optimizer is to be offloaded in a run with local updates; or `optimizer` or `scheduler` is
      none that peers can share (`refuse_unknown_ways`, `ReplayedSchedule`).
    """
    if settings["local_updates"] and offload_optimizer:
        raise UserError("This run makes its steps where the model is (local_updates): leave out --offload_optimizer.")
    if optimizer is not None:
        refuse_unknown_ways(optimizer, param_groups)
    for group in param_groups:
        share_memory(param.data for param in group["params"])  # see SwarmOptimizer.share_state_memory

    def make_inner(groups: ParamGroups) -> torch.optim.Optimizer:
        inner = optimizer(groups) if optimizer is not None else _optimizer_of(settings, groups)
        make_state(inner)
        guard.attach(inner)
        return inner

    def make_schedule(inner: torch.optim.Optimizer) -> LRScheduler:
        if scheduler is not None:
            return ReplayedSchedule(scheduler(inner))
        return LambdaLR(inner, _schedule_of(settings) if optimizer is None else lambda _: 1.0)

    delays, local = settings["delay_optimizer_step"] and not auxiliary, settings["local_updates"]
    guard = StepGuard(settings["max_grad_norm"])
    snapshots = None
    if snapshot_folder is not None and _rollback_after(settings) and not auxiliary:
        snapshots = Snapshots(snapshot_folder, peer.peer_id, settings["snapshot_every"])
    news_seconds = max(PROGRESS_SECONDS, min(HICCUP_SECONDS, settings["matchmaking_time"]) / 2)

    averager_options: dict[str, Any] = dict(
        bandwidth=bandwidth,
        request_timeout=_request_timeout(settings["matchmaking_time"]),
        min_vector_size=settings["min_vector_size"],
        progress_key=f"{swarm_id}_progress",
        max_weight=settings["target_batch_size"],
    )
    swarm_optimizer = SwarmOptimizer(
        guard=guard,
        spikes=SpikeGuard(_rollback_after(settings)),
        snapshots=snapshots,
        link=Link(bandwidth),
        quorum=settings["quorum"],
        failed_round=settings["failed_round"],
        last_step=settings["max_global_steps"],
        has_state=has_state,
        dht=peer.dht,
        run_id=swarm_id,
        params=list(param_groups),
        optimizer=make_inner,
        scheduler=make_schedule,
        target_batch_size=settings["target_batch_size"],
        matchmaking_time=settings["matchmaking_time"],
        averaging_timeout=settings["averaging_timeout"],
        next_chunk_timeout=max(settings["matchmaking_time"], HICCUP_SECONDS),  # upstream: matchmaking_time
        average_state_every=_average_state_every(settings),
        use_local_updates=local,
        delay_optimizer_step=delays,
        delay_grad_averaging=settings["delay_grad_averaging"] and not auxiliary,
        delay_state_averaging=settings["delay_state_averaging"] or delays or local,  # hivemind insists on the second
        # A step in the background works on a copy of the parameters; hivemind refuses to make it on those in use.
        offload_optimizer=offload_optimizer or delays,
        grad_compression=CODECS[settings["grad_compression"]],
        state_averaging_compression=CODECS[settings["state_compression"]],
        # averager_opts reach only the averager of parameters (optim/optimizer.py:263), so gradients get theirs here.
        # Nobody has to download other peers' gradients: upstream offers them to newcomers beside the state.
        grad_averager_factory=None
        if local
        else partial(
            Averager,
            allow_state_sharing=False,
            lag=int(settings["delay_grad_averaging"]),
            **averager_options,
        ),
        averager_opts=dict(averager_options, lag=1, allow_state_sharing=None if has_state else False),
        tracker_opts=dict(
            metadata_expiration=settings["metadata_expiration"],
            private_key=peer.private_key,
            lag=int(settings["delay_grad_averaging"] or local),
            # Late news of the end of a step have to come before the others have lost their patience.
            max_refresh_period=news_seconds,
            default_refresh_period=news_seconds,
        ),
        client_mode=peer.client_mode,
        auxiliary=auxiliary,
    )
    swarm_optimizer.share_state_memory()
    give_back_freed_memory()
    return swarm_optimizer


def _optimizer_of(settings: Mapping[str, Any], groups: ParamGroups) -> torch.optim.Optimizer:
    inner = OPTIMIZERS[settings["optimizer"]](
        groups,
        lr=settings["learning_rate"],
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
        eps=settings["adam_epsilon"],
    )
    if isinstance(inner, torch.optim.AdamW):
        inner.register_load_state_dict_pre_hook(float32_state)
    return inner


def _average_state_every(settings: Mapping[str, Any]) -> int:
    return 1 if settings["local_updates"] else int(settings["average_state_every"])


def _rollback_after(settings: Mapping[str, Any]) -> int:
    """What peers want of their losses is said in rounds of gradients, of which there are none with local updates."""
    return 0 if settings["local_updates"] else int(settings["rollback_after"])


def _schedule_of(settings: Mapping[str, Any]) -> Callable[[int], float]:
    floor = settings["min_learning_rate"] / settings["learning_rate"]
    return linear_schedule(settings["warmup_steps"], settings["max_global_steps"], floor)


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
    """Parameter groups in which biases and every normalisation layer, told by module type, have no weight decay.

    A normalisation layer is one of torch's, or a module whose class has Norm in its name and whose parameters are no
    matrices: most models of transformers define their own.
    """
    norms = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._NormBase)
    undecayed = {
        id(param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if isinstance(module, norms) or ("Norm" in type(module).__name__ and param.dim() < 2) or name.endswith("bias")
    }
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in params if id(param) not in undecayed], "weight_decay": weight_decay},
        {"params": [param for param in params if id(param) in undecayed], "weight_decay": 0.0},
    ]


def _request_timeout(matchmaking_time: float) -> float:
    """How long to wait for a leader's answer; has to be shorter than matchmaking_time (averaging/averager.py)."""
    return min(3.0, matchmaking_time / 2)
