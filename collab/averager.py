"""Averaging with others: hivemind's averagers, counted, bounded, and patient. Every peer has to use these very classes.

hivemind names its remote procedures after the averager's class, so a peer with another class finds no group. Each
override says which fault of hivemind 1.1.12 it repairs, so that it can go when upstream mends it.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.averaging.allreduce import AllReduceRunner, AveragingMode
from hivemind.averaging.control import StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.key_manager import GroupKeyManager
from hivemind.averaging.matchmaking import PotentialLeaders
from hivemind.averaging.partition import TensorPartReducer
from hivemind.compression import deserialize_torch_tensor
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.state_averager import TrainingStateAverager
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import MPFuture, get_dht_time
from hivemind.utils.asyncio import aiter_with_timeout, as_aiter, azip
from hivemind.utils.streaming import combine_from_streaming

logger = logging.getLogger(__name__)

LEADER_QUERY_SECONDS = 0.3
SERVING_SECONDS = 2.0
PROGRESS_SECONDS = 2.0
MEGABYTE = 10**6


@dataclass(frozen=True)
class RoundTally:
    """What one averaging round was, as this peer saw it. Bytes are payload: tensors and their headers."""

    peers: tuple[str, ...]
    """Peer ids of all that put in gradients, this one included."""
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
    rejected: tuple[str, ...]
    """Peer ids that sent NaN, infinite or negatively weighted parts; none of those went into the average."""


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
    """An all-reduce that counts its bytes, in both directions, and who was rejected."""

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
        return _CountingStub(super()._get_peer_stub(peer), self)

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

    async def tally(self, seconds: float) -> RoundTally:
        """The verdict, once the last results are on their way to the others."""
        try:
            await asyncio.wait_for(self._all_served.wait(), SERVING_SECONDS)
        except TimeoutError:
            logger.debug("Not all results could be handed out: %s", self._to_serve)
        container, reducer = self.tensor_part_container, self.tensor_part_reducer
        shares = [1.0 - container.failed_size / container.total_size]
        if reducer.num_parts and reducer.num_senders:
            shares.append(sum(reducer.num_parts_received) / (reducer.num_parts * reducer.num_senders))
        return RoundTally(
            peers=tuple(str(peer) for peer in self.sender_peer_ids),
            assistants=sum(mode == AveragingMode.AUX for mode in self.modes),
            samples=reducer.first_part_weight,
            parts=min(shares),
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            seconds=seconds,
            rejected=tuple(str(self.sender_peer_ids[index]) for index in sorted(reducer.rejected_senders)),
        )


class _CountingStub:
    def __init__(self, stub: Any, runner: CountingAllReduce) -> None:
        self._stub, self._runner = stub, runner

    async def rpc_aggregate_part(self, inputs: AsyncIterator[averaging_pb2.AveragingData]) -> Any:
        return self._runner._count_received(await self._stub.rpc_aggregate_part(inputs))


class _PacedKeyManager:
    """Asks the DHT for possible leaders no more often than every `LEADER_QUERY_SECONDS`."""

    def __init__(self, key_manager: GroupKeyManager) -> None:
        self._key_manager = key_manager
        self._last_query = -math.inf

    @property
    def current_key(self) -> Any:
        return self._key_manager.current_key

    async def get_averagers(self, *args: Any, **kwargs: Any) -> Any:
        pause = self._last_query + LEADER_QUERY_SECONDS - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        self._last_query = time.monotonic()
        return await self._key_manager.get_averagers(*args, **kwargs)


class _PatientLeaders(PotentialLeaders):
    """Upstream asks the DHT again and again without a pause while a peer looks for a group: two busy processes, up to
    a whole core (averaging/matchmaking.py, `_update_queue_periodically`)."""

    async def _update_queue_periodically(self, key_manager: GroupKeyManager) -> None:
        await super()._update_queue_periodically(_PacedKeyManager(key_manager))


class _PatientMatchmaking:
    """For averagers: looks for a group at a measured pace."""

    async def _step(self, **kwargs: Any) -> None:
        matchmaking = self._matchmaking  # type: ignore[attr-defined]  # made in the averager's own process
        if not isinstance(matchmaking.potential_leaders, _PatientLeaders):
            stock = matchmaking.potential_leaders
            matchmaking.potential_leaders = _PatientLeaders(
                stock.peer_id, stock.min_matchmaking_time, stock.target_group_size
            )
        await super()._step(**kwargs)  # type: ignore[misc]


class Averager(_PatientMatchmaking, GradientAverager):
    """Averages gradients. Its rounds return a `RoundTally`.

    - *Zero gradients.* The optimizer empties the accumulators as soon as a round begins, so a round that fails would go
      on with gradients of zero (optim/optimizer.py:529 and 611). A copy taken before the round is put back instead; it
      costs one more set of gradients in RAM.
    - *Uneven micro-batches.* Upstream divides the sum of gradients by the number of micro-batches times the size of
      the first one (optim/grad_averager.py:141, 215): right only if all have that size. Here it is the mean over
      samples.
    - *Auxiliary peers.* Upstream computes the peers' modes and does not pass them on (averaging/averager.py:549), so
      auxiliary peers send tensors of weight zero, and everybody's traffic grows.
    - *Weights.* See `Reducer`.

    :param max_weight: what one peer may count for at most in a round, in samples.
    """

    _before_round: list[torch.Tensor] | None = None

    def __init__(self, *args: Any, max_weight: float = math.inf, **kwargs: Any) -> None:
        self.max_weight = max_weight
        self._tally: RoundTally | None = None
        super().__init__(*args, **kwargs)

    def schedule_step(self, scheduled_time: float | None = None, **kwargs: Any) -> StepControl:
        """Begin to look for a group. An auxiliary peer plans to start later than the others: the peer with the earliest
        plan leads, and an auxiliary leader could begin with a single trainer while the others are on their way."""
        if self.mode == AveragingMode.AUX and scheduled_time is None:
            scheduled_time = get_dht_time() + 2 * self.matchmaking_kwargs["min_matchmaking_time"]
        return super().schedule_step(scheduled_time, **kwargs)

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

    async def _aggregate_with_group(self, group_info: GroupInfo, min_vector_size: int, **kwargs: Any) -> RoundTally:
        self._tally = None
        await super()._aggregate_with_group(group_info, min_vector_size, **kwargs)
        assert self._tally is not None
        return self._tally

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
        self._tally = await runner.tally(seconds=time.monotonic() - began)


class StateAverager(_PatientMatchmaking, TrainingStateAverager):
    """Averages parameters, and downloads the state of other peers with a sign of life."""

    def load_state_from_peers(self, **kwargs: Any) -> bool:
        """Take over the state of the most advanced peer that answers.

        :returns: whether a state was loaded. Upstream does not tell.
        """
        self._loaded = False
        super().load_state_from_peers(**kwargs)
        return self._loaded

    def _update_scheduler(self) -> None:
        self._loaded = True  # the last thing that upstream does when it has taken over a state
        super()._update_scheduler()

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

    def _donors(self) -> list[PeerID]:
        prefix = self._matchmaking.group_key_manager.prefix
        answer = self.dht.get(f"{prefix}.all_averagers", latest=True)
        entries = answer.value if answer is not None and isinstance(answer.value, dict) else {}
        priorities = {
            PeerID(peer): float(entry.value)
            for peer, entry in entries.items()
            if isinstance(entry.value, int | float) and PeerID(peer) != self.peer_id
        }
        return sorted(priorities, key=lambda peer: priorities[peer], reverse=True)

    async def _download(self, donor: PeerID, chunk_timeout: float) -> tuple[Any, list[torch.Tensor]] | None:
        stub = self.get_stub(self._p2p, donor, namespace=self.prefix)
        stream = await stub.rpc_download_state(averaging_pb2.DownloadRequest())
        metadata, received = None, 0
        tensors: list[torch.Tensor] = []
        parts: list[Any] = []
        began = last_word = time.monotonic()
        async for message in aiter_with_timeout(stream, timeout=chunk_timeout):
            if message.metadata:
                metadata = self.serializer.loads(message.metadata)
            if message.tensor_part.dtype and parts:  # a dtype marks the first part of the next tensor
                tensors.append(deserialize_torch_tensor(combine_from_streaming(parts)))
                parts = []
            parts.append(message.tensor_part)
            received += len(message.tensor_part.buffer)
            if time.monotonic() - last_word > PROGRESS_SECONDS:
                last_word = time.monotonic()
                logger.info("Downloading the state: %.1f MB in %.0f s", received / MEGABYTE, last_word - began)
        if parts:
            tensors.append(deserialize_torch_tensor(combine_from_streaming(parts)))
        if metadata is None:
            return None  # it shares no state
        logger.info(
            "Took over the state of peer %s: %.1f MB in %.1f s",
            str(donor)[-6:], received / MEGABYTE, time.monotonic() - began,
        )  # fmt: skip
        return metadata, tensors
