"""Writing down what the swarm does: an auxiliary peer reads the peers' records and keeps the run's history."""

import contextlib
import logging
import random
from collections.abc import Callable

from collab.background import Background
from collab.contributions import Contributions
from collab.metrics import (
    AuxRecord,
    ask_for_auxiliaries,
    ask_for_records,
    auxiliaries_in,
    publish_auxiliary,
    records_in,
)
from collab.monitor import Monitor, StepSummary
from collab.peer import Peer
from collab.reports import fetch_reports
from collab.trackers import Trackers

logger = logging.getLogger(__name__)

PERIOD = 0.5
LOOK_SECONDS = 15.0
MOST_ASKED = 32  # trainers, for the steps that were made unobserved
ATTEMPTS = 5
PRESENCE_PER_LIFETIME = 3


class Recorder(Background):
    """Hands the peers' records to the monitor, to the contributions and, as numbers of the swarm, to the trackers.

    The DHT holds each peer's latest record. Steps that were made while nobody looked, as during a restart, are asked
    for at trainers that are still there; what none of them has kept stays missing.

    :param tell: called with each global step that is complete, in order.
    """

    def __init__(
        self,
        peer: Peer,
        run_id: str,
        monitor: Monitor,
        contributions: Contributions,
        trackers: Trackers,
        tell: Callable[[StepSummary], None],
    ) -> None:
        super().__init__("Watching the swarm", PERIOD)
        self._peer, self._run_id = peer, run_id
        self._monitor, self._contributions, self._trackers, self._tell = monitor, contributions, trackers, tell
        self._asked_until, self._attempts = 0, 0
        self._more: dict[str, float] = {}
        self.start()

    def add_to_next_step(self, metrics: dict[str, float]) -> None:
        """Hand figures that belong to no step in particular to the trackers, with those of the next one."""
        self._more = self._more | metrics

    def _take_a_turn(self) -> None:
        records = records_in(ask_for_records(self._peer, self._run_id).result(LOOK_SECONDS))
        self._monitor.look(records)
        missing = self._monitor.missing()
        if missing and missing[-1] > self._asked_until and not self._ask(missing):
            return  # the history waits for another attempt: what is written stays as it is
        made = self._monitor.complete()
        for summary in made:
            more, self._more = self._more, {}
            self._trackers.log(summary.as_metrics() | more, summary.step, summary.time)
            self._tell(summary)
        self._contributions.update(records, made)

    def _ask(self, missing: range) -> bool:
        """Ask trainers for the records of these steps; gives whether one answered, or enough attempts were made."""
        trainers = [record.peer_id for record in self._monitor.live]
        kept = fetch_reports(self._peer, random.sample(trainers, min(len(trainers), MOST_ASKED)))
        self._monitor.learn(record for records in kept.values() for record in records if record.step in missing)
        self._attempts += 1
        if not kept and self._attempts < ATTEMPTS:
            return False
        self._asked_until, self._attempts = missing[-1], 0
        still = self._monitor.missing()
        if still:
            logger.info("Nobody has kept the records of global steps %d to %d", still[0], still[-1])
        return True


class Presence(Background):
    """Tells the others of this auxiliary peer, and the monitor of the others, in the background until `stop`.

    :param lifetime: seconds for which a peer's word counts: the run's `metadata_expiration`.
    :param describe: gives this peer's record.
    """

    def __init__(
        self, peer: Peer, run_id: str, monitor: Monitor, lifetime: float, describe: Callable[[], AuxRecord]
    ) -> None:
        super().__init__("Telling of itself", lifetime / PRESENCE_PER_LIFETIME)
        self._peer, self._run_id, self._monitor, self._lifetime = peer, run_id, monitor, lifetime
        self._describe = describe
        self.start()

    def stop(self, timeout: float = 1.0) -> None:
        """Say goodbye. Takes twice `timeout` seconds at most."""
        super().stop(timeout)
        goodbye = self._describe().copy(update={"left": True})
        with contextlib.suppress(TimeoutError):
            publish_auxiliary(self._peer, self._run_id, goodbye, self._lifetime).result(timeout)

    def _take_a_turn(self) -> None:
        publish_auxiliary(self._peer, self._run_id, self._describe(), self._lifetime).result(LOOK_SECONDS)
        self._monitor.auxiliaries = auxiliaries_in(ask_for_auxiliaries(self._peer, self._run_id).result(LOOK_SECONDS))
