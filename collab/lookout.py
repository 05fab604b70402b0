"""Notices when this peer has lost the others, says so, and looks for them again."""

import contextlib
import logging
import math
import time
from collections.abc import Collection

from hivemind.utils import MPFuture, ValueWithExpiration
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS

from collab.background import Background
from collab.clock import check_clock
from collab.errors import UserError
from collab.optimizer import RoundReport
from collab.peer import Peer, peer_id_in, signed_entries

logger = logging.getLogger(__name__)

ALONE_ROUNDS = 3
FIRST_PAUSE = 30.0
LONGEST_PAUSE = 600.0
CUT_OFF_PAUSE = 60.0  # nobody at all is in sight: mostly this computer's own connection, which may be back any moment
LOOKS_PER_LIFETIME = 4
MISSED_LOOKS = 3  # in a row; a single answer of the DHT may lack records
LOOK_SECONDS = 15.0
MAX_ADDRESSES = 8  # of one peer; a stranger must not send this peer dialing without end
MAX_ADDRESS_LENGTH = 300
MAX_SEARCHED = 64
KNOCKS = 4  # peers that are tried at each look
KNOCK_SECONDS = 10.0
SHOWN_PEERS = 8


class Sightings:
    """Who is in sight and who is lost. Decides when there is something to say or to do, and does nothing itself.

    :param entrances: peer ids through which this peer joined. They are looked for even after a goodbye: newcomers go
      on joining through them, and one that was started anew may be in another swarm than this peer.
    :param now: seconds on a clock that only goes forward, as everywhere below.
    """

    def __init__(self, entrances: Collection[str], now: float) -> None:
        self.entrances = frozenset(entrances)
        self.lost: list[str] = []
        """Peers that are looked for without another word; the latest last."""
        self.rounds_alone = 0
        """Rounds in a row that reached nobody although others live."""
        self.others_expected = 0
        self._missed: dict[str, int] = {}  # looks in a row without a record of that peer
        self._said_alone = False
        self._knocked = 0
        self._pause, self._searched, self._search_next = FIRST_PAUSE, -math.inf, now + FIRST_PAUSE

    @property
    def known(self) -> set[str]:
        """Everybody who was seen and has not said goodbye, and the entrances."""
        return self._missed.keys() | self.entrances

    @property
    def in_sight(self) -> set[str]:
        """Peers that live as far as this one can tell."""
        return {peer for peer, missed in self._missed.items() if missed < MISSED_LOOKS}

    @property
    def newly_lost(self) -> set[str]:
        """Peers that vanished, and nothing was said of it yet. The records of those who vanish together do not end in
        the same moment: while there are more to come, they are waited for a few looks."""
        lost = self._missed.keys() - self.in_sight - set(self.lost)
        more_to_come = any(0 < missed < MISSED_LOOKS for missed in self._missed.values())
        return set() if more_to_come and all(self._missed[peer] < 2 * MISSED_LOOKS for peer in lost) else lost

    @property
    def wanted(self) -> list[str]:
        """Whom to look for without another word, the most promising first."""
        unseen = self.entrances - self.in_sight - self.newly_lost
        return [*sorted(unseen), *(peer for peer in reversed(self.lost) if peer not in unseen)]

    @property
    def cut_off(self) -> bool:
        """Whether everybody has vanished at once or one after the other, without a goodbye."""
        return bool(self._missed) and not self.in_sight

    @property
    def alone(self) -> bool:
        """Whether this peer has been training alone for some time although others live."""
        return self.rounds_alone >= ALONE_ROUNDS

    def look(self, living: Collection[str], left: Collection[str]) -> set[str]:
        """Note who is there and who has said goodbye; gives those that were lost and are back."""
        back = set(living) & set(self.lost)
        self._missed = {peer: missed + 1 for peer, missed in self._missed.items() if peer not in left}
        self._missed |= dict.fromkeys(living, 0)
        self.lost = [peer for peer in self.lost if peer in self._missed and peer not in back]
        return back

    def after_round(self, report: RoundReport) -> None:
        """Note whether a round reached anybody."""
        alone = report.expected > 1 and not (report.applied and report.met > 1)
        self.rounds_alone = self.rounds_alone + 1 if alone else 0
        self.others_expected = report.expected - 1
        self._said_alone &= alone

    def knock_at(self) -> list[str]:
        """The next few of those that are wanted: if it was a link that broke, one that answers brings back all."""
        wanted = self.wanted
        first = self._knocked % len(wanted) if wanted else 0
        self._knocked += KNOCKS
        return list(dict.fromkeys([*wanted[first:], *wanted[:first]][:KNOCKS]))

    def begin_search(self, now: float) -> set[str] | None:
        """Whether to look for others now; gives those to speak of. Pauses grow as long as nothing new happens."""
        lost = self.newly_lost
        is_news = bool(lost) or (self.alone and not self._said_alone)
        if not is_news and not self.alone and not self.wanted:
            self._pause, self._search_next = FIRST_PAUSE, now + FIRST_PAUSE
            return None
        if now < (self._searched + FIRST_PAUSE if is_news else self._search_next):
            return None
        self._searched, self._search_next = now, now + (FIRST_PAUSE if is_news else self._pause)
        longest = CUT_OFF_PAUSE if self.cut_off else LONGEST_PAUSE
        self._pause = min(2 * (FIRST_PAUSE if is_news else self._pause), longest)
        self._said_alone = self.alone
        self.lost += sorted(lost)
        for forgotten in self.lost[:-MAX_SEARCHED]:
            del self._missed[forgotten]
        self.lost = self.lost[-MAX_SEARCHED:]
        return lost


