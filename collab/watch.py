"""Whether this peer still has the model that the others have."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hivemind.utils import MPFuture

from collab.agreement import NOT_FINITE, SKETCH_SIZE, TOLERANCE, distance, majority, strays
from collab.metrics import PeerRecord, ask_for_records, records_in
from collab.peer import Peer

STEPS_IN_A_ROW = 2
MOST_BEHIND = 2  # steps; a peer that is further behind was not in this one's rounds, and takes over the newer state


KEPT_STEPS = 20


def weights_agree(settings: Mapping[str, Any]) -> bool:
    """Whether peers have the same weights when they publish a sketch of them.

    With delayed updates they publish at different moments; with local updates each has learnt something of its own.
    """
    return not (settings["delay_optimizer_step"] or settings["local_updates"])


class Doubt(Exception):
    """Why a state is not the swarm's."""


class TooEarly(Doubt):
    """Why it is not known to be so yet: others may publish the same in a moment."""


class Sketches:
    """What peers have published of their models for the last global steps, and whether a state is one of those."""

    def __init__(self, tolerance: float = TOLERANCE) -> None:
        self._tolerance = tolerance
        self._published: dict[str, dict[int, Sequence[float]]] = {}
        self._live: Sequence[PeerRecord] = ()

    def note(self, records: Sequence[PeerRecord]) -> None:
        """Take in the latest records of all peers that report; those of who is gone are forgotten."""
        for record in records:
            known = self._published.setdefault(record.peer_id, {})
            if len(record.sketch) == SKETCH_SIZE:
                known[record.step] = record.sketch
            self._published[record.peer_id] = dict(list(known.items())[-KEPT_STEPS:])
        self._published = {record.peer_id: self._published[record.peer_id] for record in records}
        self._live = tuple(records)

    def check(self, step: int, sketch: Sequence[float] | None) -> dict[str, Any]:
        """Compare the state of a global step with what most peers have, by the vote that trainers hold, too.

        :param sketch: of its parameters; None if peers publish theirs at different moments (delayed averaging), so that
            only the number of the step is compared.
        :returns: `published`, how many peers' sketches of that step are known, `agreeing`, how many of them were those
            of most, and `distance` from these, relative; or `not_compared`, the reason.
        :raises Doubt: it is another model, or (`TooEarly`) those who have published are not enough yet.
        """
        if not self._live:
            return {"not_compared": "no peer had published anything"}
        usual = statistics.median_high([record.step for record in self._live])
        if step > usual + 1:
            raise TooEarly(f"it says that it is of global step {step}, and most peers have made {usual}")
        if sketch is None:
            return {"not_compared": "peers have different weights when they publish"}
        votes = {peer: known[step] for peer, known in self._published.items() if step in known}
        to_come = sum(record.step == step - 1 for record in self._live)
        if to_come and len(votes) <= to_come:
            raise TooEarly(f"only {len(votes)} of {len(votes) + to_come} peers have told what they have of step {step}")
        if not votes:
            return {"not_compared": f"no peer's sketch of global step {step} was seen"}
        most = [value for peer, value in votes.items() if peer not in strays(votes, self._tolerance)]
        far = distance(sketch, majority(most)) if most else NOT_FINITE
        if not far <= self._tolerance:
            raise Doubt(f"its weights differ by {far:.1%} from those of {len(most)} of {len(votes)} peers")
        return {"published": len(votes), "agreeing": len(most), "distance": far}


class ModelWatch:
    """Compares the sketches that peers publish with their records, step by step. It never waits for the network.

    Only peers in the same rounds are compared. Of two parts of a swarm that were apart and have met again, the one that
    is behind takes over the newer state; if it were asked for its vote, and were as large as the other part or larger,
    that one would wait for a state which nobody has any more, and share its own with nobody.

    :param settle_steps: global steps after a takeover in which this peer is not judged. It may have joined with an
      older state; then the next averaging of the parameters mends it.
    :param tolerance: see `TOLERANCE`; raise it if peers take over states although `model_spread` is harmless.
    """

    def __init__(self, peer: Peer, run_id: str, settle_steps: int, tolerance: float = TOLERANCE) -> None:
        self.settle_steps = settle_steps
        self.doubtful: frozenset[str] = frozenset()
        """Peers whose model was another one than most peers' at the last comparison."""
        self._peer, self._run_id, self._tolerance = peer, run_id, tolerance
        self._mine: dict[int, Sequence[float]] = {}
        self._answer: MPFuture | None = None
        self._asked_step = self._compared_step = 0
        self._in_a_row = 0

    def has_strayed(self, step: int, sketch: Sequence[float]) -> bool:
        """Whether this peer's model was another one than that of most peers, in two comparisons in a row.

        The others' sketches of `step` are not there yet; what is compared is the latest step that all have published.

        :param sketch: of this peer's parameters after global step `step`.
        """
        self._mine = {known: value for known, value in self._mine.items() if step - 10 < known < step} | {step: sketch}
        if self._answer is not None and self._answer.done():
            self._compare(self._answer)
            self._answer = None
        if self._answer is None:
            self._answer, self._asked_step = ask_for_records(self._peer, self._run_id), step
        return self._in_a_row >= STEPS_IN_A_ROW

    def start_over(self, step: int) -> None:
        """Forget what was compared: this peer has taken over the state of global step `step`."""
        self._mine, self._answer, self._in_a_row = {}, None, 0
        self._compared_step = step + self.settle_steps

    def _compare(self, answer: MPFuture) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return
        others = [r for r in records_in(answer.result()) if r.peer_id != self._peer.peer_id]
        published = Counter(r.step for r in others if r.step in self._mine and r.step >= self._asked_step - MOST_BEHIND)
        if not published:  # whoever it differed from is in other rounds now: nobody is there to judge
            self.doubtful, self._in_a_row = frozenset(), 0
            return
        step = max(published, key=lambda step: (published[step], step))
        if step <= self._compared_step:
            return
        sketches = {r.peer_id: r.sketch for r in others if r.step == step and len(r.sketch) == SKETCH_SIZE}
        sketches[self._peer.peer_id] = self._mine[step]
        odd = strays(sketches, self._tolerance)
        everybody = 1 + sum(abs(r.step - step) <= 1 for r in others)
        if len(sketches) < everybody and 2 * (len(sketches) - len(odd)) <= everybody:
            return  # those who have not published yet could turn the vote
        self._compared_step = step
        self._in_a_row = self._in_a_row + 1 if self._peer.peer_id in odd else 0
        self.doubtful = frozenset(odd - {self._peer.peer_id})
