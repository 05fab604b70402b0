"""Writing down what the swarm does: an auxiliary peer reads the peers' records and keeps the run's history."""

from collections.abc import Callable

from collab.background import Background
from collab.contributions import Contributions
from collab.metrics import ask_for_records, records_in
from collab.monitor import Monitor, StepSummary
from collab.peer import Peer
from collab.trackers import Trackers

PERIOD = 0.5
LOOK_SECONDS = 15.0


class Recorder(Background):
    """Hands the peers' records to the monitor, to the contributions and, as numbers of the swarm, to the trackers.

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
        self.start()

    def _take_a_turn(self) -> None:
        records = records_in(ask_for_records(self._peer, self._run_id).result(LOOK_SECONDS))
        for made in self._monitor.update(records):
            self._trackers.log(made.as_metrics(), made.step)
            self._tell(made)
        self._contributions.update(records)
