"""All peers of a swarm whose loss has jumped go back to the same earlier weights, and on from there."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_model

from benchmarks.regression_peer import loss_of, make_model
from collab.agreement import distance
from tests.swarm.processes import Program, assert_no_survivors, wait_until

pytestmark = pytest.mark.swarm

SETTINGS = {"target_batch_size": 600, "rollback_after": 3, "snapshot_every": 6, "average_state_every": 4}
RUINED_AT, LAST_STEP = 20, 32


def test_a_swarm_whose_loss_has_jumped_goes_back_together(tmp_path: Path) -> None:
    programs: list[Program] = []

    def start(snapshots: str) -> None:
        number = len(programs)
        environment = {"BLOW_UP_AT": str(RUINED_AT), "SNAPSHOTS": snapshots}
        initial_peers = [(tmp_path / "address-0").read_text()] if number else []
        command = ["tests/swarm/peer_that_blows_up.py", str(tmp_path), "--number", str(number), "--steps"]
        command += [str(LAST_STEP), "--settings", json.dumps(SETTINGS), "--initial_peers", *initial_peers]
        programs.append(Program(f"peer-{number}", command, tmp_path / f"peer-{number}.log", environment))
        wait_until((tmp_path / f"ready-{number}").exists, 60, programs[-1].output)

    try:
        start(str(tmp_path / "snapshots"))
        start(str(tmp_path / "snapshots"))
        start("")  # keeps nothing, like a newcomer, and takes over the state of one of the others
        (tmp_path / "go").touch()
        assert [program.wait(150) for program in programs] == [0] * 3, [program.output() for program in programs]
    finally:
        for program in programs:
            program.remember_family()
            program.end()
    for program in programs:
        assert_no_survivors(program)

    logs = [json.loads((tmp_path / f"log-{number}.json").read_text()) for number in range(3)]
    # All make the same steps, and the jump ruined all.
    steps = [[report["step"] for report in log["reports"]] for log in logs]
    assert all(made == sorted(set(made)) and made[-1] == LAST_STEP for made in steps), steps
    first, second, third = ({int(step): values for step, values in log["sketches"].items()} for log in logs)
    assert distance(first[RUINED_AT + 1], first[RUINED_AT]) > 1
    # Two go back to what they keep, to the last bit and in the same step; the third follows.
    [(back_at, back_to)] = re.findall(r"step (\d+) goes back to the weights of step (\d+)", programs[0].output())
    assert f"step {back_at} goes back to the weights of step {back_to}" in programs[1].output()
    back_at, back_to = int(back_at), int(back_to)
    assert back_to < RUINED_AT < RUINED_AT + SETTINGS["rollback_after"] < back_at, (back_at, back_to)
    assert first[back_at] == first[back_to] and second[back_at] == second[back_to]
    assert f"the swarm has gone back to global step {back_to}" in programs[2].output()
    assert "goes back" not in programs[2].output()
    for step in range(back_at + 1, LAST_STEP + 1):
        assert distance(second[step], first[step]) < 1e-4 and distance(third[step], first[step]) < 1e-4, step
    # The loss is low again.
    model = make_model()
    load_model(model, tmp_path / "weights-2.safetensors")
    assert loss_of(model, seed=7, size=1000) < 1.5  # 2.3 untrained, thousands after the jump
    assert not list((tmp_path / "snapshots").iterdir())
