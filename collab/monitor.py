"""Turns the records of single peers into the history of the swarm, one entry for each global step.

Records are signed, but what they say is nobody's but their author's word. What follows holds for any number of peers
of which fewer than half lie; of two peers that disagree nobody can tell which one does, and one who is alone is
believed, as long as its steps come no faster than `FASTEST` times as fast as before.
"""

import math
import statistics
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from hivemind.optim.progress_tracker import GlobalTrainingProgress
from hivemind.utils import get_dht_time

from collab.agreement import SKETCH_SIZE, spread
from collab.metrics import MAX_STEP, AuxRecord, PeerRecord, is_live
from collab.robust import leveled, weighted_mean, winsorized
from collab.watch import Sketches

PATIENCE = 5.0
"""Seconds to wait for the records of a step after the first one came: peers publish within moments of each other."""
TIE_PATIENCE = 10.0
"""The same as long as only half of the peers have made the step: the others are slow, or dead, or have taken over its
state and say nothing of it before their next step, or somebody lies."""
FASTEST = 4.0
LEAST_PACE = 0.25  # seconds in a global step; nothing trains faster
STUCK = 10.0  # times the usual length of a step, after which a minority is believed
UNKNOWN_PACE = 30.0  # seconds in a global step, for those whom most peers do not bear out, before there is a history
RECENT = 20  # steps
MAX_OPEN = 5000  # steps that wait; more than a trainer keeps for those who were away
MAX_LONE = (
    200  # of those which a single peer has told of, beyond where most are: a liar tells of a new one at every look
)
OVERSHOOT = 1.25  # times the target batch: a peer goes on until its micro-batch is done and the group is there
SLACK = 1.1  # of the samples that a round counted: those that came too late for it
BUSY = 4.0  # times the usual share of computing, within which a peer's speed has to agree with what it gave
LEAST_SHARE = 0.05
PUNCTUAL = 1.5  # times: a step is not equally long for all peers


@dataclass(frozen=True)
class StepSummary:
    """A global step as the swarm lived it."""

    step: int
    loss: float
    """Mean over samples, not over peers; outliers are pulled in (`robust.winsorized`). NaN if nobody put in any."""
    samples: int
    """Samples of all peers that went into the step; not more than the rounds themselves counted."""
    tokens: int
    """Real tokens in them."""
    samples_per_second: float
    """Of all peers together, while they compute."""
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
    peers_full: int
    """Peers that averaged with everybody who was expected, or were the only one."""
    parts: float
    """The smallest share of tensor parts that any peer got averaged."""
    bytes_per_peer: float
    """Payload sent and received by a peer, mean over peers, outliers pulled in."""
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
    """When it was made, in seconds since 1970: the peers' median."""

    def as_metrics(self) -> dict[str, float]:
        """For the trackers: numbers by name."""
        return {key: float(value) for key, value in asdict(self).items() if key not in ("step", "time")}

    @classmethod
    def from_metrics(cls, entry: dict[str, Any]) -> "StepSummary":
        """Read back what a tracker wrote. What an older version did not write yet is NaN, or 0 where it is counted."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            whole = field.name in WHOLE
            values[field.name] = (int if whole else float)(entry.get(field.name, 0 if whole else math.nan))
        return cls(**values)


WHOLE = (
    "step",
    "samples",
    "tokens",
    "peers",
    "peers_met",
    "peers_expected",
    "peers_averaged",
    "peers_alone",
    "peers_full",
)


@dataclass(frozen=True)
class SwarmView:
    """The swarm now, for the page, JSON, Prometheus and the console. NaN stands for what nobody knows yet."""

    time: float
    """Seconds since 1970."""
    step: int
    last_step: int
    loss: float
    samples: int
    """In the whole history, over restarts."""
    tokens: int
    samples_per_second: float
    """Of the last step, as everything below unless it says something else."""
    tokens_per_second: float
    steps_per_hour: float
    """Over the last `RECENT` steps."""
    roles: Mapping[str, int]
    """Live peers by role: trainer, client, auxiliary."""
    full_rounds_recent: float
    """Share of the peers' rounds in the last `RECENT` steps in which all met that were expected."""
    full_rounds: float
    """The same over the whole history."""
    bytes_per_step: float
    """Payload that all peers together sent and received."""
    utilisation: float
    """Compute time of all time, over peers and the last `RECENT` steps."""
    step_progress: float
    """Share of the next step's samples that is there."""
    seconds_to_next_step: float
    """Until enough samples are there, as it seems; NaN while nobody trains."""
    seconds_to_end: float
    """To the end of the run, at the usual pace of the last `RECENT` steps."""

    def as_numbers(self) -> dict[str, float]:
        """All of it that is a single number, by name; roles as `peers_ROLE`."""
        numbers = {key: float(value) for key, value in vars(self).items() if isinstance(value, int | float)}
        return numbers | {f"peers_{role}": float(number) for role, number in self.roles.items()}