class Lookout(Background):
    """Watches, in the background until `stop`, whether this peer still sees those that it has seen before.

    Every peer keeps a signed record of its addresses in the DHT, and takes it back when it leaves. If the connection to
    a part of the swarm breaks for a while, the DHT forgets those peers for good (a node that does not answer is
    removed from the routing table, dht/protocol.py): afterwards two swarms train, and each believes to be complete. So
    every peer remembers the others with their addresses, and dials those that vanished without a goodbye.

    :param swarm_id: name under which the peers of this run find each other.
    :param lifetime: seconds for which a record counts.
    """

    def __init__(self, peer: Peer, swarm_id: str, lifetime: float) -> None:
        super().__init__("Looking out for the other peers", lifetime / LOOKS_PER_LIFETIME)
        self.peer, self.lifetime = peer, lifetime
        self._key = f"{swarm_id}_addresses"
        self._given: dict[str, list[str]] = {}  # on the command line; a peer may not know its own forwarded port
        for address in peer.initial_peers:
            self._given.setdefault(peer_id_in(address), []).append(address)
        self._announced: dict[str, list[str]] = {}
        self._knocks: dict[str, MPFuture] = {}
        self._sightings = Sightings(self._given.keys(), time.monotonic())
        self._reason = ""
        self._clock_at_start, self._wrong_clock = _clock(), ""
        self.start()

    def after_round(self, report: RoundReport) -> None:
        """Tell it how a global step went; returns at once."""
        self._reason = report.reason
        self._sightings.after_round(report)

    def addresses(self) -> list[str]:
        """Where those in sight can be dialed; peers that accept no connections have no address."""
        announced, in_sight = self._announced, self._sightings.in_sight
        return sorted(address for peer, some in announced.items() if peer in in_sight for address in some)

    @property
    def cut_off(self) -> bool:
        """Whether nobody is in sight of those who were, and have not said goodbye: this computer has lost its network,
        or all of them are off."""
        return self._sightings.cut_off

    def refuse_wrong_clock(self) -> None:
        """:raises UserError: this computer's clock was right when this peer joined, and is not any more."""
        if self._wrong_clock:
            raise UserError(self._wrong_clock)

    def stop(self, timeout: float = 1.0) -> None:
        """Say goodbye: nobody looks for this peer from now on. Takes twice `timeout` seconds at most."""
        super().stop(timeout)
        with contextlib.suppress(TimeoutError):
            self._publish(None).result(timeout)

    def _take_a_turn(self) -> None:
        sightings = self._sightings
        if abs(_clock() - self._clock_at_start) > MAX_DHT_TIME_DISCREPANCY_SECONDS:  # or the computer has slept
            self._ask_the_time()
        self._publish([] if self.peer.client_mode else self.peer.addresses())
        back = self._look()
        if back:
            logger.warning("In sight again: %s. %s", _names(back), TOGETHER)
        lost = sightings.begin_search(time.monotonic())
        if self._stopped.is_set():
            return
        if lost is None:
            self._knocks = {peer: knock for peer, knock in self._knocks.items() if not knock.done()}
            for peer in sightings.knock_at():
                if peer not in self._knocks:  # the next one would close the connection that this one opens
                    self._knocks[peer] = self.peer.knock(peer, self._addresses_of(peer), KNOCK_SECONDS)
            return
        alone, wanted = sightings.alone, sightings.wanted
        if alone:
            wanted += sorted(sightings.known - set(wanted))
        if lost:
            logger.warning(lost_sight_message(lost, len(sightings.in_sight), self.lifetime))
        if alone:
            message = alone_message(
                sightings.rounds_alone, sightings.others_expected, self._reason, self.peer.client_mode
            )
            logger.warning(message)
        searched = {peer: self._addresses_of(peer) for peer in wanted[:MAX_SEARCHED]}
        found = self.peer.rejoin(searched)
        back = self._look() if found else set()
        level = logging.WARNING if lost or alone or back else logging.DEBUG
        logger.log(level, search_message(len(searched), found, back, lost - back - found))

    def _addresses_of(self, peer: str) -> list[str]:
        return [*self._given.get(peer, []), *self._announced.get(peer, [])]

    def _ask_the_time(self) -> None:
        self._wrong_clock = ""
        try:
            check_clock(self.peer.dht, sorted(self._sightings.known)[:MAX_SEARCHED])
        except UserError as error:
            self._wrong_clock = str(error)
            raise

    def _publish(self, addresses: list[str] | None) -> MPFuture:
        return self.peer.publish(self._key, addresses, self.lifetime)

    def _look(self) -> set[str]:
        """See who lives, and remember the addresses; gives those that were lost and are back."""
        records = addresses_in(self.peer.dht.get(self._key, latest=True, return_future=True).result(LOOK_SECONDS))
        records.pop(self.peer.peer_id, None)
        living = {peer: addresses for peer, addresses in records.items() if addresses is not None}
        back = self._sightings.look(living.keys(), records.keys() - living.keys())
        known = self._sightings.known
        self._announced = {peer: addresses for peer, addresses in (self._announced | living).items() if peer in known}
        return back


