"""The run's manifest while it goes on: it outlives its organizer's absence, and only the organizer changes it."""

import re
from pathlib import Path

import pytest

from collab.manifest import read_kept
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, wait_until

pytestmark = pytest.mark.swarm


@pytest.fixture
def run(swarm: Swarm) -> tuple[Program, str, str]:
    """A trainer that makes a global step in a few seconds, its address, and its organizer's id, who has left."""
    auxiliary, address = swarm.start_auxiliary(swarm.configure(max_global_steps=60, target_batch_size=8192))
    trainer = swarm.start_trainer("early", address)
    trainer.wait_for_output("step 2/60")
    kept = read_kept(swarm.folder / "run")
    assert kept is not None and kept.version == 1
    noted = swarm.folder / "run" / "peers.txt"
    wait_until(noted.exists, 15, trainer.output)
    auxiliary.interrupt()
    assert auxiliary.wait() == 0, auxiliary.output()
    return trainer, noted.read_text().split()[0], kept.organizer


def test_a_run_outlives_its_organizer_who_alone_can_change_it(
    swarm: Swarm, run: tuple[Program, str, str], tmp_path: Path
) -> None:
    trainer, address, organizer = run
    at = steps_made(trainer) + 7  # by then the organizer is back, also on a busy computer
    changed = swarm.configure(max_global_steps=at + 2, learning_rate=0.001, target_batch_size=8192)
    at_step = ("--change_at_step", str(at))

    # Nobody else changes it, and nobody has to believe a volunteer who the organizer is.
    elsewhere = ("--cache_dir", str(tmp_path / "elsewhere"))
    claim = ("--config", str(changed), "--initial_peers", address, "--organizer", organizer, *elsewhere)
    folder = ("--run_folder", str(tmp_path / "strange"))
    stranger = swarm.start("stranger", "run_aux_peer.py", *claim, *folder, *at_step)
    # With a cache of its own: the stranger, who was told, remembers the organizer in the other one.
    doubter = swarm.start_trainer("doubter", address, "--cache_dir", str(tmp_path / "nowhere"))
    assert (stranger.wait(), doubter.wait()) == (1, 1)
    assert f"Only the run's organizer can change it, the peer {organizer}" in stranger.output()
    assert f"add: --organizer {organizer}" in doubter.output()
    assert "Traceback" not in stranger.output() + doubter.output()

    # A volunteer hands the manifest on; the organizer comes back, and the change reaches those who train.
    late = swarm.start_trainer("late", address, "--organizer", organizer)
    auxiliary, _ = swarm.start_auxiliary(changed, *at_step)
    said = f"Settings from global step {at} on: learning_rate 0.001 (was 0.002), max_global_steps {at + 2} (was 60)"
    for program in (trainer, late, auxiliary):
        assert program.wait() == 0, program.output()
        assert said in program.output(), program.output()
    for program in (trainer, late):
        assert f"step {at}/60" in program.output() and f"step {at + 2}/{at + 2}" in program.output()


def steps_made(trainer: Program) -> int:
    return max(int(number) for number in re.findall(r"^step (\d+)/", trainer.output(), re.MULTILINE))
