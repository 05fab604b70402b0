"""What a run looks like at one moment, as plain data: the page, the terminal, JSON and Prometheus all show this."""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from hivemind.optim.progress_tracker import GlobalTrainingProgress

from collab.background import Health
from collab.console import bar, duration
from collab.events import Event
from collab.metrics import PeerRecord
from collab.monitor import Monitor, StepSummary
from collab.public_text import public_line, public_name

SHOWN_ROUNDS = 40
SHOWN_CONTRIBUTORS = 100
JSON_VERSION = 1
STATUS = "status.json"  # in the run's folder
STATUS_PROTOCOL = "samiti/status/1"  # under this name an auxiliary peer serves that file
SLOW = 0.25  # of the median peer's speed

OF_SWARM = {
    "tokens": ("tokens_total", "counter", "Real tokens in those samples."),
    "tokens_per_second": ("tokens_per_second", "gauge", "Of all peers together, waiting included."),
    "steps_per_hour": ("steps_per_hour", "gauge", "Global steps, over the recent ones."),
    "full_rounds": ("full_rounds_ratio", "gauge", "Share of all rounds in which all met that were expected."),
    "bytes_per_step": ("bytes_per_step", "gauge", "Payload that all peers together sent and received."),
    "utilisation": ("utilisation_ratio", "gauge", "Compute time of all time, over peers and recent steps."),
    "peers_auxiliary": ("auxiliary_peers", "gauge", "Live auxiliary peers."),
}  # in `RunView.swarm`: name, kind and help for Prometheus

Verdict = Literal["full", "partial", "alone"]


class LossAt(Protocol):
    """A point of the curve."""

    @property
    def step(self) -> float: ...
    @property
    def loss(self) -> float | None: ...


class AnyRound(LossAt, Protocol):
    """A global step as `Round` has it; `monitor.StepSummary` is one, too."""

    @property
    def step(self) -> int: ...
    @property
    def time(self) -> float: ...
    @property
    def samples_per_second(self) -> float: ...
    @property
    def peers_met(self) -> int: ...
    @property
    def peers_expected(self) -> int: ...
    @property
    def peers(self) -> int: ...


@dataclass(frozen=True)
class Round:
    """One global step as the swarm lived it.

    :param time: when it ended, in seconds since 1970.
    :param loss: mean over the peers that reported one; None if nobody did.
    :param samples_per_second: of all peers together.
    :param peers_met: how many peers averaged together in this round, this one included.
    :param peers_expected: how many should have.
    :param peers: how many were known to be alive.
    """

    step: int
    time: float
    loss: float | None
    samples_per_second: float
    peers_met: int
    peers_expected: int
    peers: int


@dataclass(frozen=True)
class PeerView:
    """One live peer. `name` comes from a stranger; `loss` is None for a peer that does not train.

    :param samples: given in this session.
    :param device: what it computes on; empty if it does not say.
    :param data_wait: share of its time in which it waited for samples, from 0 to 1.
    :param memory: bytes that it has taken at most.
    :param slow: its speed is less than a quarter of the median peer's.
    """

    name: str
    role: str
    samples_per_second: float
    samples: int
    last_step: int
    peers_met: int
    peers_expected: int
    loss: float | None = None
    device: str = ""
    data_wait: float | None = None
    memory: int | None = None
    slow: bool = False


@dataclass(frozen=True)
class ExpertView:
    """An expert that a peer serves, in a run that has some.

    :param index: its number in the run.
    :param server: public name of who serves it: a stranger's word.
    :param milliseconds: that the auxiliary peer has waited for its answers lately; None if it gives none.
    :param rows_per_second: tokens that it computes now, in both passes together.
    :param steps: that it has been trained for.
    """

    index: int
    server: str
    milliseconds: float | None
    rows_per_second: float
    steps: int


