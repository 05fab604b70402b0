"""Whether this peer still has the model that the others have."""

from collections import Counter
from collections.abc import Sequence

from hivemind.utils import MPFuture

from collab.agreement import SKETCH_SIZE, strays
from collab.metrics import ask_for_records, records_in
from collab.peer import Peer

TOLERANCE = 0.01
"""Relative distance of two models up to which they count as the same. Codecs make a thousandth between two averagings
of the parameters (measured with int8 at a learning rate of 0.003); a single missed step of that size makes a tenth."""

STEPS_IN_A_ROW = 2


class ModelWatch:
    """Compares the sketches that peers publish with their records, step by step. It never waits for the network.

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
        self._compared_step = 0
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
            self._answer = ask_for_records(self._peer, self._run_id)
        return self._in_a_row >= STEPS_IN_A_ROW

    def start_over(self, step: int) -> None:
        """Forget what was compared: this peer has taken over the state of global step `step`."""
        self._mine, self._answer, self._in_a_row = {}, None, 0
        self._compared_step = step + self.settle_steps

    def _compare(self, answer: MPFuture) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return
        others = [r for r in records_in(answer.result()) if r.peer_id != self._peer.peer_id]
        published = Counter(r.step for r in others if r.step in self._mine)
        step = max(published, key=lambda step: (published[step], step), default=0)
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
