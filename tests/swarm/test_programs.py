"""The two programs together: joining late, saving and resuming, leaving."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from collab.trackers import read_history
from tests.hub_server import HubServer
from tests.swarm.conftest import Swarm
from tests.swarm.processes import assert_no_survivors

pytestmark = pytest.mark.swarm


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= tolerance, name


def test_a_late_joiner_takes_over_the_state_and_ends_with_the_same_weights(swarm: Swarm) -> None:
    auxiliary, address = swarm.start_auxiliary(swarm.configure(max_global_steps=8))
    early = swarm.start_trainer("early", address, "--save_dir", str(swarm.folder / "early"))
    early.wait_for_output("step 2/8")
    late = swarm.start_trainer("late", address, "--save_dir", str(swarm.folder / "late"))
    late.wait_for_output("Starting from global step")
    start = int(late.output().split("Starting from global step ")[1].split()[0])
    assert start >= 2, late.output()
    assert [early.wait(), late.wait(), auxiliary.wait()] == [0, 0, 0], late.output()

    history = read_history(swarm.folder / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in history] == list(range(1, 9))
    assert history[0]["peers_expected"] == 1 and history[-1]["peers_met"] == 2
    # Uncompressed averaging still rounds in another order on each peer, and AdamW magnifies it where gradients vanish.
    assert_equal_weights(swarm.folder / "early", swarm.folder / "late", tolerance=2e-3)
    assert_equal_weights(swarm.folder / "early", swarm.folder / "run" / "checkpoints" / "step-0000008", tolerance=2e-3)
    assert history[-1]["model_spread"] < 1e-3
    assert "1 ALONE" not in auxiliary.output() and "NOT averaged" not in early.output() + late.output()


def test_a_swarm_resumes_from_a_checkpoint_at_the_same_step_with_the_same_weights(swarm: Swarm) -> None:
    config = swarm.configure(max_global_steps=3)
    auxiliary, address = swarm.start_auxiliary(config)
    trainer = swarm.start_trainer("first", address, "--save_dir", str(swarm.folder / "first"))
    assert [trainer.wait(), auxiliary.wait()] == [0, 0], trainer.output()
    checkpoint = swarm.folder / "run" / "checkpoints" / "step-0000003"
    assert_equal_weights(swarm.folder / "first", checkpoint)
    summary = json.loads((swarm.folder / "run" / "summary.json").read_text())
    assert summary["global_steps"] == 3 and summary["checkpoint"] == str(checkpoint)

    config = swarm.configure(max_global_steps=5)
    auxiliary, address = swarm.start_auxiliary(config, "--from", str(checkpoint), run_folder="resumed")
    visitor = swarm.start_trainer("visitor", address, "--save_dir", str(swarm.folder / "visitor"))
    visitor.wait_for_output("Starting from global step 3")
    visitor.interrupt(signal.SIGTERM)  # long before it could make a global step
    assert visitor.wait() == 0, visitor.output()
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(swarm.folder / "visitor" / name), load_file(checkpoint / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name

    trainer = swarm.start_trainer("second", address)
    assert [trainer.wait(), auxiliary.wait()] == [0, 0], trainer.output()
    steps = [entry["step"] for entry in read_history(swarm.folder / "resumed" / "metrics.jsonl")]
    assert steps == [4, 5]


def test_a_run_without_an_auxiliary_peer_starts_at_its_first_trainer(swarm: Swarm) -> None:
    config = swarm.configure(max_global_steps=8, averaging_timeout=5)
    first = swarm.start("first", "run_trainer.py", "--config", str(config), "--public_name", "first")
    first.wait_for_output("Others join with")
    address = first.output().split("--initial_peers ")[1].split()[0]
    second = swarm.start_trainer("second", address)
    second.wait_for_output("Starting from global step")
    assert [first.wait(), second.wait()] == [0, 0], first.output()
    assert "peers 2/2" in first.output() and "peers 2/2" in second.output()


def test_delayed_updates_and_offloading_average_in_every_round(swarm: Swarm) -> None:
    config = swarm.configure(
        max_global_steps=5, delay_optimizer_step=True, delay_grad_averaging=True, delay_state_averaging=True
    )
    auxiliary, address = swarm.start_auxiliary(config)
    trainers = [swarm.start_trainer(name, address, "--offload_optimizer", "true") for name in ("one", "two")]
    assert [program.wait(180) for program in (*trainers, auxiliary)] == [0, 0, 0], trainers[0].output()
    history = read_history(swarm.folder / "run" / "metrics.jsonl")
    assert history[-1]["peers_met"] == 2 and sum(entry["peers_alone"] for entry in history) == 0
    assert history[-1]["loss"] < history[0]["loss"]


def test_precisions_mix_and_the_result_reaches_the_hub_and_wandb(swarm: Swarm) -> None:
    with HubServer() as hub:
        swarm.environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        swarm.environment |= {"WANDB_MODE": "offline"}
        config = swarm.configure(max_global_steps=3, report_to=["trackio", "wandb"], repo_id="community/test")
        auxiliary, address = swarm.start_auxiliary(config)
        trainers = [swarm.start_trainer(name, address, "--precision", name) for name in ("bfloat16", "float16")]
        assert [program.wait() for program in (*trainers, auxiliary)] == [0, 0, 0], auxiliary.output()
        assert "Computes in float16" in trainers[1].output() and "NOT averaged" not in trainers[1].output()
        assert {"config.json", "model.safetensors", "README.md"} <= set(hub.repos["community/test"].tree("step-3"))

        # Without an auxiliary peer, the published checkpoint is what a trainer can go on from.
        config = swarm.configure(max_global_steps=4, averaging_timeout=2)
        resume = ("run_trainer.py", "--config", str(config), "--from")
        heir = swarm.start("heir", *resume, "community/test@step-3")
        assert heir.wait() == 0, heir.output()
        assert "Starting from global step 3" in heir.output() and "step 4/4" in heir.output()
        stranger = swarm.start("stranger", *resume, "community/none")
        assert stranger.wait() == 1, stranger.output()
        assert "There is no folder community/none here" in stranger.output() and "Traceback" not in stranger.output()
    assert list((swarm.folder / "run").glob("wandb/offline-run-*/*.wandb"))
    assert list((swarm.folder / "run" / "trackio").glob("*.db"))
    assert hub.token not in auxiliary.output()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_both_programs_leave_when_asked_and_take_their_children_along(swarm: Swarm, number: signal.Signals) -> None:
    swarm.cold = True
    auxiliary, address = swarm.start_auxiliary(swarm.configure(max_global_steps=1000))
    trainer = swarm.start_trainer("trainer", address)
    trainer.wait_for_output("step 1/1000")
    trainer.interrupt(number)
    assert trainer.wait() == 0, trainer.output()
    assert "Thank you" in trainer.output() and "Traceback" not in trainer.output()
    assert_no_survivors(trainer)
    auxiliary.interrupt(number)
    assert auxiliary.wait() == 0, auxiliary.output()
    assert "Traceback" not in auxiliary.output()
    assert_no_survivors(auxiliary)
    summary = json.loads((swarm.folder / "run" / "summary.json").read_text())
    assert summary["global_steps"] >= 1 and summary["checkpoint"] is None


def test_a_flag_that_contradicts_the_run_is_refused_by_name(swarm: Swarm) -> None:
    _, address = swarm.start_auxiliary(swarm.configure())
    trainer = swarm.start_trainer("stubborn", address, "--learning_rate", "0.5")
    assert trainer.wait() == 1
    assert "error: You gave learning_rate = 0.5, but this run uses 0.002" in trainer.output()
    assert "Traceback" not in trainer.output()
