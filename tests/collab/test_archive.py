"""Which checkpoints stay on the disk, and what a process that was killed leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab.archive import Archive
from collab.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]


def keep(archive: Archive, losses: dict[int, float | None], run: str | None = None) -> None:
    for step, loss in losses.items():
        archive.place(step).mkdir(parents=True)
        state = {"global_step": step, "swarm_id": run or archive.run} | ({"held_out_loss": loss} if loss else {})
        (archive.place(step) / "trainer_state.json").write_text(json.dumps(state))


def names(archive: Archive) -> list[str]:
    return sorted(path.name for path in archive.folder.iterdir())


@pytest.mark.parametrize(
    ("last", "every", "best", "kept"),
    [
        (2, 0, 0, [500, 600]),
        (1, 300, 0, [300, 600]),
        (1, 0, 2, [200, 300, 600]),
        (2, 200, 1, [200, 300, 400, 500, 600]),
        (9, 0, 0, [100, 200, 300, 400, 500, 600]),
    ],
)
def test_three_rules_keep_checkpoints(tmp_path: Path, last: int, every: int, best: int, kept: list[int]) -> None:
    archive = Archive(tmp_path / "checkpoints", "run_1")
    keep(archive, {100: None, 200: 2.5, 300: 2.25, 400: 2.75, 500: 3.0, 600: None})
    gone = archive.prune(last, every, best)
    assert list(archive.steps()) == kept and sorted([*gone, *kept]) == [100, 200, 300, 400, 500, 600]
    assert names(archive) == [f"step-{step:07d}" for step in kept]


@given(st.sets(st.integers(1, 300), min_size=1), st.integers(1, 4), st.integers(0, 20), st.integers(0, 3))
def test_pruning_after_every_checkpoint_keeps_the_newest(tmp_path_factory, steps, last, every, best) -> None:
    archive = Archive(tmp_path_factory.mktemp("checkpoints"), "run_1")
    for step in sorted(steps):
        keep(archive, {step: 1 + 1 / step})
        archive.prune(last, every, best)
        assert step in archive.steps()
    expected = set(sorted(steps)[-max(last, best) :]) | {step for step in steps if every and step % every == 0}
    assert set(archive.steps()) == expected


def test_checkpoints_of_another_run_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    archive = Archive(tmp_path, "run_2")
    keep(archive, {100: 2.0, 700: 1.0}, run="run_1")
    keep(archive, {5: 9.0, 6: 9.0})
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-0000099").mkdir()
    (tmp_path / "step-0000099" / "trainer_state.json").write_text("[]")
    assert archive.prune(1, 0, 0) == [5]
    assert list(archive.steps()) == [6]
    assert names(archive) == ["step-0000006", "step-0000099", "step-0000100", "step-0000700", "step-notes"]


def test_a_folder_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    archive = Archive(tmp_path, "run_1")
    keep(archive, {1: 1.0, 2: 2.0})
    archive.place(1).rename(tmp_path / ".step-0000001.abc.old")
    (tmp_path / ".step-0000001.abc.partial").mkdir()
    (tmp_path / ".step-0000002.xyz.old").mkdir()
    archive.mend()
    assert names(archive) == ["step-0000001", "step-0000002"] and list(archive.steps()) == [1, 2]


def test_killed_in_the_middle_of_writing_it_leaves_the_older_ones_whole_and_no_half_one(tmp_path: Path) -> None:
    program = """
        import sys, torch
        from pathlib import Path
        from collab.checkpoint import save_checkpoint
        from safetensors.torch import save_file
        folder, step = Path(sys.argv[1]), 0
        while True:
            step += 1
            save_checkpoint(
                folder / f"step-{1 + step % 3:07d}",
                save_pretrained=lambda scratch: save_file({"w": torch.ones(200_000)}, scratch / "model.safetensors"),
                optimizer_state={"state": {0: {"exp_avg": torch.ones(200_000)}}},
                trainer_state={"global_step": 1 + step % 3, "swarm_id": "run_1"},
                model_card="",
            )
    """
    archive = Archive(tmp_path, "run_1")
    for delay in (0.0, 0.004, 0.009, 0.013):  # after the second one is there: in the middle of one of the next
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], cwd=ROOT)
        try:
            deadline = time.monotonic() + 60
            while not (archive.place(2).exists() and archive.place(3).exists()) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(delay)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        archive.mend()
        assert [name for name in names(archive) if name.startswith(".")] == []
        assert {2, 3} <= set(archive.steps())
        for step in archive.steps():
            assert len(load_checkpoint(archive.place(step)).optimizer_state["state"][0]["exp_avg"]) == 200_000