@dataclass(frozen=True)
class RunView:
    """Everything that is shown.

    :param task: for people, as in "masked language modelling".
    :param started: when the run began, in seconds since 1970.
    :param updated: when this view was made, in seconds since 1970.
    :param max_steps: where the run ends; None if nobody decided that.
    :param finished: nothing will change any more: the page stops refreshing and invites nobody.
    :param join_command: what a volunteer types.
    :param checkpoint: the folder or the address of the newest checkpoint.
    :param tracker: what to open or to type for all curves.
    :param can_fill_mask: a checkpoint can be tried with a gap in a sentence.
    :param samples: of the whole run.
    :param seconds_to_next_step: None while nobody trains.
    :param seconds_to_end: None as long as there is no pace.
    :param contributors: (public name, samples), the largest first.
    :param duties: how each duty of the auxiliary peer is doing.
    :param events: the newest first.
    :param experts: that are served, by their number; those that nobody serves are missing.
    :param experts_total: that the run has; 0 if its task has none.
    :param swarm: further figures of the whole swarm by name, see `monitor.SwarmView`; NaN if they are not known.
    """

    run_id: str
    task: str
    started: float
    updated: float
    global_step: int
    max_steps: int | None
    finished: bool
    history: Sequence[AnyRound]
    peers: Sequence[PeerView]
    join_command: str | None = None
    checkpoint: str | None = None
    tracker: str | None = None
    can_fill_mask: bool = False
    samples: int = 0
    seconds_to_next_step: float | None = None
    seconds_to_end: float | None = None
    contributors: Sequence[tuple[str, int]] = ()
    duties: Sequence[Health] = ()
    events: Sequence[Event] = ()
    experts: Sequence[ExpertView] = ()
    experts_total: int = 0
    swarm: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Of the last round in which anybody reported one."""
        return next((r.loss for r in reversed(self.history) if r.loss is not None and math.isfinite(r.loss)), None)

    @property
    def samples_per_second(self) -> float | None:
        """Of all peers together, while they compute, in the last round."""
        return self.history[-1].samples_per_second if self.history else None


def verdict(met: int, expected: int) -> Verdict:
    """How a round went: everybody who was expected met, some did, or the peer was alone although others were there."""
    if met >= expected:
        return "full"
    return "partial" if met > 1 else "alone"


def peer_views(records: Sequence[PeerRecord]) -> list[PeerView]:
    """The peers that have reported, the one that gave most first."""
    speeds = [record.samples_per_second for record in records if record.samples_per_second > 0]
    slow = SLOW * statistics.median(speeds) if speeds else 0.0
    views = [
        PeerView(
            name=record.name,
            role="client" if record.client_mode else "trainer",
            samples_per_second=record.samples_per_second,
            samples=record.samples_total,
            last_step=record.step,
            peers_met=record.peers_met,
            peers_expected=record.peers_expected,
            loss=record.loss,
            device=getattr(record, "device", ""),
            data_wait=record.data_wait,
            memory=record.memory or None,
            slow=record.samples_per_second < slow,
        )
        for record in records
    ]
    return sorted(views, key=lambda peer: (-peer.samples, peer.name))


def look(
    monitor: Monitor,
    progress: GlobalTrainingProgress | None = None,
    *,
    started: float,
    finished: bool = False,
    **more: Any,
) -> RunView:
    """The run as a monitor sees it now.

    :param progress: towards the next step, as an optimizer's tracker sees it.
    :param started: when the run began if it has no history yet, in seconds since 1970.
    :param more: the fields of `RunView` that no monitor knows.
    """
    now = monitor.view(progress)
    return RunView(
        **more,
        started=monitor.history[0].time if monitor.history else started,
        updated=time.time(),
        global_step=now.step,
        max_steps=now.last_step,
        finished=finished,
        history=list(monitor.history),
        peers=peer_views(monitor.live),
        samples=now.samples,
        seconds_to_next_step=None if finished else _known(now.seconds_to_next_step),
        seconds_to_end=_known(now.seconds_to_end),
        swarm=now.as_numbers(),
    )


def live_line(run: RunView) -> str:
    """What is going on between two steps, for a console, with the time left for the whole run."""
    share, last = run.swarm.get("step_progress"), run.history[-1] if run.history else None
    if share is None or not math.isfinite(share):
        return f"Waiting for {'trainers' if run.history else 'the first trainer'} ..."
    line = f"step {run.global_step + 1}/{run.max_steps} {bar(share)} {share:4.0%}"
    if last is not None:
        line += f"  loss {last.loss:.3f}" if last.loss is not None else ""
        line += f"  {last.samples_per_second:.0f} samples/s  peers {last.peers_met}/{last.peers_expected}"
    return line + (f"  {duration(run.seconds_to_end)} left" if run.seconds_to_end is not None else "")


def step_line(made: StepSummary, last_step: int, started: float) -> str:
    """A global step, for a console.

    :param started: when the program did, in seconds since 1970.
    """
    alone = f"  {made.peers_alone} ALONE" if made.peers_alone else ""
    return (
        f"{duration(made.time - started):>9}  step {made.step:>4}/{last_step}  loss {made.loss:.3f}  "
        f"{made.samples_per_second:5.0f} samples/s  peers {made.peers_met}/{made.peers_expected}{alone}"
    )


def sum_up(history: Sequence[StepSummary], run: RunView, peers: int, assisted: int, began: float) -> dict[str, Any]:
    """What `summary.json` says of a run.

    :param peers: that have given samples.
    :param assisted: rounds that this program has helped with.
    :param began: when the program did, in seconds since 1970.
    """
    return {
        "peers": peers,
        "global_steps": run.global_step,
        "first_loss": round(history[0].loss, 4) if history else None,
        "last_loss": round(history[-1].loss, 4) if history else None,
        "samples": run.samples,
        "rounds_averaged": sum(s.peers_averaged == s.peers and s.peers_met > 1 for s in history),
        "rounds_alone": sum(s.peers_alone for s in history),
        "rounds_assisted": assisted,
        "wall_seconds": round(run.updated - began, 1),
        "checkpoint": run.checkpoint,
        "join_command": run.join_command,
    }


def as_json(run: RunView) -> str:
    """The view for programs: the keys of docs/page.md, numbers that are not finite as null, strangers' words public."""
    content = asdict(_public(run)) | {"version": JSON_VERSION, "loss": run.loss}
    return json.dumps(_finite(content), allow_nan=False, ensure_ascii=False)


