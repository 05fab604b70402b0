"""Every peer is killed: the run goes on from the last checkpoint, a local or a published one, bit for bit."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from tests.chaos.prices import Price
from tests.hub_server import HubServer
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, assert_no_survivors, wait_until
from tests.swarm.test_publishing import NAME, environment

pytestmark = pytest.mark.chaos

SAVE_EVERY = 2
Tensors = dict[str, torch.Tensor]


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def last_step(trainer: Program) -> int:
    return max((int(step) for step in re.findall(r"^step (\d+)/", trainer.output(), re.MULTILINE)), default=0)


def visit(swarm: Swarm, address: str, step: int) -> Path:
    """What a trainer has that comes, and goes before it could make a step."""
    folder = swarm.folder / f"visitor-{len(swarm.programs)}"
    visitor = swarm.start_trainer(folder.name, address, "--save_dir", str(folder))
    visitor.wait_for_output(f"Starting from global step {step}\n", timeout=90)
    visitor.interrupt(signal.SIGTERM)
    assert visitor.wait() == 0, visitor.output()
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
    return folder


def test_a_run_of_which_every_peer_was_killed_goes_on_from_its_last_checkpoint(swarm: Swarm, price: Price) -> None:
    with HubServer() as hub:
        swarm.environment = environment(hub)
        settings = {"max_global_steps": 1000, "save_every": SAVE_EVERY, "repo_id": NAME, "target_batch_size": 2048}
        config = swarm.configure(**settings)
        auxiliary, address = swarm.start_auxiliary(config, program="tests/chaos/auxiliary_that_dies_while_saving.py")
        trainers = [swarm.start_trainer(name, address) for name in ("one", "two")]
        wait_until(lambda: auxiliary.process.poll() is not None, 120, auxiliary.output)
        assert auxiliary.wait() == -signal.SIGKILL, auxiliary.output()
        for trainer in trainers:
            trainer.remember_family()
            trainer.process.kill()
            trainer.wait()
        for program in (auxiliary, *trainers):
            assert_no_survivors(program)

        # ---- from the disk
        checkpoints = swarm.folder / "run" / "checkpoints"
        assert list(checkpoints.glob(".step-*.partial")), "it was not killed while it wrote"
        newest = max(checkpoints.glob("step-*"))
        step = int(newest.name.removeprefix("step-"))
        lost = max(map(last_step, trainers)) - step
        again, address = swarm.start_auxiliary(config)
        again.wait_for_output(f"Holds the state of global step {step}, from")
        assert not list(checkpoints.glob(".step-*.partial"))
        mine = visit(swarm, address, step)
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert_equal(load_file(mine / name), load_file(newest / name))
        heir = swarm.start_trainer("heir", address)
        heir.wait_for_output(f"step {step + 1}/1000", timeout=90)
        wait_until(lambda: len(hub.repos[NAME].tags) > 1, 90, again.output)
        for program in (heir, again):
            program.remember_family()
            program.process.kill()
            program.wait()

        # ---- from the Hub, the organizer's disk being lost
        step = max(int(tag.removeprefix("step-")) for tag in hub.repos[NAME].tags)
        config = swarm.configure(**settings | {"repo_id": None})
        source = ("--from", f"{NAME}@step-{step}", "--cache_dir", str(swarm.new_cache("elsewhere")))
        _, address = swarm.start_auxiliary(config, *source, run_folder="elsewhere/run")
        mine = visit(swarm, address, step)
        published = hub.repos[NAME].tree(f"step-{step}")
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert_equal(load_file(mine / name), load(published[name]))
    price("every peer killed", "while a checkpoint is written", global_steps=lost)
    # those between two checkpoints, once more because the newest was not whole, and those made while it was written
    assert 0 <= lost <= 2 * SAVE_EVERY + 2
