"""What each volunteer has given: samples that were really averaged, counted by the organizer from signed records."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from collab.files import write_text
from collab.metrics import PeerRecord
from collab.peer import Peer

PROTOCOL = "samiti/contributions/1"  # under this name the organizer serves the file
FILE = "contributions.json"
ASK_SECONDS = 1.0


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
    is missed. The peer's key has signed it (collab/metrics.py), but nobody can check the number: it counts up to
    `most` samples for each global step.

    :param file: where it is kept.
    :param most: what one peer can put into a global step at most, in samples: the run's target batch.
    """

    def __init__(self, file: Path, most: float = math.inf) -> None:
        self.file, self.most = file, most
        self.of_peers: dict[str, Contribution] = {}
        """By peer id."""
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))["peers"]
            self.of_peers = {peer: Contribution(**entry) for peer, entry in kept.items()}
        else:
            self._keep()

    def of_names(self) -> dict[str, int]:
        """Samples by public name, the largest first; a person may take part with several computers, one after another
        or at once."""
        total: Counter[str] = Counter()
        for contribution in list(self.of_peers.values()):  # another thread may add one
            total[contribution.name] += contribution.samples
        return dict(total.most_common())

    def update(self, records: Iterable[PeerRecord]) -> None:
        """Take in the records of the peers that are there now, and keep the result."""
        changed = False
        for record in records:
            known = self.of_peers.setdefault(record.peer_id, Contribution(record.name))
            if (record.samples_total, record.name) == (known.session, known.name):
                continue
            began_anew = record.samples_total < known.session
            news = record.samples_total - (0 if began_anew else known.session)
            known.samples += int(min(news, self.most * max(1, record.step - known.step)))
            known.name, known.session, known.step = record.name, record.samples_total, record.step
            changed = True
        if changed:
            self._keep()

    def _keep(self) -> None:
        peers = {peer: asdict(contribution) for peer, contribution in self.of_peers.items()}
        write_text(self.file, json.dumps({"names": self.of_names(), "peers": peers}, indent=1) + "\n")


def counted_by_organizer(peer: Peer, organizer: str, name: str) -> int | None:
    """The samples of all sessions under the public name `name`; None if the organizer's peer does not answer now."""
    try:
        names = json.loads(peer.fetch(organizer, PROTOCOL, ASK_SECONDS))["names"]
        return int(names[name])
    except (OSError, ValueError, LookupError, TypeError):
        return None
