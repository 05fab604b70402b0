"""The status in a terminal: as wide as the terminal, without colours where none are wanted, and safe to print."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hivemind.utils import get_dht_time
from hypothesis import given
from hypothesis import strategies as st

from arguments import agreed_settings
from collab.background import Health
from collab.events import Event
from collab.manifest import Manifest
from collab.metrics import publish_record, run_validators
from collab.peer import Peer
from collab.view import STATUS_PROTOCOL, PeerView, as_json
from scripts.status import Swarm, as_text, coloured, columns, fit, sparkline
from tests.collab.conftest import guarded, start_peer  # noqa: F401 - fixtures
from tests.collab.test_monitor import record
from tests.collab.test_view import RUN
from tests.swarm.processes import wait_until


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    bengali = PeerView("পরিমল " * 6, "trainer", 31.5, 12_345_678, 1, 1, 3, 3.1, "NVIDIA GeForce RTX 4070", 0.1, 2**33)
    peers = [bengali, PeerView("模型" * 10, "client", 9.0, 10, 3, 2, 3, 3.0)]
    lines = as_text(replace(RUN, peers=peers, join_command=None), width).splitlines()
    assert max(map(columns, lines)) <= width
    text = "\n".join(lines)
    assert "alone" in text and "step 3 of 10" in text and "bela joined" in text
    assert ("device" in text) == (width == 200), "the least telling column goes first"


def test_it_says_who_is_alone_slow_or_behind_without_colours() -> None:
    slow = PeerView("asha", "trainer", 1.0, 5, 1, 1, 3, 3.1, slow=True)
    text = as_text(replace(RUN, global_step=9, peers=[slow]), 120)
    assert "1/3 alone" in text and "1.0 slow" in text and "1 (8 behind)" in text and "\x1b" not in text
    assert "\x1b[31m" in as_text(replace(RUN, peers=[slow]), 120, colours=True)


def test_a_stranger_cannot_steer_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202ename"
    run = replace(
        RUN,
        run_id=evil,
        task=evil,
        peers=[PeerView(evil, evil, 1.0, 1, 1, 1, 1, device=evil)],
        contributors=[(evil, 1)],
        events=[Event(1.0, "note", evil)],
        duties=[Health(evil, 1, evil, 0.0)],
        join_command=evil,
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", as_text(run, 100))


def test_colours_are_for_terminals_of_people_who_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured(True) and not coloured(False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured(True)


def test_many_peers_are_cut_to_the_screen() -> None:
    text = as_text(replace(RUN, peers=[RUN.peers[0]] * 500), 80, rows=5)
    assert "and 495 more" in text and text.count("asha") == 6, "five peers and one contributor"


@given(st.text(max_size=60), st.integers(1, 40))
def test_any_text_fits(text: str, width: int) -> None:
    assert columns(fit(text, width)) <= width
    assert columns(fit(text, width, pad=True)) == width


def test_a_sparkline_falls_with_the_loss_and_leaves_gaps() -> None:
    assert sparkline([8.0, None, 4.5, float("nan"), 1.0]) == "█ ▅ ▁"
    assert sparkline([]) == "" and sparkline([3.0, 3.0]) == "▁▁"


def test_without_an_auxiliary_peer_the_records_tell(
    start_peer: Callable[..., Peer],  # noqa: F811
    tmp_path: Path,
) -> None:
    organizer = start_peer()
    settings = agreed_settings({"run_id": "bengali"})
    manifest = Manifest.found(settings, {}, organizer.private_key)
    client = start_peer(initial_peers=organizer.addresses(), client_mode=True)
    for peer in (organizer, client):
        peer.dht.add_validators(run_validators("bengali", "bengali_1", 30.0))
    now = get_dht_time()
    publish_record(organizer, "bengali", record(organizer.peer_id, 7, name="asha", time=now, reported=now), lifetime=60)
    swarm = Swarm(client, manifest)
    wait_until(lambda: bool(swarm.look().peers), 30, lambda: "no record came")

    assert swarm.look().global_step == 7 and [peer.name for peer in swarm.look().peers] == ["asha"]
    (tmp_path / "status.json").write_text(as_json(RUN))
    organizer.serve(STATUS_PROTOCOL, tmp_path / "status.json")
    told = swarm.look()
    assert told.samples == RUN.samples and told.events == RUN.events
    assert [peer.name for peer in told.peers] == ["asha"], "who is there, the records say, not the auxiliary peer"
    (tmp_path / "status.json").write_text("[" * 1000)
    assert swarm.look().global_step == 7