def from_json(text: str | bytes) -> RunView:
    """The view that `as_json` wrote, here or on another computer.

    :raises ValueError: it is not one, or one of another version.
    """
    try:
        content = json.loads(text)
        if content.pop("version") != JSON_VERSION:
            raise ValueError("it was written by another version of the code")
        content.pop("loss")
        parts = {"history": Round, "peers": PeerView, "duties": Health, "events": Event, "experts": ExpertView}
        made: dict[str, Any] = {name: [kind(**entry) for entry in content.pop(name)] for name, kind in parts.items()}
        contributors = [(str(name), int(samples)) for name, samples in content.pop("contributors")]
        run = RunView(**content, **made, contributors=contributors)
        as_prometheus(run)  # reads the numbers
        for moment in (run.started, run.updated, *(event.time for event in run.events)):
            datetime.fromtimestamp(moment, UTC)
        return _public(run)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError, OSError) as error:
        raise ValueError(f"this is no view of a run: {error!r}") from error


def as_prometheus(run: RunView) -> str:
    """The view in Prometheus' text format, version 0.0.4.

    Peers are counted, not listed: a label that strangers choose would let anybody fill the database that reads this.
    """
    last = run.history[-1] if run.history else None
    roles = {role: sum(peer.role == role for peer in run.peers) for role in ("trainer", "client")}
    verdicts = [verdict(r.peers_met, r.peers_expected) for r in run.history[-SHOWN_ROUNDS:]]
    families: list[tuple[str, str, str, list[tuple[dict[str, str], float | None]]]] = [
        ("global_step", "gauge", "Global steps that are complete.", [({}, run.global_step)]),
        ("max_global_steps", "gauge", "Where the run ends.", [({}, run.max_steps)]),
        ("loss", "gauge", "Training loss of the last step, in nats.", [({}, run.loss)]),
        ("samples_total", "counter", "Samples averaged into the model.", [({}, run.samples)]),
        ("samples_per_second", "gauge", "Of all peers together, while they compute.",
         [({}, run.samples_per_second)]),
        ("peers", "gauge", "Live peers by role.", [({"role": role}, count) for role, count in roles.items()]),
        ("slow_peers", "gauge", "Live peers below a quarter of the median speed.",
         [({}, sum(peer.slow for peer in run.peers))]),
        ("round_peers_met", "gauge", "Peers that averaged together last.", [({}, last.peers_met if last else None)]),
        ("round_peers_expected", "gauge", "Peers that should have.", [({}, last.peers_expected if last else None)]),
        ("recent_rounds", "gauge", f"The last {SHOWN_ROUNDS} rounds by how they went.",
         [({"verdict": how}, verdicts.count(how)) for how in ("full", "partial", "alone")]),
        ("experts", "gauge", "Experts that the run has.", [({}, run.experts_total or None)]),
        ("experts_alive", "gauge", "Experts that answer.",
         [({}, sum(e.milliseconds is not None for e in run.experts) if run.experts_total else None)]),
        ("seconds_to_next_step", "gauge", "Until enough samples are there.", [({}, run.seconds_to_next_step)]),
        ("seconds_to_end", "gauge", "To the end of the run at this pace.", [({}, run.seconds_to_end)]),
        ("contributors", "gauge", "Public names that have given samples.", [({}, len(run.contributors))]),
        ("duty_failures_total", "counter", "Turns of the auxiliary peer's duties that failed.",
         [({"duty": duty.name}, duty.failures) for duty in run.duties]),
        ("duty_silent_seconds", "gauge", "Since a turn of the duty ended well.",
         [({"duty": duty.name}, duty.silent_seconds) for duty in run.duties]),
        ("updated_timestamp_seconds", "gauge", "When these figures were taken.", [({}, run.updated)]),
    ]  # fmt: skip
    families += [(name, kind, text, [({}, run.swarm.get(key))]) for key, (name, kind, text) in OF_SWARM.items()]
    lines = []
    for name, kind, help_text, samples in families:
        lines += [f"# HELP samiti_{name} {help_text}", f"# TYPE samiti_{name} {kind}"]
        for labels, value in samples:
            if value is not None and math.isfinite(value):
                pairs = {"run_id": run.run_id} | labels
                inside = ",".join(f'{key}="{_label(text)}"' for key, text in pairs.items())
                lines.append(f"samiti_{name}{{{inside}}} {value:.17g}")
    return "\n".join(lines) + "\n"


def _public(run: RunView) -> RunView:
    """The view with strangers' words and errors as public lines, and no more rounds and names than are shown."""
    return replace(
        run,
        history=[
            Round(r.step, r.time, r.loss, r.samples_per_second, r.peers_met, r.peers_expected, r.peers)
            for r in run.history[-SHOWN_ROUNDS:]
        ],
        peers=[
            replace(p, name=public_name(p.name), role=public_name(p.role), device=public_line(p.device, 60))
            for p in run.peers
        ],
        contributors=[(public_name(name), samples) for name, samples in run.contributors[:SHOWN_CONTRIBUTORS]],
        duties=[replace(d, name=public_line(d.name), last_error=public_line(d.last_error)) for d in run.duties],
        events=[replace(event, text=public_line(event.text)) for event in run.events],
        experts=[replace(expert, server=public_name(expert.server)) for expert in run.experts],
        swarm={name: run.swarm.get(name) for name in OF_SWARM},
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(text: str) -> str:
    return public_line(text).replace("\\", r"\\").replace('"', r"\"")
