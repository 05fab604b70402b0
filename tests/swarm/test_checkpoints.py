"""An auxiliary peer's checkpoints: checked, measured, and what everybody goes on from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from collab.manifest import read_kept
from tests.hub_server import HubServer
from tests.swarm.conftest import Swarm

pytestmark = pytest.mark.swarm


def trainer_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return state


def test_a_state_that_most_peers_do_not_have_is_not_saved(swarm: Swarm) -> None:
    config = swarm.configure(max_global_steps=9, save_every=3)
    auxiliary, address = swarm.start_auxiliary(config)
    healthy = [swarm.start_trainer(name, address, "--save_dir", str(swarm.folder / name)) for name in ("one", "two")]
    for trainer in healthy:
        trainer.wait_for_output("Starting from global step", timeout=180)
    liar = swarm.start_trainer("liar", address, program="tests/swarm/trainer_that_hands_out_another_state.py")
    assert [program.wait(240) for program in (*healthy, liar, auxiliary)] == [0] * 4, auxiliary.output()
    assert re.search(r"The state of peer \w+ is not saved: its weights differ by", auxiliary.output())
    checkpoint = swarm.folder / "run" / "checkpoints" / "step-0000009"
    ours, theirs = load_file(checkpoint / "model.safetensors"), load_file(swarm.folder / "one" / "model.safetensors")
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 2e-3, name
    state = trainer_state(checkpoint)
    assert state["checks"]["agreeing"] >= 2 and state["checks"]["distance"] < 0.01, state["checks"]
    assert 0 < state["held_out_loss"] < 10 and 0 <= state["held_out_accuracy"] <= 1
    assert f"held-out loss **{state['held_out_loss']:.4f}**" in (checkpoint / "README.md").read_text()
    kept = read_kept(checkpoint)
    assert kept is not None and kept.swarm_id == state["swarm_id"]
    assert state["settings"]["sources"] == [{"embedded": True}] and "embedded" in state["data"]


def test_everything_goes_on_from_the_last_published_revision(swarm: Swarm) -> None:
    with HubServer() as hub:
        swarm.environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        small = {"target_batch_size": 1024}  # enough for the steps of one trainer
        config = swarm.configure(max_global_steps=3, repo_id="community/test", **small)
        auxiliary, address = swarm.start_auxiliary(config)
        trainer = swarm.start_trainer("trainer", address)
        assert [trainer.wait(180), auxiliary.wait()] == [0, 0], auxiliary.output()
        folder = swarm.folder / "run" / "checkpoints" / "step-0000003"
        published = trainer_state(folder)

        config = swarm.configure(max_global_steps=5, **small)
        auxiliary, address = swarm.start_auxiliary(config, "--from", "community/test@step-3", run_folder="heir")
        trainer = swarm.start_trainer("heir", address)
        assert [trainer.wait(180), auxiliary.wait()] == [0, 0], auxiliary.output()
        assert "Starting from global step 3\n" in trainer.output(), trainer.output()
        heir = trainer_state(swarm.folder / "heir" / "checkpoints" / "step-0000005")
        assert heir["samples"] > published["samples"] > 0

        # Alone, so that the next step is the same to the last bit wherever the checkpoint came from.
        config, records = swarm.configure(max_global_steps=5, averaging_timeout=2, **small), []
        for name, source in (("from the Hub", "community/test@step-3"), ("from the folder", str(folder))):
            swarm.environment["RECORDS"] = str(swarm.folder / f"{name}.jsonl")
            own = ("--identity_path", str(swarm.folder / "key"), "--threads", "1", "--precision", "float32")
            program = swarm.start(
                name, "tests/swarm/trainer_with_record.py", "--config", str(config), *own, "--from", source,
                "--cache_dir", str(swarm.new_cache(name)),
            )  # fmt: skip
            assert program.wait(180) == 0, program.output()
            lines = (swarm.folder / f"{name}.jsonl").read_text().splitlines()
            records.append([{key: json.loads(line)[key] for key in ("step", "loss", "sketch")} for line in lines])
        assert [record["step"] for record in records[0]] == [4, 5]
        assert records[0][0]["loss"] == records[1][0]["loss"]

        weights = swarm.start(
            "weights", "run_trainer.py", "--config", str(config), "--from", str(folder), "--from_step_zero", "true"
        )
        weights.wait_for_output("step 1/5", timeout=180)
        weights.interrupt()
        assert weights.wait() == 0, weights.output()
