"""What each volunteer has given: samples that were really averaged, counted by the organizer from signed records."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from collab.files import write_text
from collab.metrics import PeerRecord
from collab.monitor import SLACK, StepSummary
from collab.peer import Peer
from collab.robust import leveled

logger = logging.getLogger(__name__)

PROTOCOL = "samiti/contributions/1"  # under this name the organizer serves the file
FILE = "contributions.json"
ASK_SECONDS = 1.0
KEPT_SHARE = 0.9  # of what nobody has claimed yet, from one look with new steps to the next


@dataclass
class Contribution:
    """Of one peer id."""

    name: str
    samples: int = 0
    session: int = 0
    """What it says of its present session, which began at 0."""
    step: int = 0


class Contributions:
    """Adds up what peers report, over their sessions and over restarts of this program.

    A peer reports how many of its samples were averaged in its session so far, so that no sample is lost when a record
    is missed. The peer's key has signed it (collab/metrics.py), but nobody can check the number. It counts up to `most`
    samples for each global step; and all peers together get what the monitor found plausible for the swarm's steps, or
    little more: who claims too much gets no more than those who claim most beside it (`robust.leveled`).

    :param file: where it is kept.
    :param most: what one peer can put into a global step at most, in samples: the run's target batch.
    """

    def __init__(self, file: Path, most: float = math.inf) -> None:
        self.file, self.most = file, most
        self.of_peers: dict[str, Contribution] = {}
        """By peer id."""
        self._step, self._unclaimed = 0, 0.0
        if file.exists():
            try:
                self._read(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                aside = file.with_suffix(".damaged")
                logger.warning(
                    "%s is damaged (%s): counting begins anew. It is kept as %s; mended, it can be put back while the "
                    "program does not run.", file, error, aside.name,
                )  # fmt: skip
                file.replace(aside)
        if not file.exists():
            self._keep()

    def _read(self, kept: Any) -> None:
        of_peers = {
            peer: Contribution(str(one["name"]), *(int(one[key]) for key in ("samples", "session", "step")))
            for peer, one in kept["peers"].items()
        }
        self._step, self._unclaimed = int(kept.get("step", 0)), float(kept.get("unclaimed", 0.0))
        self.of_peers = of_peers

    def of_names(self) -> dict[str, int]:
        """Samples by public name, the largest first; a person may take part with several computers, one after another
        or at once."""
        total: Counter[str] = Counter()
        for contribution in list(self.of_peers.values()):  # another thread may add one
            total[contribution.name] += contribution.samples
        return dict(total.most_common())

    def update(self, records: Iterable[PeerRecord], made: Sequence[StepSummary]) -> None:
        """Count what peers have given to the steps that are complete, and keep the result.

        :param records: of the peers that are there now. Those of later steps count once these are complete.
        :param made: the steps that were completed since the last call, in order.
        """
        if made:
            self._unclaimed *= KEPT_SHARE
        for summary in made:
            unobserved = summary.step - self._step - 1
            self._unclaimed += SLACK * summary.samples + (self.most * unobserved if unobserved > 0 else 0.0)
            self._step = max(self._step, summary.step)
        news: list[tuple[PeerRecord, float]] = []
        for record in records:
            known = self.of_peers.get(record.peer_id, Contribution(record.name))
            if record.step <= self._step and (record.samples_total, record.name) != (known.session, known.name):
                began_anew = record.samples_total < known.session
                claimed = record.samples_total - (0 if began_anew else known.session)
                news.append((record, min(claimed, self.most * max(1, record.step - known.step))))
        granted = leveled([claimed for _, claimed in news], self._unclaimed)
        for (record, _), samples in zip(news, granted, strict=True):
            known = self.of_peers.setdefault(record.peer_id, Contribution(record.name))
            known.samples += int(samples)
            known.name, known.session, known.step = record.name, record.samples_total, record.step
        self._unclaimed -= sum(granted)
        if made or news:
            self._keep()

    def _keep(self) -> None:
        kept = {
            "names": self.of_names(),
            "peers": {peer: asdict(contribution) for peer, contribution in self.of_peers.items()},
            "step": self._step,
            "unclaimed": self._unclaimed,
        }
        write_text(self.file, json.dumps(kept, indent=1) + "\n")

    @property
    def of_ids(self) -> dict[str, int]:
        """Samples by peer id."""
        return {peer: contribution.samples for peer, contribution in self.of_peers.items()}


def counted_by_organizer(peer: Peer, organizer: str, name: str) -> int | None:
    """The samples of all sessions under the public name `name`; None if the organizer's peer does not answer now."""
    try:
        names = json.loads(peer.fetch(organizer, PROTOCOL, ASK_SECONDS))["names"]
        return int(names[name])
    except (OSError, ValueError, LookupError, TypeError):
        return None
