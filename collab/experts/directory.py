"""Which experts there are now, how fast they answer, and a way to call each of them."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.moe.client.expert import RemoteExpert, expert_backward, expert_forward
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.moe.expert_uid import ExpertInfo
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils import MSGPackSerializer

from collab.background import Background
from collab.experts.mixture import Expert
from collab.experts.plan import ExpertPlan, holders, hosted_in
from collab.metrics import ServerRecord, ask_for_servers, servers_in
from collab.peer import Peer
from collab.view import ExpertView

logger = logging.getLogger(__name__)

PERIOD = 2.0
LOOK_SECONDS = 15.0
PROBE_SECONDS = 3.0  # an expert answers in milliseconds
REFRESH_SECONDS = 10.0  # without a call that would show that it is there
NEWEST = 0.2  # weight of the last call in the mean of how long calls take


class Remote:
    """An expert on another peer: hivemind's `RemoteExpert`, with a time limit for each call and a memory of how it
    went. hivemind's own has none, and waits for ever for a server whose main process was killed."""

    is_near = False

    def __init__(self, plan: ExpertPlan, index: int, peer_id: str, p2p: P2P) -> None:
        self.index, self.peer_id = index, peer_id
        self.answered = 0.0
        """When it answered last, by the monotonic clock."""
        self.seconds = float("nan")
        """That a call takes, lately."""
        self._plan = plan
        self._expert = RemoteExpert(ExpertInfo(plan.uid(index), PeerID.from_base58(peer_id)), p2p)
        self._stub = self._expert.stub

    def submit(self, *tensors: torch.Tensor) -> "Future[torch.Tensor]":
        codec = self._plan.schema.compression
        sent = [serialize_torch_tensor(tensor, codec) for tensor in tensors]
        call = expert_forward if len(tensors) == 1 else expert_backward

        async def answer() -> torch.Tensor:
            began = time.monotonic()
            work = call(self._expert.uid, tensors, sent, self._stub)
            try:
                [output] = await asyncio.wait_for(work, self._plan.timeout)
            except TimeoutError:
                raise TimeoutError(f"no answer within {self._plan.timeout:.1f} seconds") from None
            self._note(began)
            return output

        future: Future[torch.Tensor] = RemoteExpertWorker.run_coroutine(answer(), return_future=True)
        return future

    async def probe(self) -> str:
        """Find out whether it answers and is one of this run; why not, or nothing."""
        began = time.monotonic()
        try:
            asked = self._stub.rpc_info(runtime_pb2.ExpertUID(uid=self._expert.uid))
            info = MSGPackSerializer.loads((await asyncio.wait_for(asked, PROBE_SECONDS)).serialized_info)
            schemas = info["forward_schema"], info["outputs_schema"]
        except TimeoutError:
            return f"no answer within {PROBE_SECONDS:.0f} seconds"
        except Exception as error:  # noqa: BLE001 - strangers answer whatever they like; the reason is told
            return str(error).strip() or type(error).__name__
        schema = self._plan.schema
        if schemas != (((schema,), {}), schema):
            return f"its tensors are {schemas[0]}, and this run's are {schema}"
        self._note(began)
        return ""

    def _note(self, began: float) -> None:
        took = time.monotonic() - began
        self.seconds = took if self.seconds != self.seconds else self.seconds + NEWEST * (took - self.seconds)
        self.answered = began


def start_calling() -> None:
    """Start hivemind's thread for calls; before the optimizer is made, whose tracker's event loop asyncio would forget:
    each start of uvloop replaces the policy that knows the threads' loops."""

    async def nothing() -> None:
        pass

    RemoteExpertWorker.run_coroutine(nothing())


