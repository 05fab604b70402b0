"""Averaging with others: hivemind's averagers, counted, bounded, and patient. Every peer has to use these very classes.

hivemind names its remote procedures after the averager's class, so a peer with another class finds no group. Each
override says which fault of hivemind 1.1.12 it repairs, so that it can go when upstream mends it.
"""

import asyncio
import contextlib
import logging
import math
import multiprocessing
import time
import typing
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import InvalidStateError
from dataclasses import dataclass, replace
from itertools import compress, repeat
from typing import Any, TypeGuard

import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllreduceException, AllReduceRunner, AveragingMode
from hivemind.averaging.control import StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.partition import TensorPartReducer
from hivemind.compression import deserialize_torch_tensor
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.state_averager import TrainingStateAverager
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import MPFuture
from hivemind.utils.asyncio import aiter_with_timeout, as_aiter, azip
from hivemind.utils.streaming import combine_from_streaming

from collab.agreement import SKETCH_SIZE, TOLERANCE, strays
from collab.link import allreduce_limit, settle_claims, silence_limit
from collab.matchmaking import SwarmMatchmaking
from collab.memory import give_back_freed_memory
from collab.schedules import ReplayedSchedule

logger = logging.getLogger(__name__)

SERVING_SECONDS = 2.0
PROGRESS_SECONDS = 2.0
SNAPSHOT_STEPS = 5  # how old a state may be that is handed out because it is in memory
MEGABYTE = 10**6
FLOAT_BYTES = 4
LONGEST_PEER_ID = 128
MOST_COPIES, STATE_EXTRAS = 8, 64 * MEGABYTE  # a state has the parameters, two moments of them, and little else


@dataclass(frozen=True)
class RoundTally:
    """What one averaging round was, as this peer saw it. Bytes are payload: tensors and their headers."""

    peers: tuple[str, ...]
    """Peer ids of all that put in gradients, this one included."""
    expected: int
    """Peers that should have been in the group with their gradients, this one included."""
    assistants: int
    """Auxiliary peers in the group: they average, but put in nothing."""
    samples: float
    """Sum of the weights that this peer's part of the average was made of; 0 if it averaged nothing itself."""
    parts: float
    """Share of all tensor parts that were averaged as they should; what is missing is this peer's own value."""
    bytes_sent: int
    bytes_received: int
    seconds: float
    """From the moment when the group was there to the averaged tensors."""
    busy_seconds: float
    """The same, and until the others too had got what this peer averaged: all counted bytes travelled in this time."""
    rejected: tuple[str, ...]
    """Peer ids that sent NaN, infinite or negatively weighted parts; none of those went into the average."""
    wishes: tuple[object, ...] = ()
    """What each trainer in the group says of its loss, see `spikes.step_to_go_back_to`; the same on all of them."""
    strays: tuple[str, ...] = ()
    """Peer ids of those with another model than most of the group, if this peer was apart from some of it before."""
    sound: tuple[str, ...] = ()
    """Then: of those who have the model of most."""


class Reducer(TensorPartReducer):
    """Averages the parts that this peer is responsible for, and trusts no sender.

    Upstream multiplies with whatever weight a sender declares, lets NaN through, and divides 0 by 0 if all weights are
    zero (averaging/partition.py).

    :param max_weight: what one peer may count for at most, in samples.
    """

    def __init__(self, part_shapes: Sequence[torch.Size], num_senders: int, max_weight: float) -> None:
        self.denominator: float = 0.0
        super().__init__(part_shapes, num_senders)
        self.max_weight = max_weight
        self.rejected_senders: set[int] = set()
        self.first_part_weight = 0.0

    async def accumulate_part(
        self, sender_index: int, part_index: int, tensor_part: torch.Tensor, weight: float = 1.0
    ) -> torch.Tensor:
        """Add a part that a sender gave; returns the average when all have given theirs."""
        if not (math.isfinite(weight) and weight >= 0 and bool(tensor_part.isfinite().all())):
            self.rejected_senders.add(sender_index)
            tensor_part, weight = torch.zeros_like(tensor_part), 0.0
        weight = min(weight, self.max_weight)
        if part_index == 0:
            self.first_part_weight += weight
        return await super().accumulate_part(sender_index, part_index, tensor_part, weight=weight)

    def check_current_part_finished(self) -> None:
        if self.denominator == 0 and self.current_part_accumulated_from == self.num_current_senders:
            self.denominator = 1.0  # nobody put in anything: the average is zero, not 0 / 0
        super().check_current_part_finished()