class Monitor:
    """Collects records until a step is complete, then adds it to `history`.

    A step is complete when every live peer has made it; or `PATIENCE` seconds after it was first heard of, if most
    have; or after `TIE_PATIENCE`, if half have, and no faster than the steps before. What fewer say counts only when
    nothing else has come for `STUCK` times as long as a step usually takes. So neither a peer that is far ahead nor one
    that stands still can end the run, leave a gap in the history or stop it.

    :param history: steps that are known already, for an auxiliary peer that was restarted.
    :param lifetime: seconds for which a peer counts as live after it said so last: the run's `metadata_expiration`.
    :param target_batch_size: of the run. One peer puts `OVERSHOOT` times as many samples into a step at most.
    :param last_step: where the run ends; a later step cannot be.
    :param start: the global step at which the run began if there is no history; None: somewhere, it goes on already.
    """

    def __init__(
        self,
        history: Sequence[StepSummary] = (),
        *,
        lifetime: float = 60.0,
        target_batch_size: float = math.inf,
        last_step: int = MAX_STEP,
        start: int | None = 0,
    ) -> None:
        self.history = list(history)
        self.live: list[PeerRecord] = []
        """The latest record of every trainer that is there, the one that gave most in its session first."""
        self.auxiliaries: list[AuxRecord] = []
        self.sketches = Sketches()
        """What peers have published of their models."""
        self.lifetime, self.target_batch_size, self.last_step = lifetime, target_batch_size, last_step
        self._start, self._began = start, get_dht_time()
        self._moved = self._began  # when the last step was completed, by this computer's own observation
        self._open: dict[int, dict[str, PeerRecord]] = defaultdict(dict)
        self._since: dict[int, float] = {}
        self._made: dict[str, int] = {}  # the step of each live peer
        self._ordered: list[int] = []
        self.pace = _pace(self.history)
        """Seconds from one global step to the next, median over the recent ones; NaN before the third."""
        self._samples = sum(summary.samples for summary in self.history)
        self._tokens = sum(summary.tokens for summary in self.history)

    @property
    def step(self) -> int:
        """The last global step that is complete; 0 before the first one."""
        return self.history[-1].step if self.history else self._start or 0

    @property
    def samples(self) -> int:
        """Samples in the whole history."""
        return self._samples

    @property
    def tokens(self) -> int:
        """Real tokens in the whole history; those of steps that an older version wrote are missing."""
        return self._tokens

    def uncounted(self, samples: int, step: int) -> int:
        """Of so many samples until a global step, those that the history does not know of: it is of another folder."""
        return max(0, samples - sum(made.samples for made in self.history if made.step <= step))

    def update(self, records: Sequence[PeerRecord]) -> list[StepSummary]:
        """Take in what the swarm reports now; returns the steps that this completed, in order."""
        self.look(records)
        return self.complete()

    def look(self, records: Iterable[PeerRecord]) -> None:
        """Take in what the swarm reports now."""
        now, records = get_dht_time(), list(records)
        live = [record for record in records if is_live(record, self.lifetime, now)]
        self.live = sorted(live, key=lambda record: (-record.samples_total, record.peer_id))
        self._made = {record.peer_id: record.step for record in live}
        self._ordered = sorted(self._made.values())
        self.sketches.note(self.live)
        self.learn(records)
        most = self._ordered[(len(self._ordered) - 1) // 2] if self._ordered else math.inf
        lone = sorted(step for step, told in self._open.items() if len(told) == 1 and step > most)
        self._drop(lone[MAX_LONE:])

    def learn(self, records: Iterable[PeerRecord]) -> None:
        """Take in records of steps that are not complete yet, such as those that were made unobserved."""
        now = get_dht_time()
        for record in records:
            if self.step < record.step <= self.last_step:
                self._open[record.step][record.peer_id] = record
                self._since.setdefault(record.step, now)
        self._drop(sorted(self._open)[MAX_OPEN:])

    def _drop(self, steps: Iterable[int]) -> None:
        for step in steps:
            del self._open[step], self._since[step]

    def missing(self) -> range:
        """Steps that the swarm has made, as it seems, and that are not in the history, but of which most of those who
        must have made them have not been heard."""
        now = get_dht_time()
        made = [step for step in sorted(self._open) if self._is_complete(step, now)]
        if not made:
            return range(0)
        unheard = [
            step for step in range(self.step + 1, made[-1]) if 2 * len(self._open.get(step, ())) <= self._live_at(step)
        ]
        return range(unheard[0], made[-1]) if unheard else range(0)

    def complete(self) -> list[StepSummary]:
        """The steps that are complete now, in order; they are in the history from here on."""
        done: list[StepSummary] = []
        for step in sorted(self._open):
            now = get_dht_time()
            if step > self.step and not self._is_complete(step, now):
                break  # a later step waits for this one: history is in order
            records = list(self._open.pop(step).values())
            del self._since[step]
            if step <= self.step:
                continue
            summary = self._summarize(step, records, now)
            self.history.append(summary)
            self.pace, self._moved = _pace(self.history), now
            self._samples, self._tokens = self._samples + summary.samples, self._tokens + summary.tokens
            done.append(summary)
        return done

    def view(self, progress: GlobalTrainingProgress | None = None) -> SwarmView:
        """The swarm now.

        :param progress: towards the next step, as an optimizer's tracker sees it.
        """
        now, recent = get_dht_time(), self.history[-RECENT:]
        last = recent[-1] if recent else None
        shares = [summary.compute_share for summary in recent if math.isfinite(summary.compute_share)]
        roles = Counter(record.role for record in self.live)
        roles["auxiliary"] = sum(is_live(record, self.lifetime, now) for record in self.auxiliaries)
        share = wait = math.nan
        if progress is not None and progress.num_peers:
            share = min(progress.samples_accumulated / progress.target_batch_size, 1.0)
            wait = max(progress.eta_next_epoch - now, 0.0)
        return SwarmView(
            time=now,
            step=self.step,
            last_step=self.last_step,
            loss=last.loss if last else math.nan,
            samples=self.samples,
            tokens=self.tokens,
            samples_per_second=last.samples_per_second if last else math.nan,
            tokens_per_second=last.tokens_per_second if last else math.nan,
            steps_per_hour=3600 / self.pace if self.pace > 0 else math.nan,
            roles={role: roles[role] for role in ("trainer", "client", "auxiliary")},
            full_rounds_recent=_full_share(recent),
            full_rounds=_full_share(self.history),
            bytes_per_step=last.bytes_per_peer * last.peers if last else math.nan,
            utilisation=statistics.mean(shares) if shares else math.nan,
            step_progress=share,
            seconds_to_next_step=wait,
            seconds_to_end=max(self.last_step - self.step, 0) * self.pace,
        )

    def _is_complete(self, step: int, now: float) -> bool:
        # counted, not listed: a liar makes thousands of steps wait
        reporters = self._open.get(step, ())
        made = self._live_at(step) + sum(self._made.get(peer, -1) < step for peer in reporters)
        there = len(self._made) + sum(peer not in self._made for peer in reporters)
        if made == there:
            least = max(LEAST_PACE, _or(self.pace, 0.0) / FASTEST)
            return there > 1 or self._ahead(step) * least <= now - self._last_time
        waited = now - self._since[step]
        if 2 * made > there:
            return waited >= PATIENCE
        if waited < TIE_PATIENCE:
            return False
        pace = _or(self.pace, UNKNOWN_PACE) * (1.0 if 2 * made == there else STUCK)
        return self._ahead(step) * pace <= now - max(self._last_time, self._moved)

    def _live_at(self, step: int) -> int:
        """How many live peers have made this step."""
        return len(self._ordered) - bisect_left(self._ordered, step)

    def _ahead(self, step: int) -> int:
        """Steps from the last complete one; none if nobody knows where the run is."""
        return step - self.step if self.history or self._start is not None else 0

    @property
    def _last_time(self) -> float:
        return self.history[-1].time if self.history else self._began

    def _summarize(self, step: int, records: Sequence[PeerRecord], now: float) -> StepSummary:
        before = self.history[-1].time if self.history else -math.inf
        made = min(max(statistics.median(record.time for record in records), before), now)
        if 2 * sum(record.step >= step for record in self.live) <= len(self.live):
            made = now  # borne out by half of the peers or fewer: they shall not say how fast they are
        samples, given = _plausible_samples(records, self.target_batch_size)
        losses = [record.loss if record.samples else None for record in records]
        heard = iter(winsorized([loss for loss in losses if loss is not None]))
        pulled = [0.0 if loss is None else next(heard) for loss in losses]
        lengths = iter(winsorized([record.tokens / record.samples for record in records if record.samples]))
        length = [next(lengths) if record.samples else 0.0 for record in records]
        seconds = made - before if self.history and self.step == step - 1 else math.inf
        share = max(statistics.median(record.compute_share for record in records), LEAST_SHARE)
        rates, token_rates = [], []
        for record, its, each in zip(records, samples, length, strict=True):
            known = 0 < seconds < math.inf
            rate = min(record.samples_per_second, BUSY * its / (share * seconds) if known else math.inf)
            rates.append(rate)
            most = PUNCTUAL * its * each / seconds if known else 2 * rate * each
            token_rates.append(min(record.tokens_per_second, most))
        sketches = [record.sketch for record in records if len(record.sketch) == SKETCH_SIZE]
        return StepSummary(
            step=step,
            loss=weighted_mean(pulled, samples),
            samples=round(sum(given)),
            tokens=round(sum(its * each for its, each in zip(given, length, strict=True))),
            samples_per_second=sum(rates),
            tokens_per_second=sum(token_rates),
            peers=len(records),
            peers_met=min(record.peers_met for record in records),
            peers_expected=round(max(winsorized([float(record.peers_expected) for record in records]))),
            peers_averaged=sum(record.applied for record in records),
            peers_alone=sum(record.alone for record in records),
            peers_full=sum(_is_full(record) for record in records),
            parts=min(record.parts for record in records),
            bytes_per_peer=statistics.mean(winsorized([float(r.bytes_sent + r.bytes_received) for r in records])),
            model_spread=spread(sketches) if sketches else math.nan,
            matchmaking_seconds=max(winsorized([record.matchmaking_seconds for record in records])),
            allreduce_seconds=max(winsorized([record.allreduce_seconds for record in records])),
            data_wait=statistics.mean(record.data_wait for record in records),
            compute_share=statistics.mean(record.compute_share for record in records),
            averaging_wait=statistics.mean(record.averaging_wait for record in records),
            time=made,
        )


def _plausible_samples(records: Collection[PeerRecord], target: float) -> tuple[list[float], list[float]]:
    """What each peer computed for a step, and what of it went into the common model.

    Nobody gives more than `OVERSHOOT` times the target batch. Three or more who averaged say how many samples their
    round had: its median and the median size of a group give the samples of all groups; who claims more gets what
    `leveled` leaves. Fewer than half then add `SLACK - 1` of the truth at most, if the peers averaged in one group.
    """
    samples = [min(float(record.samples), OVERSHOOT * target) for record in records]
    together = [index for index, record in enumerate(records) if record.applied]
    counted = [record.round_samples for record in records if record.applied and record.round_samples]
    if len(counted) >= 3:
        groups = max(1.0, len(together) / statistics.median(record.peers_met for record in records if record.applied))
        total = SLACK * groups * statistics.median(counted)
        for index, given in zip(together, leveled([samples[i] for i in together], total), strict=True):
            samples[index] = given
    if 2 * len(together) > len(records):
        averaged = [given if record.applied else 0.0 for record, given in zip(records, samples, strict=True)]
    else:
        averaged = [
            given if record.applied or record.peers_expected == 1 else 0.0
            for record, given in zip(records, samples, strict=True)
        ]
    return samples, averaged


def _pace(history: Sequence[StepSummary]) -> float:
    recent = history[-RECENT - 1 :]
    paces = [(later.time - sooner.time) / (later.step - sooner.step) for sooner, later in pairwise(recent)]
    return statistics.median(paces) if len(paces) >= 2 else math.nan


def _is_full(record: PeerRecord) -> bool:
    return record.peers_met >= record.peers_expected and (record.applied or record.peers_expected == 1)


def _full_share(history: Sequence[StepSummary]) -> float:
    rounds = sum(summary.peers for summary in history)
    return sum(summary.peers_full for summary in history) / rounds if rounds else math.nan


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise
