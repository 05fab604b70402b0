"""A trainer's records: told to the swarm, said again while it is there, and kept for whoever was away."""

import contextlib
import json
import logging
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hivemind.utils import get_dht_time
from pydantic.v1 import ValidationError

from collab.background import Background
from collab.errors import UserError
from collab.files import write_text
from collab.metrics import LEAST_LIFETIME, PeerRecord, publish_record
from collab.peer import Peer
from collab.processes import scratch_folder

logger = logging.getLogger(__name__)

PROTOCOL = "samiti/records/1"  # under this name a trainer serves what it has kept
KEPT_STEPS = 2000
MAX_KEPT_BYTES = 16 * 2**20  # of 2 * KEPT_STEPS records
MAX_LINE_BYTES = 4096
SAID_PER_LIFETIME = 3
ASK_SECONDS = 5.0  # without a byte
SLOWEST_SECONDS = 60.0  # 4,000 records are 5 MB: 40 s at 1 Mbit/s
ASKED_AT_ONCE = 8


class Reports(Background):
    """Tells the swarm about this trainer's global steps, in the background until `stop`.

    The DHT holds the latest record only. The last `KEPT_STEPS` at least are kept in a file of this session, which every
    peer can fetch (`fetch_reports`): an auxiliary peer that was away has a history without gaps.

    :param lifetime: seconds for which a peer's word counts: the run's `metadata_expiration`. The newest record is said
      again three times in it, so that a slow step is not taken for a dead peer.
    """

    def __init__(self, peer: Peer, run_id: str, lifetime: float) -> None:
        super().__init__("Reporting", lifetime / SAID_PER_LIFETIME)
        self._peer, self._run_id, self._lifetime = peer, run_id, max(LEAST_LIFETIME, lifetime)
        self._newest: PeerRecord | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="samiti-", dir=scratch_folder())
        self._file = Path(self._folder.name, "records.jsonl")
        self._file.touch()
        self._kept: deque[str] = deque(maxlen=KEPT_STEPS)
        self._lines = 0
        self._complained = False
        peer.serve(PROTOCOL, self._file)
        self.start()

    def add(self, record: PeerRecord) -> None:
        """Keep and tell what became of a global step; returns at once."""
        self._keep(record)
        self._newest = record
        publish_record(self._peer, self._run_id, record, self._lifetime)

    def stop(self, timeout: float = 1.0) -> None:
        """Say goodbye. Takes twice `timeout` seconds at most."""
        super().stop(timeout)
        if self._newest is not None:
            goodbye = self._newest.copy(update={"reported": get_dht_time(), "left": True})
            with contextlib.suppress(TimeoutError):
                publish_record(self._peer, self._run_id, goodbye, self._lifetime).result(timeout)
        self._folder.cleanup()

    def _take_a_turn(self) -> None:
        if self._newest is not None:
            again = self._newest.copy(update={"reported": get_dht_time()})
            publish_record(self._peer, self._run_id, again, self._lifetime)

    def _keep(self, record: PeerRecord) -> None:
        line = json.dumps(record.dict()) + "\n"
        self._kept.append(line)
        try:
            if self._lines == 2 * KEPT_STEPS:
                write_text(self._file, "".join(self._kept))
                self._lines = len(self._kept)
            else:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(line)
                self._lines += 1
        except (OSError, UserError) as error:
            if not self._complained:
                logger.warning("Who misses a step's record cannot ask this peer for it: %s", error)
            self._complained = True


def fetch_reports(peer: Peer, trainers: list[str]) -> dict[str, list[PeerRecord]]:
    """What these trainers have kept, by peer id; those that do not answer for `ASK_SECONDS` are left out.

    The connection proves who answers, and each may speak of itself alone; every record is checked as in the DHT.

    :param trainers: peer ids. They are asked `ASKED_AT_ONCE` at a time.
    """

    def ask(trainer: str) -> list[PeerRecord] | None:
        try:
            content = peer.fetch(trainer, PROTOCOL, SLOWEST_SECONDS, MAX_KEPT_BYTES, patience=ASK_SECONDS)
            return reports_in(content, trainer)
        except OSError as error:
            logger.debug("Trainer %s did not hand out its records: %s", trainer, error)
            return None

    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        answers = zip(trainers, pool.map(ask, trainers), strict=True)
    return {trainer: kept for trainer, kept in answers if kept is not None}


def reports_in(content: bytes, trainer: str) -> list[PeerRecord]:
    """The records of `trainer` in what it has served, one for each step; whatever else is there is left out."""
    found: dict[int, PeerRecord] = {}
    for line in content.split(b"\n", 2 * KEPT_STEPS)[: 2 * KEPT_STEPS]:
        if 0 < len(line) <= MAX_LINE_BYTES:
            try:
                record = PeerRecord.parse_obj(json.loads(line))
            except (ValidationError, ValueError, RecursionError):  # cut, foreign, or a lie
                continue
            if record.peer_id == trainer:
                found[record.step] = record
    return [found[step] for step in sorted(found)]