class ExpertDirectory(Background):
    """The experts that can be called, in the background until `stop`.

    Servers tell what they serve in signed records (`collab.metrics.ServerRecord`); an expert counts as alive once it
    has answered a question. A server that fails a call is set aside with all of its experts, so that it costs one time
    limit and no more, until it answers again.

    :param lifetime: seconds for which a server's word counts: the run's `metadata_expiration`.
    :param near: the experts that this process serves itself, by their number: they are called without the network.
    """

    def __init__(
        self, peer: Peer, plan: ExpertPlan, run_id: str, lifetime: float, near: Mapping[int, Expert] | None = None
    ) -> None:
        super().__init__("Looking for experts", PERIOD)
        self.plan, self.calls_failed = plan, 0
        """Calls of this session that brought nothing."""
        self._peer, self._run_id, self._lifetime = peer, run_id, lifetime
        self._near = near or {}
        self._remotes: dict[int, Remote] = {}
        self._records: dict[int, ServerRecord] = {}
        self._set_aside: dict[str, float] = {}
        self._lock = threading.Lock()
        self._p2p: P2P = RemoteExpertWorker.run_coroutine(peer.dht.replicate_p2p())
        try:
            self._take_a_turn()  # the first batch shall find what is there
        except Exception as error:  # noqa: BLE001 - the next turn may go well
            self._note_failure(error)
        self.start()

    def stop(self, timeout: float = 1.0) -> None:
        super().stop(timeout)
        # in its own loop: left to the garbage collector, it would complain on the volunteer's screen
        with contextlib.suppress(TimeoutError):
            RemoteExpertWorker.run_coroutine(_close(self._p2p), return_future=True).result(timeout)

    def alive(self) -> Mapping[int, Expert]:
        """What can be called now, by its number in the run."""
        with self._lock:
            remote = {index: expert for index, expert in self._remotes.items() if self._is_well(expert)}
        return {**remote, **dict(self._near)}

    def failed(self, expert: Expert, reason: str) -> None:
        """Set its server aside until it answers again."""
        self.calls_failed += 1
        if not isinstance(expert, Remote):
            logger.warning("An expert of this computer failed: %s", reason)
            return
        with self._lock:
            was_well = self._is_well(expert)
            self._set_aside[expert.peer_id] = time.monotonic()
        if was_well:
            logger.info("The expert server %s is set aside: %s", expert.peer_id[-6:], reason)

    def views(self) -> list[ExpertView]:
        """All that are served, for people."""
        alive, found = self.alive(), []
        for index, record in self._records.items():
            hosted, expert = hosted_in(record, index), alive.get(index)
            answers = 1000 * expert.seconds if isinstance(expert, Remote) else None
            found.append(ExpertView(index, record.name, answers, hosted.rows_per_second, hosted.steps))
        return found

    def _is_well(self, expert: Remote) -> bool:
        return expert.answered > self._set_aside.get(expert.peer_id, 0.0)

    def _take_a_turn(self) -> None:
        records = servers_in(ask_for_servers(self._peer, self._run_id).result(LOOK_SECONDS))
        held = {i: r for i, r in holders(records, self._lifetime).items() if i < self.plan.total}
        remotes: dict[int, Remote] = {}
        for index, record in held.items():
            known = self._remotes.get(index)
            if record.peer_id == self._peer.peer_id:
                continue
            is_known = known is not None and known.peer_id == record.peer_id
            remotes[index] = known if is_known else Remote(self.plan, index, record.peer_id, self._p2p)  # type: ignore[assignment]
        fresh = time.monotonic() - REFRESH_SECONDS
        with self._lock:
            due = [e for e in remotes.values() if not self._is_well(e) or e.answered < fresh]
            self._remotes, self._records = remotes, held
        reasons = RemoteExpertWorker.run_coroutine(_probe_all(due)) if due else []
        for expert, reason in zip(due, reasons, strict=True):
            if reason and self._is_well(expert):
                self.failed(expert, reason)
            elif reason:
                logger.debug("Expert %d of %s: %s", expert.index, expert.peer_id[-6:], reason)


async def _close(p2p: P2P) -> None:
    await p2p.shutdown()
    await asyncio.sleep(0)  # its tasks end in the next turn


async def _probe_all(experts: Sequence[Remote]) -> list[str]:
    return await asyncio.gather(*(expert.probe() for expert in experts))
