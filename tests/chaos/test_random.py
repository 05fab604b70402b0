"""The short form of scripts/chaos.py: every kind of fault once, within 72 seconds."""

import signal
from pathlib import Path

import pytest

from tests.chaos.prices import Price
from tests.swarm.processes import Program, assert_no_survivors

pytestmark = pytest.mark.chaos

HOLDS = ["everybody meets again", "one model", "who is asked to leave, leaves", "the history has every step once"]
HOLDS += ["no orphan process", "no leaked port", "no temporary file", "loss falls"]


def test_a_swarm_to_which_everything_happens_is_one_swarm_with_one_model_afterwards(
    tmp_path: Path, shared_cache: Path, price: Price
) -> None:
    folder = tmp_path / "run"
    command = ["scripts/chaos.py", "--minutes", "1.2", "--every", "7", "--seed", "0", "--skip_reference"]
    command += ["--run_folder", str(folder), "--cache_dir", str(shared_cache)]
    program = Program("chaos", command, tmp_path / "chaos.log", cold=True)
    try:
        assert program.wait(timeout=420) == 0, program.output()
    finally:
        if program.process.poll() is None:
            program.interrupt(signal.SIGTERM)  # killed, it would leave its peers running
            program.wait(timeout=120)
        program.end()
    assert_no_survivors(program)
    print(program.output())
    broken = [what for what in HOLDS if f"  holds  {what} " not in program.output()]
    price("random", "all ten kinds within 72 s", promises_broken=len(broken))
    assert not broken, program.output()