def _clock() -> float:
    """Changes when somebody sets the clock."""
    return time.time() - time.monotonic()


def addresses_in(answer: ValueWithExpiration | None) -> dict[str, list[str] | None]:
    """What peers say of themselves, by peer id: where they can be dialed, or None for those that have said goodbye.

    Only what a peer has signed counts, and only addresses of its own.
    """
    return {
        peer: said and [address for address in said[:MAX_ADDRESSES] if _leads_to(peer, address)]
        for peer, said in signed_entries(answer).items()
        if said is None or isinstance(said, list)
    }


def _leads_to(peer: str, address: object) -> bool:
    try:
        return isinstance(address, str) and len(address) <= MAX_ADDRESS_LENGTH and peer_id_in(address) == peer
    except Exception:  # noqa: BLE001 - a stranger's text; the parser raises many kinds of errors
        return False


# ---- what a person reads -----------------------------------------------------------------------------------------

TOGETHER = "From here on all of them train together; those who are behind take over the newer state."


def lost_sight_message(lost: Collection[str], in_sight: int, lifetime: float) -> str:
    """Peers have vanished without a goodbye."""
    if in_sight:
        meaning = "Their computers are off, or the swarm has fallen apart and each part trains a model of its own."
    else:
        meaning = "All of them are off, or this computer has lost its network and trains alone."
    return (
        f"LOST SIGHT of {len(lost)} of {len(lost) + in_sight} other peers: {_names(lost)}. No sign of life for more "
        f"than {lifetime:.0f} seconds, and no goodbye. {meaning} Looking for them ..."
    )


def alone_message(rounds: int, others: int, reason: str, client_mode: bool) -> str:
    """Others were expected in the latest rounds, and none of them was reached."""
    if client_mode:
        advice = "no peer that accepts connections may be left; ask the organizer whether the auxiliary peer is up"
    else:
        advice = "a firewall may keep them out; if this goes on, start again with --client_mode true"
    expected = "another peer was" if others == 1 else f"{others} other peers were"
    return (
        f"ALONE for {rounds} global steps in a row although {expected} expected: what this computer gives does not "
        f"reach the common model{f' ({reason})' if reason else ''}. If the others are not simply gone, {advice}. "
        f"Connecting anew to everybody it knows ..."
    )


def search_message(searched: int, answered: Collection[str], back: Collection[str], silent: Collection[str]) -> str:
    """What came of looking for `searched` peers.

    :param back: those that were lost and are in sight again.
    :param silent: those that have just been lost, and do not answer.
    """
    message = f"{len(answered)} of {searched} peers answered."
    if back:
        message += f" In sight again: {_names(back)}. {TOGETHER}"
    if silent:
        message += f" No answer from {_names(silent)}: probably gone. They are looked for now and then, without a word."
    if not answered:
        message += " If you know that others train, check this computer's network, or join again with a new address."
    return message


def _names(peers: Collection[str]) -> str:
    """Peers as they are named everywhere: by the last six characters of their ids."""
    shown = sorted(peer[-6:] for peer in peers)
    rest = len(shown) - SHOWN_PEERS
    return ", ".join(shown[:SHOWN_PEERS]) + (f" and {rest} more" if rest > 0 else "")
