"""Turns the records of single peers into the history of the swarm, one entry for each global step."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from collab.agreement import SKETCH_SIZE, spread
from collab.metrics import PeerRecord
from collab.watch import Sketches

PATIENCE = 5.0
"""Seconds to wait for the records of a step after the first one came: peers publish within moments of each other."""


@dataclass(frozen=True)
class StepSummary:
    """A global step as the swarm lived it."""

    step: int
    loss: float
    """Mean over samples, not over peers; NaN if nobody put in any."""
    samples: int
    """Samples of all peers that went into the step."""
    samples_per_second: float
    """Of all peers together."""
    tokens_per_second: float
    """Real tokens, of all peers together, waiting included."""
    peers: int
    """Peers that reported the step."""
    peers_met: int
    """The smallest group that any of them averaged in."""
    peers_expected: int
    peers_averaged: int
    """Peers that applied an averaged gradient."""
    peers_alone: int
    """Peers that made the step on their own although others were there."""
    parts: float
    """The smallest share of tensor parts that any peer got averaged."""
    bytes_per_peer: float
    """Payload sent and received by a peer, mean over peers."""
    model_spread: float
    """Largest relative distance of a peer's parameters from the majority's; NaN if nobody sent a sketch."""
    matchmaking_seconds: float
    """Of the slowest peer."""
    allreduce_seconds: float
    """Of the slowest peer."""
    data_wait: float
    """Share of the time in which a peer's device waited for samples, mean over peers."""
    compute_share: float
    """Share of the time in forward and backward passes, mean over peers."""
    averaging_wait: float
    """Share of the time in which a peer's device waited for the others and for the optimizer, mean over peers."""
    time: float
    """When it was complete, in seconds since 1970."""

    def as_metrics(self) -> dict[str, float]:
        """For the trackers: numbers by name."""
        return {key: float(value) for key, value in asdict(self).items() if key not in ("step", "time")}

    @classmethod
    def from_metrics(cls, entry: dict[str, Any]) -> "StepSummary":
        """Read back what a tracker wrote. What an older version did not write yet is NaN."""
        kinds = {field.name: int if field.name in WHOLE else float for field in fields(cls)}
        values: dict[str, Any] = {name: kind(entry.get(name, math.nan)) for name, kind in kinds.items()}
        return cls(**values)


WHOLE = ("step", "samples", "peers", "peers_met", "peers_expected", "peers_averaged", "peers_alone")


class Monitor:
    """Collects records until a step is complete, then adds it to `history`.

    :param history: steps that are known already, for an auxiliary peer that was restarted.
    """

    def __init__(self, history: Sequence[StepSummary] = ()) -> None:
        self.history = list(history)
        self.live: list[PeerRecord] = []
        """The latest record of every peer that is still reporting."""
        self.sketches = Sketches()
        """What peers have published of their models."""
        self._open: dict[int, dict[str, PeerRecord]] = defaultdict(dict)
        self._since: dict[int, float] = {}

    @property
    def step(self) -> int:
        """The last global step that is complete; 0 before the first one."""
        return self.history[-1].step if self.history else 0

    @property
    def samples(self) -> int:
        """Samples in the whole history."""
        return sum(summary.samples for summary in self.history)

    def update(self, records: Sequence[PeerRecord]) -> list[StepSummary]:
        """Take in what the swarm reports now; returns the steps that this completed, in order."""
        self.live = sorted(records, key=lambda record: (-record.samples_total, record.peer_id))
        self.sketches.note(self.live)
        for record in records:
            if record.step > self.step:
                self._open[record.step][record.peer_id] = record
                self._since.setdefault(record.step, time.monotonic())
        done = []
        for step in sorted(self._open):
            everybody = all(record.step >= step for record in records)
            if not everybody and time.monotonic() - self._since[step] < PATIENCE:
                break  # a later step waits for this one: history is in order
            done.append(_summarize(step, list(self._open.pop(step).values())))
        self.history += done
        return done


def _summarize(step: int, records: Sequence[PeerRecord]) -> StepSummary:
    samples = sum(record.samples for record in records)
    sketches = [record.sketch for record in records if len(record.sketch) == SKETCH_SIZE]
    return StepSummary(
        step=step,
        loss=sum(record.loss * record.samples for record in records) / samples if samples else math.nan,
        samples=samples,
        samples_per_second=sum(record.samples_per_second for record in records),
        tokens_per_second=sum(record.tokens_per_second for record in records),
        peers=len(records),
        peers_met=min(record.peers_met for record in records),
        peers_expected=max(record.peers_expected for record in records),
        peers_averaged=sum(record.applied for record in records),
        peers_alone=sum(record.alone for record in records),
        parts=min(record.parts for record in records),
        bytes_per_peer=sum(record.bytes_sent + record.bytes_received for record in records) / len(records),
        model_spread=spread(sketches) if sketches else math.nan,
        matchmaking_seconds=max(record.matchmaking_seconds for record in records),
        allreduce_seconds=max(record.allreduce_seconds for record in records),
        data_wait=statistics.mean(record.data_wait for record in records),
        compute_share=statistics.mean(record.compute_share for record in records),
        averaging_wait=statistics.mean(record.averaging_wait for record in records),
        time=time.time(),
    )