class CountingAllReduce(AllReduceRunner):
    """An all-reduce that counts its bytes, in both directions, and who was rejected.

    Upstream lets everybody with no share of the work send all it has before it receives anything. It means peers that
    accept no connections (averaging/allreduce.py), but it also slows down whoever has a link too slow for a share. With
    one peer of three behind 20 Mbit/s, a round with shares by the links took 31.7 s, longer than with equal ones; now
    it takes 24.6 s.
    """

    def __init__(self, *, max_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bytes_sent = self.bytes_received = 0
        stock: TensorPartReducer = self.tensor_part_reducer
        stock.finished.set()  # it is not used; else it would warn that it received nothing
        self.tensor_part_reducer: Reducer = Reducer(
            tuple(part.shape for part in self.parts_for_local_averaging), len(self.sender_peer_ids), max_weight
        )
        self._to_serve = {peer for peer in self.sender_peer_ids if peer != self.peer_id}
        self._all_served = asyncio.Event()
        if not self._to_serve or not self.parts_for_local_averaging:
            self._all_served.set()

    def should_delay_results(self, peer_id: PeerID) -> bool:
        """Whether this peer sends all it has before it receives anything."""
        return self.modes[self.ordered_peer_ids.index(peer_id)] == AveragingMode.CLIENT

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        try:
            await super()._communicate_with_peer(peer_id)
        except Exception as error:
            logger.warning("Parts of the average were lost, peer %s: %s", str(peer_id)[-6:], error or repr(error))
            raise

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for message in super()._generate_input_for_peer(peer_index):
            self.bytes_sent += message.ByteSize()
            yield message

    async def _count_received(
        self, stream: AsyncIterator[averaging_pb2.AveragingData]
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for message in stream:
            self.bytes_received += message.ByteSize()
            yield message

    def _get_peer_stub(self, peer: PeerID) -> Any:
        parts = self.tensor_part_container.num_parts_by_peer[self.ordered_peer_ids.index(peer)]
        return _CountingStub(super()._get_peer_stub(peer), self, parts)

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        try:
            async for message in super().rpc_aggregate_part(self._count_received(stream), context):
                self.bytes_sent += message.ByteSize()
                yield message
        finally:
            self._to_serve.discard(context.remote_id)
            if not self._to_serve:
                self._all_served.set()
        # What was sent last can get lost if this side closes the stream (seen in 1 of 200 rounds). The receiver closes
        # it when it has all parts, and that ends the wait.
        await asyncio.sleep(SERVING_SECONDS)

    async def tally(self, expected: int, began: float) -> RoundTally:
        """The verdict, once the last results are on their way to the others."""
        seconds = time.monotonic() - began
        try:
            await asyncio.wait_for(self._all_served.wait(), SERVING_SECONDS)
        except TimeoutError:
            logger.debug("Not all results could be handed out: %s", self._to_serve)
        busy_seconds = time.monotonic() - began
        container, reducer = self.tensor_part_container, self.tensor_part_reducer
        shares = [1.0 - container.failed_size / container.total_size]
        if reducer.num_parts and reducer.num_senders:
            shares.append(sum(reducer.num_parts_received) / (reducer.num_parts * reducer.num_senders))
        return RoundTally(
            peers=tuple(str(peer) for peer in self.sender_peer_ids),
            expected=expected,
            assistants=sum(mode == AveragingMode.AUX for mode in self.modes),
            samples=reducer.first_part_weight,
            parts=min(shares),
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            seconds=seconds,
            busy_seconds=busy_seconds,
            rejected=tuple(str(self.sender_peer_ids[index]) for index in sorted(reducer.rejected_senders)),
        )


class _CountingStub:
    """Counts what a reducer answers, and closes the stream when its `parts` averaged parts are there."""

    def __init__(self, stub: Any, runner: CountingAllReduce, parts: int) -> None:
        self._stub, self._runner, self._parts = stub, runner, parts

    async def rpc_aggregate_part(self, inputs: AsyncIterator[averaging_pb2.AveragingData]) -> Any:
        return self._take(await self._stub.rpc_aggregate_part(inputs))

    async def _take(self, stream: Any) -> AsyncIterator[averaging_pb2.AveragingData]:
        left = self._parts
        async for message in self._runner._count_received(stream):
            yield message
            left -= 1
            if not left:
                await stream.aclose()
                return


class _MeetsTheSwarm(DecentralizedAverager):
    """For averagers: makes groups by `SwarmMatchmaking`, and all-reduces that know who is an auxiliary peer.

    Upstream computes the peers' modes and does not pass them on (averaging/averager.py:549), so auxiliary peers send
    tensors of weight zero, and everybody's traffic grows.

    :param progress_key: DHT key of the peers' progress records.
    :param lag: see `draw_up_roster`.
    :param max_weight: what one peer may count for at most in a round.
    """

    def __init__(self, *args: Any, progress_key: str, lag: int, max_weight: float = math.inf, **kwargs: Any) -> None:
        self._matchmaking: Any  # exists in the averager's own process
        self._progress_key, self._lag = progress_key, lag
        self._max_weight = multiprocessing.RawValue("d", max_weight)  # rounds run in a process of their own
        self._tally: RoundTally | None = None
        self._steps: dict[asyncio.Task[Any], StepControl] = {}
        super().__init__(*args, **kwargs)

    @property
    def max_weight(self) -> float:
        """What one peer may count for at most in a round, in samples."""
        return float(self._max_weight.value)

    @max_weight.setter
    def max_weight(self, samples: float) -> None:
        self._max_weight.value = samples

    def run_in_background(self, *args: Any, **kwargs: Any) -> None:
        """Fork the averager's process, with nothing of this one's that it does not need."""
        give_back_freed_memory()
        super().run_in_background(*args, **kwargs)

    async def _step(self, *, step: StepControl, **kwargs: Any) -> None:
        # Upstream repeats a failed all-reduce with tensors that are half averaged already, and one that cannot succeed
        # any more, because the others have gone on, some 200 times a second (averaging/averager.py, `_step`).
        step._allow_retries = False
        if not isinstance(self._matchmaking, SwarmMatchmaking):
            self._matchmaking = SwarmMatchmaking(
                self._p2p,
                self.schema_hash,
                self.dht,
                client_mode=self.client_mode,
                auxiliary=self.mode == AveragingMode.AUX,
                progress_key=self._progress_key,
                longest_wait=self.matchmaking_kwargs["min_matchmaking_time"],
                lag=self._lag,
                **self.matchmaking_kwargs,
            )
        task = asyncio.current_task()
        assert task is not None
        self._steps[task] = step
        try:
            await super()._step(step=step, **kwargs)
        finally:
            del self._steps[task]
            give_back_freed_memory()

    async def _shutdown(self, timeout: float | None) -> None:
        """End the rounds that still run.

        Upstream calls a method that they do not have, so that this process ends in the middle of an all-reduce, with
        the lock on the tensors; and who waits for them never ends (averaging/averager.py, `_shutdown`).
        """
        for task, step in self._steps.items():
            with contextlib.suppress(InvalidStateError):  # whoever waits for it has called it off a moment ago
                step.cancel()
            task.cancel()
        if self._steps:
            await asyncio.wait(set(self._steps), timeout=timeout)
        await super()._shutdown(timeout)

    async def _aggregate_with_group(self, group_info: GroupInfo, min_vector_size: int, **kwargs: Any) -> Any:
        """Shares of the work and waiting times follow from the links of the peers in the group."""
        said = [self.serializer.loads(data) for data in group_info.gathered]
        claims = [claim for claim, _mode, _user_data in said]
        of_reducers = [None if mode == AveragingMode.CLIENT.value else claim for claim, mode, _user_data in said]
        gathered = tuple(
            self.serializer.dumps([mbits, mode, user_data])
            for mbits, (_claim, mode, user_data) in zip(settle_claims(of_reducers), said, strict=True)
        )
        if kwargs["sender_timeout"] is not None:
            limit = silence_limit(claims, kwargs["part_size_bytes"], at_most=kwargs["sender_timeout"])
            kwargs |= {"sender_timeout": limit, "reducer_timeout": 2 * limit}
        group_info = replace(group_info, gathered=gathered)
        seconds = allreduce_limit(claims, FLOAT_BYTES * self.total_size, at_most=self._allreduce_timeout or math.inf)
        try:
            async with asyncio.timeout(seconds if math.isfinite(seconds) else None):
                return await super()._aggregate_with_group(group_info, min_vector_size, **kwargs)
        except TimeoutError:
            raise AllreduceException(f"the all-reduce took longer than {seconds:.0f} s") from None

    async def _run_allreduce_inplace_(
        self, tensors: Sequence[torch.Tensor], group_info: GroupInfo, group_id: bytes | None = None, **kwargs: Any
    ) -> None:
        group_id = group_info.group_id if group_id is None else group_id
        modes = tuple(AveragingMode(self.serializer.loads(data)[1]) for data in group_info.gathered)
        began = time.monotonic()
        runner = CountingAllReduce(
            max_weight=self.max_weight,
            p2p=self._p2p,
            servicer_type=type(self),
            prefix=self.prefix,
            tensors=tensors,
            group_id=group_id,
            ordered_peer_ids=group_info.peer_ids,
            modes=modes,
            **kwargs,
        )
        self._running_groups[group_id].set_result(runner)
        if self.mode == AveragingMode.AUX:
            async for _ in runner:
                raise ValueError("an auxiliary peer should not receive averaged tensors")
        else:
            async for tensor, update in azip(as_aiter(*tensors), runner):
                tensor.add_(update, alpha=self._averaging_alpha)
        trainers = self._matchmaking.roster.trainers
        self._tally = await runner.tally(expected=len(trainers) + (self.mode != AveragingMode.AUX), began=began)


class Averager(_MeetsTheSwarm, GradientAverager):
    """Averages gradients. Its rounds return a `RoundTally`.

    - *Zero gradients.* The optimizer empties the accumulators as soon as a round begins, so a round that fails would go
      on with gradients of zero (optim/optimizer.py:529 and 611). Here the round keeps the accumulators until it is over
      (`end_round`), and later gradients, if there are any meanwhile, get new ones.
    - *Copies.* Upstream has accumulators and gradients of zero when it forks the averager's process, which keeps a copy
      of both for ever. Here they are made later.
    - *Uneven micro-batches.* Upstream divides the sum of gradients by the number of micro-batches times the size of
      the first one (optim/grad_averager.py:141, 215): right only if all have that size. Here it is their weighted
      mean, by samples or by what `weight` says.
    - *Retries.* A round is tried once; `retry` starts from what this peer gave to it.
    """

    _before_round: Sequence[torch.Tensor] | None = None
    """The accumulators as they were when the round began, while it goes on."""
    _before_round_scale = 0.0
    round_number = 0
    """The global step that the next round is for."""
    call_seconds: float | None = None
    """How long a micro-batch takes this peer, if it is known: the others wait accordingly."""
    wish: int | None = None
    """What this peer says of its loss, see `spikes.step_to_go_back_to`."""
    sketch: Sequence[float] | None = None
    """`agreement.sketch` of the weights before the next round; None where peers need not have the same."""
    _last_group: tuple[int, frozenset[str]] = -1, frozenset()
    """The latest round and who was in it. In the averager's own process."""
    weight: float | None = None
    """Of the next micro-batch among those of this peer; None: its samples."""
    _accumulated_weight = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._local_accumulators: Sequence[torch.Tensor] | None
        start = kwargs.pop("start")
        super().__init__(*args, start=False, **kwargs)
        if start:
            self.run_in_background()

    def run_in_background(self, *args: Any, **kwargs: Any) -> None:
        """Fork the averager's process, to which no gradients belong but the averaged ones."""
        self._local_accumulators = None
        for param in self.parameters:
            param.grad = None
        super().run_in_background(*args, **kwargs)

    def schedule_step(self, scheduled_time: float | None = None, **kwargs: Any) -> StepControl:
        """Begin to look for the group that makes global step `round_number`."""
        said = [self.round_number, self.call_seconds, self.wish, self.sketch]
        return super().schedule_step(scheduled_time, gather=said, **kwargs)

    def retry(self, weight: float, timeout: float) -> StepControl:
        """Begin the round anew with what this peer put into it before. The accumulators may hold later gradients."""
        control = self.schedule_step(timeout=timeout)
        self.restore_own_gradient()
        control.weight = weight
        control.allow_allreduce()
        return control

    def _grad_accumulators(self) -> Sequence[torch.Tensor]:
        if self._local_accumulators is None:
            self._local_accumulators = [torch.zeros_like(param) for param in self.parameters]
        return self._local_accumulators

    @torch.no_grad()
    def accumulate_grads_(self, batch_size: int) -> None:
        """Add the parameters' gradients, those of a micro-batch with so many samples."""
        weight = batch_size if self.weight is None else self.weight
        self.local_samples_accumulated += batch_size
        self._accumulated_weight += weight
        for accumulator, gradient in zip(self._grad_accumulators(), self._grads_from_parameters(), strict=True):
            accumulator.add_(gradient.to(accumulator.device), alpha=weight)

    def _scale(self) -> float:
        return 1 / (self._accumulated_weight or 1.0)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Begin the round; `end_round` has to follow."""
        self._before_round, self._before_round_scale = self._local_accumulators or [], self._scale()
        return super().step(*args, **kwargs)

    def end_round(self) -> None:
        """Forget what this peer gave to the round: it will not be tried again."""
        self._before_round = None

    @torch.no_grad()
    def reset_accumulated_grads_(self) -> None:
        """Begin to accumulate anew, from zero."""
        self.local_samples_accumulated = 0
        self._accumulated_weight = 0.0
        self._local_accumulators = None

    def restore_own_gradient(self) -> None:
        """Put what this peer gave to the round back where the average was to be."""
        assert self._before_round is not None, "there is no round"
        self._put_in(self._before_round, self._before_round_scale)

    def load_accumulators_into_averager_(self) -> None:
        """Put this peer's mean gradient where the average will be; without samples it is zero."""
        self._put_in(self._local_accumulators or [], self._scale())

    @torch.no_grad()
    def _put_in(self, accumulators: Sequence[torch.Tensor], scale: float) -> None:
        with self.get_tensors() as tensors:
            for tensor, accumulator in zip(tensors, accumulators or repeat(torch.zeros(())), strict=False):
                tensor.copy_(accumulator).mul_(scale)

    async def _aggregate_with_group(self, group_info: GroupInfo, min_vector_size: int, **kwargs: Any) -> RoundTally:
        self._tally = None
        modes, said = zip(*(self.serializer.loads(data)[1:3] for data in group_info.gathered), strict=True)
        told = dict(zip(group_info.peer_ids, (_four_things(self.serializer.loads(data)) for data in said), strict=True))
        self._matchmaking.call_seconds = {peer: call_seconds for peer, (_round, call_seconds, *_) in told.items()}
        of_trainers = {
            str(peer): told[peer]
            for peer, mode in zip(group_info.peer_ids, modes, strict=True)
            if mode != AveragingMode.AUX.value
        }
        number, *_ = told[self.peer_id]
        sketches = {peer: sketch for peer, (*_, sketch) in of_trainers.items()}
        astray = self._strays(number, sketches)
        sound = {peer for peer, sketch in sketches.items() if astray and _is_sketch(sketch)} - astray
        if str(self.peer_id) in astray:
            kwargs["weight"] = 0.0
        await super()._aggregate_with_group(group_info, min_vector_size, **kwargs)
        self._remember(number, sketches)
        assert self._tally is not None
        wishes = tuple(wish for (_round, _seconds, wish, _sketch) in of_trainers.values())
        return replace(self._tally, wishes=wishes, strays=tuple(astray), sound=tuple(sound))

    def _strays(self, number: int, told: dict[str, object]) -> set[str]:
        """Whose model is another one than most of the group's.

        Parts of a swarm that were apart may meet at the same global step, where nobody is behind: each would go on with
        its own weights and everybody's gradients. Who was in the last round with all of them is no concern of this one:
        what drifts apart slowly is watched by `ModelWatch`. Those who had just taken over a state then could not be
        compared, and are now.
        """
        last_round, last_group = self._last_group
        if last_round >= number - 1 and last_group >= told.keys():
            return set()
        return strays({peer: sketch for peer, sketch in told.items() if _is_sketch(sketch)}, TOLERANCE)

    def _remember(self, number: int, told: dict[str, object]) -> None:
        """A round has come about: with whom it was is known in the next one."""
        compared = {peer for peer, sketch in told.items() if _is_sketch(sketch)}
        # what this peer has taken over itself is the others' model
        self._last_group = number, frozenset(compared if str(self.peer_id) in compared else told)


def _is_sketch(said: object) -> TypeGuard[Sequence[float]]:
    return (
        isinstance(said, list | tuple)
        and len(said) == SKETCH_SIZE
        and all(isinstance(value, float) and math.isfinite(value) for value in said)
    )


def _four_things(said: object) -> Sequence[Any]:
    """What a peer tells the group in `schedule_step`; a stranger may say anything."""
    return said if isinstance(said, list | tuple) and len(said) == 4 else (None, None, None, None)


class Gathered(dict[PeerID, Any]):
    """What the peers of a round of parameters have said, as upstream returns it, and what the round was."""

    tally: RoundTally


class _Snapshot(list[torch.Tensor]):
    """The tensors of a state as it was at one moment."""

    priority = -math.inf
    """Of the state, when it was taken."""


class StateAverager(_MeetsTheSwarm, TrainingStateAverager):
    """Averages parameters, and hands out and downloads states, with one extra copy of the state in memory at most.

    Upstream hands out live tensors of a CPU peer, so that a newcomer gets some from before a step and others from after
    it; and it copies those of a GPU anew for each newcomer (optim/state_averager.py, `get_current_state`). Here all
    newcomers who come while a copy is being sent get that one. Upstream's thread also holds on to what it has fetched
    until it is asked again (averaging/averager.py, `_background_thread_fetch_current_state`): so it is, for nothing.
    """

    _newest: Callable[[], _Snapshot | None] = staticmethod(lambda: None)  # a weak reference
    _taking: asyncio.Lock | None = None  # both exist in the averager's own process
    doubtful: frozenset[str] = frozenset()
    """Peer ids whose state is not to be taken over."""
    trusted: frozenset[str] = frozenset()
    """If there are any: the only peers whose state is to be taken over."""
    held_step: int | None = None
    """For auxiliary peers: the global step of the state that they hold, which the swarm may have left behind. Trainers
    offer their current state."""
    went_back_at = 0
    """The global step at which this peer went back to earlier weights, the latest one."""
    local_epoch: int
    _taking_over = False
    steps_in_flight = 0
    """Global steps that a peer has counted, but not made yet: so far a state may lie behind this peer's own count."""
    not_before = 0
    """States are not taken over from peers that have not gone back at this global step or a later one."""
    last_step: float = math.inf
    """There is no state of a later global step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._empty = multiprocessing.RawValue("b", False)  # whether the next state that is fetched is to be empty
        self._donor = multiprocessing.RawArray("c", LONGEST_PEER_ID)  # whose state was downloaded last
        super().__init__(*args, **kwargs)

    def load_state_from_peers(self, **kwargs: Any) -> bool:
        """Take over the state of the most advanced peer that answers.

        :returns: whether a state was loaded. Upstream does not tell.
        """
        self._loaded, self._taking_over = False, True
        known = self.local_epoch
        self.local_epoch = max(0, known - self.steps_in_flight)
        # A call that the averager's process makes.
        self._outer_pipe.send(("_pass_over", [self.doubtful, self.trusted, self.not_before, self.last_step], {}))
        try:
            super().load_state_from_peers(**kwargs)
        except Exception as error:  # noqa: BLE001 - too slow, or no state of this model; it must not end the training
            logger.warning("A state could not be taken over: %s", str(error) or type(error).__name__)
        self._taking_over = False
        if not self._loaded:
            self.local_epoch = known
        return self._loaded

    async def _pass_over(
        self, doubtful: frozenset[str], trusted: frozenset[str], not_before: int, last_step: float
    ) -> None:
        self.doubtful, self.trusted, self.not_before, self.last_step = doubtful, trusted, not_before, last_step

    @property
    def donor(self) -> str:
        """The peer whose state was downloaded last; empty before that."""
        return self._donor.value.decode()

    def step(self, **kwargs: Any) -> Any:
        """Upstream's, but for steps of this peer alone (local updates): they are made here, at once.

        Upstream makes each of them wait for the averaging that goes on in the background, because a condition is
        the wrong way round (`should_wait`, optim/state_averager.py:370), and leaves a lone peer's schedule where it is.
        """
        if not (self.delta_rule_averaging and kwargs.get("optimizer_step")) or kwargs.get("averaging_round"):
            return super().step(**kwargs)
        super().step(apply_delayed_updates=True)
        with self.lock_optimizer:
            self._update_scheduler()
            self.optimizer.step()

    def _load_local_tensors_into_averager_(self) -> None:
        with self.lock_optimizer:  # not in the middle of a step
            super()._load_local_tensors_into_averager_()

    def _apply_averaging_results_(self) -> None:
        with self.lock_optimizer:  # a newcomer downloads nothing half applied
            super()._apply_averaging_results_()

    async def _aggregate_with_group(self, group_info: GroupInfo, min_vector_size: int, **kwargs: Any) -> Gathered:
        gathered = Gathered(await super()._aggregate_with_group(group_info, min_vector_size, **kwargs))
        modes, said = zip(*(self.serializer.loads(data)[1:3] for data in group_info.gathered), strict=True)
        trained = [min(_samples(self.serializer.loads(data)), self.max_weight) for data in said]
        trainers = [mode != AveragingMode.AUX.value for mode in modes]
        assert self._tally is not None
        gathered.tally = replace(self._tally, samples=float(sum(compress(trained, trainers))))
        return gathered

    def hold_state(self, step: int) -> None:
        """Offer the state as it is now to newcomers whom no trainer answers, from now on and whatever comes.

        :param step: the global step that it is of.
        """
        self.held_step = step
        self.allow_state_sharing = True
        self.state_sharing_priority = self.held_step

    @property
    def state_sharing_priority(self) -> float:
        """Newcomers ask those first who have the highest: the global step; of equals, a trainer."""
        return float(TrainingStateAverager.state_sharing_priority.fget(self))

    @state_sharing_priority.setter
    def state_sharing_priority(self, value: float) -> None:
        held = value if self.held_step is None else self.held_step - 0.5
        TrainingStateAverager.state_sharing_priority.fset(self, held)

    def get_current_state(self) -> tuple[dict[str, Any], list[torch.Tensor], list[Any]]:
        """What a newcomer downloads: metadata with the global step, tensors, and what kind each of them is."""
        if self._empty.value:
            return {}, [], []
        with self.lock_optimizer:  # not in the middle of a step; the locks in the order in which `_do` takes them
            metadata, live, infos = super().get_current_state()
            metadata["went_back_at"] = self.went_back_at
            # Upstream counts a global step when its round begins; the schedule has counted those that are made.
            metadata["epoch"] = self.scheduler._step_count - 1
            with torch.no_grad(), self.lock_averaged_tensors:
                tensors = [torch.empty_like(tensor).share_memory_().copy_(tensor) for tensor in live]
        if self.held_step is not None:
            metadata["epoch"] = self.held_step
        return metadata, tensors, infos

    async def rpc_download_state(
        self, request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> "typing.AsyncIterator[averaging_pb2.DownloadData]":  # hivemind knows no other stream by its hint
        sent = self._newest()
        if sent is not None and self.state_sharing_priority > sent.priority + SNAPSHOT_STEPS:
            logger.info("A newcomer is sent to somebody else: an old state is still on its way to another one")
            return
        del sent
        async for message in super().rpc_download_state(request, context):
            yield message

    async def _get_current_state_from_host_process(self) -> tuple[Any, _Snapshot, Any]:
        self._taking = self._taking or asyncio.Lock()
        async with self._taking:
            snapshot = self._newest()
            if snapshot is None:
                priority = self.state_sharing_priority
                self._metadata, tensors, self._infos = await super()._get_current_state_from_host_process()
                self._empty.value = True
                try:
                    await super()._get_current_state_from_host_process()
                finally:
                    self._empty.value = False
                snapshot = _Snapshot(tensors)
                snapshot.priority = priority
                self._newest = weakref.ref(snapshot)
            return self._metadata, snapshot, self._infos

    def _update_scheduler(self) -> None:
        self._loaded = True  # the last thing that upstream does when it has taken over a state
        if self._taking_over:
            self.start_schedule_over()
        super()._update_scheduler()

    def start_schedule_over(self) -> None:
        """Let the next update of the schedule begin at global step 0, after other rates were loaded.

        The schedule of the run's settings need not: it has a closed form.
        """
        if isinstance(self.scheduler, ReplayedSchedule):
            self.scheduler.start_over()

    async def _load_state_from_peers(self, future: MPFuture, timeout: float | None = None) -> None:
        """Runs in the averager's process. Tries one donor after the other, the most advanced first."""
        chunk_timeout = self.next_chunk_timeout or self.request_timeout
        result = None
        try:
            for donor in self._donors():
                began = time.monotonic()
                try:
                    result = await self._download(donor, chunk_timeout)
                except Exception as error:  # noqa: BLE001 - a donor may fail in any way; the next one may not
                    logger.warning(
                        "No state from peer %s after %.0f s: %s", str(donor)[-6:], time.monotonic() - began,
                        str(error) or type(error).__name__,
                    )  # fmt: skip
                if result is not None:
                    return
        finally:
            future.set_result(result)
            del result
            give_back_freed_memory()

    def _donors(self) -> list[PeerID]:
        prefix = self._matchmaking.group_key_manager.prefix
        answer = self.dht.get(f"{prefix}.all_averagers", latest=True)
        entries = answer.value if answer is not None and isinstance(answer.value, dict) else {}
        priorities = {
            PeerID(peer): float(entry.value)
            for peer, entry in entries.items()
            if isinstance(entry.value, int | float) and str(PeerID(peer)) not in {str(self.peer_id), *self.doubtful}
        }
        donors = [peer for peer in priorities if not self.trusted or str(peer) in self.trusted]
        return sorted(donors, key=lambda peer: priorities[peer], reverse=True)

    async def _download(self, donor: PeerID, chunk_timeout: float) -> tuple[Any, list[torch.Tensor]] | None:
        stub = self.get_stub(self._p2p, donor, namespace=self.prefix)
        stream = await stub.rpc_download_state(averaging_pb2.DownloadRequest())
        metadata, received = None, 0
        most = MOST_COPIES * sum(tensor.nbytes for tensor in self._averaged_tensors) + STATE_EXTRAS
        tensors: list[torch.Tensor] = []
        parts: list[Any] = []
        began = last_word = time.monotonic()
        async for message in aiter_with_timeout(stream, timeout=chunk_timeout):
            if message.metadata:
                metadata = self.serializer.loads(message.metadata)
                if metadata.get("went_back_at", 0) < self.not_before:
                    raise ValueError("its weights are those that the swarm has left")
                if not metadata["epoch"] <= self.last_step:
                    raise ValueError(f"it says that it is of global step {metadata['epoch']}, after the run's end")
            if message.tensor_part.dtype and parts:  # a dtype marks the first part of the next tensor
                tensors.append(self._sound(_whole(parts), len(tensors)))
                parts.clear()
            parts.append(message.tensor_part)
            received += len(message.tensor_part.buffer)
            if received > most:
                raise ValueError(f"it sent over {most / MEGABYTE:.0f} MB, more than any state of this model has")
            if time.monotonic() - last_word > PROGRESS_SECONDS:
                last_word = time.monotonic()
                logger.info("Downloading the state: %.1f MB in %.0f s", received / MEGABYTE, last_word - began)
        if parts:
            tensors.append(self._sound(_whole(parts), len(tensors)))
        if metadata is None:
            return None  # it shares no state
        if len(tensors) < len(self._averaged_tensors):
            raise ValueError("it is a part of a state")
        self._donor.value = str(donor).encode()
        logger.info(
            "Took over the state of peer %s: %.1f MB in %.1f s",
            str(donor)[-6:], received / MEGABYTE, time.monotonic() - began,
        )  # fmt: skip
        return metadata, tensors

    def _sound(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """The tensor, if a model like this one can be trained from it. Upstream copies whatever comes, and stretches a
        tensor of another shape."""
        ours = self._averaged_tensors  # the parameters, which come first in a state
        if index < len(ours) and tensor.shape != ours[index].shape:
            raise ValueError("it is the state of another model")
        if not tensor.isfinite().all():
            raise ValueError("there are NaN or infinite values in it")
        return tensor


def _samples(said: object) -> float:
    """With local updates, what a peer says that it has trained on since the last round; strangers may say anything."""
    match said:
        case [int(), int() | float() as samples] if samples >= 0 and math.isfinite(samples):
            return float(samples)
    return 0.0


def _whole(parts: list[Any]) -> torch.Tensor:
    """The tensor that came in parts, in the memory in which the trainer's process gets it."""
    return deserialize_torch_tensor(combine_from_streaming(parts)).share_memory_()
