"""No room on the disk, a read-only folder, no free file descriptor: told clearly, and training goes on where it can."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from collab.trackers import read_history
from tests.chaos.prices import Price
from tests.collab.test_trackers import trackio_steps
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, wait_until

pytestmark = pytest.mark.chaos

AVERAGING_TIMEOUT, LOOKING = 8.0, 10.0
REFUSED = "No checkpoint can be written: No space left on device"


class Disk:
    """A small disk of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._filler = folder, folder / "filler"

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        self._filler.unlink()

    def write_protect(self) -> None:
        command = ["mount", "-o", "remount,ro", str(self.folder)]

        def done() -> bool:  # not while a process that is about to end has a file open there
            return subprocess.run(command, capture_output=True, timeout=20).returncode == 0

        wait_until(done, 10, lambda: f"{self.folder} stays busy")


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[dict[str, Disk]]:
    """Of the auxiliary peer and of a trainer."""
    mounted: list[Path] = []
    try:
        for name in ("run", "cache"):
            folder = tmp_path / name
            folder.mkdir()
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(folder)], capture_output=True)
            if done.returncode:
                pytest.skip(f"NOT TESTED: a full disk, because none can be mounted here: {done.stderr.decode()}")
            mounted.append(folder)
        yield {folder.name: Disk(folder) for folder in mounted}
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal(program: Program) -> str:
    assert program.wait() == 1, program.output()
    assert program.output().count("error: ") == 1 and "Traceback" not in program.output(), program.output()
    return program.output().rpartition("error: ")[2]


def test_full_and_read_only_disks_cost_what_would_have_been_written_and_nothing_else(
    disks: dict[str, Disk], swarm: Swarm, price: Price
) -> None:
    run, cache = disks["run"].folder, disks["cache"].folder
    shutil.copy(swarm.cache_dir / "embedded_corpus.json", cache)
    config = swarm.configure(max_global_steps=1000, target_batch_size=1024, save_every=2, report_to=["trackio"])
    auxiliary, address = swarm.start_auxiliary(config)
    own = ("--cache_dir", str(cache))
    trainer = swarm.start_trainer("trainer", address, *own, "--save_dir", str(cache / "saved"))

    def made() -> int:
        return auxiliary.output().count("  step ")

    auxiliary.wait_for_output("held out loss")
    for disk in disks.values():
        disk.fill()
    whole = contents(run / "checkpoints")
    auxiliary.wait_for_output(REFUSED)
    trainer.wait_for_output("After a restart this peer will see some samples again")
    before = made()
    wait_until(lambda: made() >= before + 4, 120, auxiliary.output)  # several attempts later
    assert auxiliary.output().count(REFUSED) == 1, auxiliary.output()
    assert contents(run / "checkpoints").items() >= whole.items(), "a good file was replaced by half of one"
    assert not list(run.rglob("*.partial")) and not list(cache.rglob("*.partial"))

    freed, told = time.monotonic(), auxiliary.output().count("Saved the state of global step")
    for disk in disks.values():
        disk.free()
    auxiliary.wait_for_output("Saved the state of global step", times=told + 1)
    saved_again = time.monotonic() - freed
    trainer.interrupt()
    assert trainer.wait() == 0, trainer.output()
    [place] = cache.glob("places/*/*.json")
    assert json.loads(place.read_text())["state"]["batches"] > 0 and (cache / "saved" / "trainer_state.json").exists()

    # ---- the trainer comes back, and its disk is read-only
    disks["cache"].write_protect()
    message = refusal(swarm.start_trainer("ambitious", address, *own, "--save_dir", str(cache / "saved")))
    assert "Read-only file system" in message and "give another folder" in message
    modest = swarm.start_trainer("modest", address, *own)
    modest.wait_for_output("\nstep ")
    wait_until(lambda: "modest" in (run / "contributions.json").read_text(), 120, auxiliary.output)
    for program in (modest, auxiliary):
        program.interrupt()
        assert program.wait() == 0, program.output()
    steps = [entry["step"] for entry in read_history(run / "metrics.jsonl")]
    copy = shutil.copytree(run / "trackio", swarm.folder / "trackio")  # looking into it keeps it open
    assert steps == list(range(1, steps[-1] + 1)) == trackio_steps(copy)
    assert json.loads((run / "contributions.json").read_text())["names"].keys() == {"trainer", "modest"}
    price("disks full, then read-only", seconds=0, steps_missing=0, seconds_until_it_saves_again=saved_again)


NO_MORE_FILES = 20  # fewer than any peer has open, and enough for Python to start


def test_who_can_open_no_more_files_says_so_or_starts_anew_and_the_others_go_on(swarm: Swarm, price: Price) -> None:
    config = swarm.configure(max_global_steps=1000, averaging_timeout=AVERAGING_TIMEOUT, report_to=["none"])
    auxiliary, address = swarm.start_auxiliary(config)
    healthy, poor = (swarm.start_trainer(name, address) for name in ("healthy", "poor"))

    def made() -> int:
        return healthy.output().count("\nstep ")

    for trainer in (healthy, poor):
        trainer.wait_for_output("peers 2/2", times=2)
    began, before = time.monotonic(), made()
    use_up_files(poor)
    wait_until(lambda: made() > before + 1, 120, healthy.output)
    late = time.monotonic() - began
    # whichever of its threads notices first
    wait_until(lambda: poor.process.poll() == 1 or "Starting anew" in poor.output(), 60, poor.output)
    if poor.process.poll() == 1:
        assert "error: This program can open no more files" in poor.output() and "ulimit -n" in poor.output()

    began, before = time.monotonic(), made()
    use_up_files(auxiliary)
    auxiliary.wait_for_output("starting anew")
    auxiliary.wait_for_output("The run test is open", times=2)
    back = time.monotonic() - began
    wait_until(lambda: made() > before + 2, 120, healthy.output)
    auxiliary.wait_for_output(f"step {made():>4}/1000")
    healthy.interrupt()
    assert healthy.wait() == 0, healthy.output()
    auxiliary.interrupt()
    assert auxiliary.wait() == 0, auxiliary.output()
    steps = [entry["step"] for entry in read_history(swarm.folder / "run" / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))
    price("no free file descriptor", seconds=late, seconds_until_the_auxiliary_peer_is_back=back)
    assert late < AVERAGING_TIMEOUT + LOOKING, "the others wait for it once"


def use_up_files(program: Program) -> None:
    """As a leak does, in the program itself."""
    process = psutil.Process(program.process.pid)
    assert process.num_fds() > NO_MORE_FILES
    process.rlimit(psutil.RLIMIT_NOFILE, (NO_MORE_FILES, process.rlimit(psutil.RLIMIT_NOFILE)[1]))
