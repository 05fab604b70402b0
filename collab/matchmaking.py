"""Who averages with whom: everybody who makes the same global step, in one group, as soon as all of them are there."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hivemind.averaging.allreduce import AveragingMode
from hivemind.averaging.control import StepControl
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import Matchmaking, MatchmakingException
from hivemind.optim.progress_tracker import LocalTrainingProgress
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto.averaging_pb2 import PROTOCOL_VIOLATION, JoinRequest, MessageFromLeader
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.asyncio import cancel_and_wait

from collab.link import HICCUP_SECONDS, SAFETY
from collab.peer import signed_entries

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
ASK_AGAIN_SECONDS = 0.15
LOOK_SECONDS = 0.5
LONELY_SECONDS = 1.0
AUXILIARY_GRACE = 0.5
SILENT_SECONDS = 5.0
FAR = 86400.0
MAX_SAID_BYTES = 1024  # five times what a peer has to say


@dataclass(frozen=True)
class Roster:
    """The peers that belong in one round, this one included."""

    trainers: frozenset[PeerID]
    auxiliaries: frozenset[PeerID]
    candidates: tuple[PeerID, ...]
    """Who may lead the group, the first choice first. It is the same on all peers that see the same swarm."""
    ahead: int
    """The global step of the others if most of them have left this round behind; else 0."""


def draw_up_roster(
    records: list[LocalTrainingProgress], me: PeerID, round_number: int, lag: int, absent: dict[PeerID, int], now: float
) -> Roster:
    """Tell from the peers' progress who belongs in the round that makes global step `round_number`.

    :param records: what peers report, one record each; auxiliary peers report a speed of exactly zero.
    :param lag: how many steps further a peer may be in its record while it still averages for this one.
    :param absent: peers that did not come to a round, and its number: nobody waits for them in later rounds until
      their record shows that they have got further.
    :param now: DHT time. Who has missed the previous step and said nothing since is not waited for either.
    """
    done = round_number - 1
    others = {PeerID(record.peer_id): record for record in records}
    others.pop(me, None)
    here = {
        peer: record
        for peer, record in others.items()
        if done - is_there(record, now) <= record.epoch <= done + lag
        and (record.epoch >= absent.get(peer, 0) or absent[peer] == round_number)
    }
    further = [record.epoch for record in others.values() if record.epoch > done + lag and record.samples_per_second]
    trainers = [record for record in others.values() if record.samples_per_second]
    auxiliaries = frozenset(peer for peer, record in here.items() if not record.samples_per_second)
    leaders = [peer for peer, record in here.items() if not record.client_mode]
    leaders.sort(key=lambda peer: (peer in auxiliaries, _rank(peer)))
    return Roster(
        trainers=frozenset(here) - auxiliaries,
        auxiliaries=auxiliaries,
        candidates=tuple(leaders),
        ahead=max(further) if 2 * len(further) > len(trainers) else 0,
    )


def is_there(record: LocalTrainingProgress, now: float) -> bool:
    """Whether a peer has reported lately; auxiliary peers do it seldom."""
    return not record.samples_per_second or now - record.time < SILENT_SECONDS


def _rank(peer: PeerID) -> bytes:
    return hashlib.sha256(peer.to_bytes()).digest()


def patience_with(others: Iterable[PeerID], call_seconds: Mapping[PeerID, object], at_most: float) -> float:
    """Seconds to wait for peers which notice the end of a step when their micro-batch is done.

    :param call_seconds: how long one takes, by what each peer says; `at_most` holds where somebody's is not known.
    """
    said = [call_seconds.get(peer) for peer in others]
    known = [seconds for seconds in said if isinstance(seconds, float) and seconds >= 0]
    return min(at_most, HICCUP_SECONDS + SAFETY * max(known)) if known and len(known) == len(said) else at_most


class LeftBehind(MatchmakingException):
    """Most of the others have made this global step already."""


class Astray(LeftBehind):
    """Two parts of the swarm that were apart have met, and the others make this global step with another model."""


class SwarmMatchmaking(Matchmaking):
    """Forms one group for every global step. Runs in the averager's process; the messages are hivemind's.

    Upstream's peers declare in the DHT until when they look for a group, and whoever declared the earliest time leads
    what has gathered by then (averaging/matchmaking.py). Peers do not agree on when a global step ends, so with three
    or more of them groups split: 4 trainers met in 83 % of the rounds, and each part went on with its own gradients.
    Looking also costs up to a core (`PotentialLeaders._update_queue_periodically` asks the DHT without a pause).

    Here the group's key has the number of the global step in it, so rounds never mix. Who belongs in the round is known
    from the peers' progress records; from these all peers derive the same leader, and ask nobody else. The leader
    begins when its own step is complete and everybody is there; after `patience` seconds, with those who are.

    :param progress_key: DHT key under which peers report their progress.
    :param longest_wait: seconds that the others are waited for at most once a peer has all its samples; more than the
      slowest peer's micro-batch takes.
    :param lag: see `draw_up_roster`.
    """

    def __init__(self, *args: Any, progress_key: str, longest_wait: float, lag: int, auxiliary: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.progress_key, self.longest_wait, self.lag, self.auxiliary = progress_key, longest_wait, lag, auxiliary
        self.call_seconds: Mapping[PeerID, object] = {}
        """How long a micro-batch takes the peers of the latest group, by what each says."""
        self.roster = Roster(frozenset(), frozenset(), (), 0)
        self._records: list[LocalTrainingProgress] = []
        self._absent: dict[PeerID, int] = {}
        self._passed_over: set[PeerID] = set()
        self._triggered_at = self._role_since = 0.0

    @property
    def patience(self) -> float:
        """Seconds that the others are waited for once this peer has all its samples."""
        return patience_with(self.roster.trainers, self.call_seconds, at_most=self.longest_wait)

    async def look_for_group(self, step: StepControl) -> GroupInfo | None:
        """:raises MatchmakingException: nobody came.
        :raises LeftBehind: the others have gone on.
        """
        try:
            group: GroupInfo | None = await super().look_for_group(step)
        except Exception as error:
            if step.done():  # called off: nobody asks for the reason, and asyncio would log that nobody did
                logger.debug("Matchmaking of a round that was called off ended: %r", error)
                raise asyncio.CancelledError from None
            raise
        if group is not None:
            if not all(map(_can_be_understood, group.gathered)):
                raise MatchmakingException("the leader of the round passed on what no peer can have said")
            for peer in (self.roster.trainers | self.roster.auxiliaries) - set(group.peer_ids):
                self._absent[peer] = _round_number(step)
        return group

    def _check_reasons_to_reject(self, request: JoinRequest, context: P2PContext) -> MessageFromLeader | None:
        """Upstream takes in who says anything; reading it would end the round of the whole group."""
        refused: MessageFromLeader | None = super()._check_reasons_to_reject(request, context)
        if refused is None and not _can_be_understood(request.gather):
            return MessageFromLeader(code=PROTOCOL_VIOLATION)
        return refused

    def get_request_expiration_time(self) -> float:
        """Followers stay as long as they like; upstream has them leave at the time that they declared."""
        return float(get_dht_time()) + FAR

    async def _request_join_potential_leaders(self, step: StepControl) -> None:
        try:
            await self._meet(step)
        except Exception as error:  # noqa: BLE001 - whoever waits for the group gets it, and the round's report tells it
            if not self.assembled_group.done():
                self.assembled_group.set_exception(error)
        finally:
            self._stop_leading()

    async def _meet(self, step: StepControl) -> None:
        number = _round_number(step)
        self.group_key_manager.group_bits = f"{number:b}"
        self._passed_over, self._triggered_at = set(), 0.0
        leader: PeerID | None = None
        async with self._watching(number):
            while not self.assembled_group.done():
                if step.done():  # upstream can miss that the round was called off (averaging/averager.py, `_step`)
                    raise MatchmakingException("the round was called off")
                if self.roster.ahead:
                    raise LeftBehind(f"the others are at global step {self.roster.ahead} already")
                candidates = [peer for peer in self.roster.candidates if peer not in self._passed_over]
                leads = not self.client_mode and not any(self._precedes(peer) for peer in candidates)
                turn_to = self.peer_id if leads else candidates[0] if candidates else None
                if turn_to != leader or not self._triggered_at:
                    leader, self._role_since = turn_to, time.monotonic()
                if step.triggered and not self._triggered_at:
                    self._triggered_at = time.monotonic()
                if leads:
                    await self._lead(step)
                elif leader is not None:
                    await self._follow(leader)
                elif self._waited(self.patience):
                    raise MatchmakingException("there is nobody who could lead the round")
                else:
                    await asyncio.sleep(POLL_SECONDS)

    def _precedes(self, other: PeerID) -> bool:
        is_auxiliary = other in self.roster.auxiliaries
        return (is_auxiliary, _rank(other)) < (self.auxiliary, _rank(self.peer_id))

    def _waited(self, seconds: float) -> bool:
        """Whether it has been this long since this peer was ready and turned to the leader that it has now."""
        return bool(self._triggered_at) and time.monotonic() - max(self._triggered_at, self._role_since) > seconds

    async def _lead(self, step: StepControl) -> None:
        leaders = self.potential_leaders
        leaders.declared_group_key = self.group_key_manager.current_key
        leaders.declared_expiration_time = step.deadline
        async with self.lock_request_join_group:
            group = {self.peer_id, *self.current_followers}
            if step.triggered and len(group) > 1 and (self._is_complete(group) or self._waited(self.patience)):
                if not self.assembled_group.done():
                    await self.leader_assemble_group()
                return
        if len(group) == 1 and self._waited(self.patience):
            raise MatchmakingException(f"nobody came within {self.patience:.0f} s")
        if len(group) == 1 and step.triggered and not self.roster.trainers:
            raise MatchmakingException("nobody else is there")
        if len(group) == 1 and self._waited(LONELY_SECONDS):
            # Others may be unable to reach this peer, or not know it yet, and follow the next in line.
            for other in self.roster.candidates[:2]:
                if await self._request_join_group(other) is not None:
                    return
            await asyncio.sleep(ASK_AGAIN_SECONDS)
        await asyncio.sleep(POLL_SECONDS)

    def _is_complete(self, group: set[PeerID]) -> bool:
        return self.roster.trainers <= group and (self.roster.auxiliaries <= group or self._waited(AUXILIARY_GRACE))

    async def _follow(self, leader: PeerID) -> None:
        """Ask to join; if it is not to be, look whether this leader is worth asking again."""
        self._stop_leading()
        attempt = asyncio.create_task(self._request_join_group(leader))
        try:
            while not attempt.done():
                await asyncio.wait({attempt}, timeout=POLL_SECONDS)
                if self.step_control.done():
                    return
                if self.step_control.triggered and not self._triggered_at:
                    self._triggered_at = time.monotonic()
                if self._waited(2 * self.patience):  # it has hung up, or its micro-batches take too long
                    self._passed_over.add(leader)
                    return
            if await attempt is not None:
                return
        finally:
            await cancel_and_wait(attempt)
        is_connected = any(info.peer_id == leader for info in await self._p2p.list_peers())
        if not is_connected or self._waited(self.patience):
            self._passed_over.add(leader)
        else:
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    def _stop_leading(self) -> None:
        self.potential_leaders.declared_group_key = None
        self.potential_leaders.declared_expiration_time = float("inf")

    @contextlib.asynccontextmanager
    async def _watching(self, round_number: int) -> AsyncIterator[None]:
        """Keep the roster up to date."""

        async def look() -> None:
            answer = await self.group_key_manager.dht.get(self.progress_key, latest=True, return_future=True)
            told = {peer: said for peer, said in signed_entries(answer).items() if said is not None}
            read = {peer: LocalTrainingProgress.parse_obj(said) for peer, said in told.items()}
            # Nobody speaks for others.
            self._records = [record for peer, record in read.items() if str(PeerID(record.peer_id)) == peer]
            draw_up()

        def draw_up() -> None:
            self.roster = draw_up_roster(
                self._records, self.peer_id, round_number, self.lag, self._absent, get_dht_time()
            )

        async def keep_looking(first: asyncio.Task[None]) -> None:
            await first
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                await look()

        first = asyncio.create_task(look())
        # A peer of the DHT that has hung up is asked for three seconds; what was known before will do until then.
        await asyncio.wait({first}, timeout=LOOK_SECONDS if self._records else None)
        if first.done():
            first.result()
        else:
            draw_up()
        watch = asyncio.create_task(keep_looking(first))
        try:
            yield
        finally:
            await cancel_and_wait(watch)


def _can_be_understood(gathered: bytes) -> bool:
    """Whether this is what a peer says to its group: its link, its part in the round, and what the averager adds."""
    try:
        _mbits, mode, told = MSGPackSerializer.loads(gathered)
        AveragingMode(mode)
        MSGPackSerializer.loads(told)
    except Exception:  # noqa: BLE001 - a stranger's bytes; the parser raises many kinds of errors
        return False
    return len(gathered) <= MAX_SAID_BYTES


def _round_number(step: StepControl) -> int:
    _bandwidth, _mode, gathered = MSGPackSerializer.loads(step.data_for_gather)
    said = MSGPackSerializer.loads(gathered)
    return int(said[0] if isinstance(said, list | tuple) else said)
