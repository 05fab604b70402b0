"""All peers of a swarm whose loss has jumped go back to the same earlier weights, and on from there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model

from benchmarks.regression_peer import loss_of, make_model
from collab.agreement import distance
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, assert_no_survivors, wait_until
from tests.swarm.trainer_that_blows_up import RUINED_AT as TRAINERS_RUINED_AT

pytestmark = pytest.mark.swarm

SETTINGS = {"target_batch_size": 600, "rollback_after": 3, "snapshot_every": 6, "average_state_every": 4}
RUINED_AT, LAST_STEP = 20, 32
GONE_BACK = re.compile("goes back to the weights of step|has gone back to global step")


def run_peers(folder: Path, **more: Any) -> list[Program]:
    """Three peers whose weights are ruined, which have ended. The third keeps no snapshots, as a newcomer."""
    programs: list[Program] = []

    def start(snapshots: str) -> None:
        number = len(programs)
        environment = {"BLOW_UP_AT": str(RUINED_AT), "SNAPSHOTS": snapshots}
        initial_peers = [(folder / "address-0").read_text()] if number else []
        command = ["tests/swarm/peer_that_blows_up.py", str(folder), "--number", str(number), "--steps"]
        command += [str(LAST_STEP), "--settings", json.dumps(SETTINGS | more), "--initial_peers", *initial_peers]
        programs.append(Program(f"peer-{number}", command, folder / f"peer-{number}.log", environment))
        wait_until((folder / f"ready-{number}").exists, 60, programs[-1].output)

    try:
        start(str(folder / "snapshots"))
        start(str(folder / "snapshots"))
        start("")
        (folder / "go").touch()
        assert [program.wait(150) for program in programs] == [0] * 3, [program.output() for program in programs]
    finally:
        for program in programs:
            program.remember_family()
            program.end()
    for program in programs:
        assert_no_survivors(program)
    return programs


def loss_at_the_end(folder: Path, number: int) -> float:
    """2.3 untrained, thousands after the jump."""
    model = make_model()
    load_model(model, folder / f"weights-{number}.safetensors")
    return loss_of(model, seed=7, size=1000).item()


def test_a_swarm_whose_loss_has_jumped_goes_back_together(tmp_path: Path) -> None:
    programs = run_peers(tmp_path)
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
    # From there on they are together; on a busy computer until a round loses a part, and again from the next averaging
    # of the parameters on, in the last step at the latest.
    whole = [
        {report["step"] for report in log["reports"] if report["applied"] and report["parts"] == 1} for log in logs
    ]
    torn = min(set(range(back_at + 1, LAST_STEP)) - set.intersection(*whole), default=LAST_STEP)
    for step in [*range(back_at + 1, torn), LAST_STEP]:
        found = distance(second[step], first[step]), distance(third[step], first[step])
        assert max(found) < 1e-4, (step, found, [log["reports"][-10:] for log in logs])
    assert loss_at_the_end(tmp_path, 2) < 1.5
    assert not list((tmp_path / "snapshots").iterdir())


def test_peers_that_average_in_the_background_go_back_together_as_well(tmp_path: Path) -> None:
    """They do it when they begin the next round; who is late takes over the state of those who have done it."""
    delays = {"delay_optimizer_step": True, "delay_grad_averaging": True, "delay_state_averaging": True}
    programs = run_peers(tmp_path, matchmaking_time=3.0, **delays)  # who still averages is not in the next group yet
    told = "".join(program.output() for program in programs)
    assert "goes back to the weights of step" in told, told
    assert len(set(re.findall(r"(?:the weights of|gone back to global) step (\d+)", told))) == 1, told
    losses = [loss_at_the_end(tmp_path, number) for number in range(3)]
    assert max(losses) < 1.5, losses
    assert not list((tmp_path / "snapshots").iterdir())


def test_an_auxiliary_peer_hands_out_and_keeps_the_weights_that_the_swarm_went_back_to(swarm: Swarm) -> None:
    config = swarm.configure(
        max_global_steps=1000, target_batch_size=1024, save_every=3, rollback_after=3, snapshot_every=4
    )
    auxiliary, address = swarm.start_auxiliary(config)
    program = "tests/swarm/trainer_that_blows_up.py"
    trainers = [swarm.start_trainer(name, address, program=program) for name in ("one", "two")]
    wait_until(lambda: all(GONE_BACK.search(trainer.output()) for trainer in trainers), 300, auxiliary.output)
    before = len(saved_steps(auxiliary))
    wait_until(lambda: len(saved_steps(auxiliary)) > before, 120, auxiliary.output)
    for trainer in trainers:
        trainer.interrupt()
    assert [trainer.wait() for trainer in trainers] == [0, 0], [trainer.output() for trainer in trainers]

    for name in ("newcomer", "another", "last"):
        newcomer = swarm.start_trainer(name, address, "--save_dir", str(swarm.folder / name))
        newcomer.wait_for_output("Starting from global step")
        newcomer.interrupt()  # long before it could make a global step
        assert newcomer.wait() == 0, newcomer.output()
        if "Starting from global step 0\n" not in newcomer.output():
            break  # what the trainers had at last is handed out once the auxiliary peer has checked it
    *_, ruined, step = saved_steps(auxiliary)
    assert f"Starting from global step {step}\n" in newcomer.output(), newcomer.output() + auxiliary.output()
    kept, got = (
        load_file(swarm.folder / folder / "model.safetensors") for folder in (f"run/checkpoints/step-{step:07d}", name)
    )
    assert kept.keys() == got.keys() and all(torch.equal(kept[name], got[name]) for name in kept)
    assert largest(kept) < 2, "weights are 1 at most before they are ruined, and 3 in the mean afterwards"
    assert ruined > TRAINERS_RUINED_AT, "the auxiliary peer had the ruined ones before"


def largest(weights: dict[str, torch.Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in weights.values())


def saved_steps(auxiliary: Program) -> list[int]:
    return [int(step) for step in re.findall(r"Saved the state of global step (\d+)", auxiliary.output())]
