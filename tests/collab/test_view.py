"""The view of a run as JSON and for Prometheus: exact, bounded, and without anybody's address."""

import json
import math
import re
from dataclasses import replace

import pytest
from hivemind.optim.progress_tracker import GlobalTrainingProgress
from hivemind.utils import get_dht_time

from collab.background import Health
from collab.console import bar
from collab.events import Event
from collab.monitor import Monitor, StepSummary
from collab.page import render_page
from collab.view import (
    OF_SWARM,
    ExpertView,
    PeerView,
    Round,
    RunView,
    as_json,
    as_prometheus,
    from_json,
    live_line,
    look,
    peer_views,
    step_line,
)
from tests.collab.test_monitor import record

RUN = RunView(
    run_id="bengali",
    task="masked language modelling",
    started=1000.0,
    updated=2000.5,
    global_step=3,
    max_steps=10,
    finished=False,
    history=[Round(s, 1000.0 + 10 * s, 9.0 / s, 80.0, 2 if s == 2 else 3, 3, 3) for s in (1, 2, 3)],
    peers=[PeerView("asha", "trainer", 31.5, 1204, 3, 3, 3, 3.1), PeerView("bela", "client", 9.0, 10, 3, 3, 3, 3.0)],
    join_command="python run_trainer.py --initial_peers /ip4/203.0.113.7/tcp/1/p2p/Qm",
    samples=12_345,
    contributors=[("asha", 1204), ("bela", 10)],
    duties=[Health("Keeping checkpoints", 2, "OSError: disk full", 1.5)],
    events=[Event(1500.0, "joined", "bela joined")],
    experts=[ExpertView(3, "attic", 8.5, 1200.0, 77)],
    experts_total=8,
    swarm=dict.fromkeys(OF_SWARM) | {"tokens": 1e6, "peers_auxiliary": 2.0},
)
SAMPLE = re.compile(r'([a-z_]+)\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+)\} (\S+)')


def prometheus(run: RunView) -> dict[tuple[str, str], float]:
    """Read strictly: each sample belongs to the family that HELP and TYPE have just named, and none comes twice."""
    found: dict[tuple[str, str], float] = {}
    families: list[str] = []
    text = as_prometheus(run)
    assert text.endswith("\n")
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            families.append(line.split()[2])
            kind = next(lines).split()
            assert kind[:3] == ["#", "TYPE", families[-1]] and kind[3] in ("gauge", "counter")
            assert families[-1].endswith("_total") == (kind[3] == "counter")
            continue
        match = SAMPLE.fullmatch(line)
        assert match and match[1] == families[-1], line
        labels = re.sub(r'run_id="[^"]*",?', "", match[2])
        assert (match[1], labels) not in found
        found[match[1], labels] = float(match[3])
    assert len(families) == len(set(families))
    return found


def test_prometheus_reads_the_runs_numbers() -> None:
    read = prometheus(RUN)
    assert read["samiti_global_step", ""] == 3 and read["samiti_loss", ""] == 3.0
    assert read["samiti_samples_total", ""] == 12_345
    assert read["samiti_peers", 'role="client"'] == 1
    assert read["samiti_tokens_total", ""] == 1e6 and read["samiti_auxiliary_peers", ""] == 2
    assert ("samiti_utilisation_ratio", "") not in read  # not known
    assert read["samiti_recent_rounds", 'verdict="partial"'] == 1
    assert read["samiti_duty_failures_total", 'duty="Keeping checkpoints"'] == 2


def test_prometheus_survives_hostile_and_missing_values() -> None:
    duty = Health('a "b"\n\\c', 1, "", math.inf)
    read = prometheus(replace(RUN, run_id='x"\n# HELP y', history=[], max_steps=None, duties=[duty]))
    assert not [name for name, _ in read if name in ("samiti_loss", "samiti_max_global_steps")]


def test_json_comes_back_as_it_was() -> None:
    again = from_json(as_json(RUN))
    assert again == replace(RUN, contributors=[("asha", 1204), ("bela", 10)])
    assert json.loads(as_json(RUN))["loss"] == 3.0


def test_json_has_neither_nan_nor_addresses_nor_floods() -> None:
    where = "198.51.100.23"
    run = replace(
        RUN,
        history=[Round(s, 1.0, math.nan, 1.0, 1, 1, 1) for s in range(100_000)],
        peers=[PeerView("x" * 10_000_000 + where, f"at {where}", 1.0, 1, 1, 1, 1, math.inf, device=where)],
        duties=[Health("Dialing", 1, f"no answer from /ip4/{where}/tcp/1", 1.0)],
        events=[Event(1.0, "note", f"{where} came\u202e")],
        contributors=[(where, 1)],
    )
    text = as_json(run)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert where not in text and "\u202e" not in text and len(text) < 20_000


BROKEN = [as_json(RUN).replace('"name"', '"nom"'), as_json(RUN).replace("1500.0", "1e300"), "[" * 5000]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 2}', "null", *BROKEN])
def test_what_is_no_view_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)


def test_a_slow_peer_is_slow_beside_the_others() -> None:
    views = peer_views([record(str(i), 5, samples_per_second=speed) for i, speed in enumerate((40.0, 44.0, 9.0))])
    assert {view.samples_per_second: view.slow for view in views} == {40.0: False, 44.0: False, 9.0: True}


def summary(step: int, **known: float) -> StepSummary:
    return StepSummary.from_metrics({"step": step, "loss": 2.0, "samples": 64, "time": 1000.0 + 20 * step} | known)


def test_the_console_says_what_the_page_says() -> None:
    seen = replace(RUN, seconds_to_end=70.0, swarm={"step_progress": 0.5})
    assert live_line(seen) == f"step 4/10 {bar(0.5)}  50%  loss 3.000  80 samples/s  peers 3/3  1:10 min left"
    assert "about 70 seconds left" in render_page(seen)
    assert "left" not in live_line(replace(seen, seconds_to_end=None))
    waiting = replace(RUN, history=[], swarm={"step_progress": math.nan})
    assert live_line(waiting) == "Waiting for the first trainer ..."
    assert live_line(replace(waiting, history=RUN.history)) == "Waiting for trainers ..."


def test_what_a_monitor_sees_is_the_view() -> None:
    monitor = Monitor([summary(step) for step in (1, 2, 3)], last_step=10)
    monitor.live = [record("asha", 3)]
    progress = GlobalTrainingProgress(3, 32, 64, 1, 0, get_dht_time() + 60.0, 0.0)
    seen = look(monitor, progress, run_id="bengali", task="masked language modelling", started=5.0)
    assert (seen.started, seen.global_step, seen.max_steps, seen.samples) == (1020.0, 3, 10, 192)
    assert seen.seconds_to_end == 140.0 and 50.0 < (seen.seconds_to_next_step or 0.0) <= 60.0
    assert seen.swarm["step_progress"] == 0.5 and [peer.name for peer in seen.peers] == ["name of asha"]
    assert look(monitor, progress, run_id="x", task="x", started=5.0, finished=True).seconds_to_next_step is None
    unknown = look(Monitor(), run_id="x", task="x", started=5.0)
    assert (unknown.started, unknown.seconds_to_end, unknown.seconds_to_next_step) == (5.0, None, None)


def test_a_step_that_was_made_alone_is_loud_in_the_console() -> None:
    assert "ALONE" not in step_line(summary(3), 10, started=0.0)
    assert "step    3/10" in (line := step_line(summary(3, peers_alone=2), 10, started=0.0)) and "2 ALONE" in line
