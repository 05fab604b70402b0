"""Remote experts: one server is killed in the middle, and comes back; another one goes on meanwhile."""

import json
import re
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from collab.trackers import read_history
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, assert_no_survivors, wait_until

pytestmark = pytest.mark.swarm

LAST_STEP = 30  # time enough for a server to come back
STEPS = re.compile(r"Expert (\d+) goes on after (\d+) steps, from this computer's disk")


def start_server(swarm: Swarm, name: str, address: str) -> Program:
    own = ("--expert_folder", str(swarm.folder / name), "--public_name", name, "--threads", "1")
    few = ("--serve_experts", "2", "--expert_save_seconds", "1")
    return swarm.start(name, "run_expert_server.py", "--initial_peers", address, *own, *few)


def saved(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.glob("*/expert-*.safetensors")}


def test_a_run_goes_on_when_a_server_of_experts_is_killed_and_its_experts_when_it_is_back(swarm: Swarm) -> None:
    config = swarm.configure(
        task="moe_mlm", experts=5, expert_timeout=4.0, expert_learning_rate=0.003, precisions=["float32"],
        max_global_steps=LAST_STEP, target_batch_size=256, learning_rate=0.01,
    )  # fmt: skip
    auxiliary, address = swarm.start_auxiliary(config)
    servers = {name: start_server(swarm, name, address) for name in ("one", "two")}
    for server in servers.values():
        server.wait_for_output("Serving the experts")
    hosting = ("--serve_experts", "9", "--expert_folder", str(swarm.folder / "trainer"))
    trainer = swarm.start_trainer("trainer", address, "--micro_batch_size", "64", *hosting)
    trainer.wait_for_output(f"step 2/{LAST_STEP}")
    victim, folder = servers["two"], swarm.folder / "two"
    wait_until(lambda: len(saved(folder)) == 2, 20, victim.output)

    victim.remember_family()
    victim.interrupt(signal.SIGKILL)
    victim.wait()
    assert_no_survivors(victim)
    before = {name: load_file(path) for name, path in saved(folder).items()}
    trainer.wait_for_output("is set aside")
    again = start_server(swarm, "two", address)
    again.wait_for_output("Serving the experts")
    goes_on = {int(index): int(steps) for index, steps in STEPS.findall(again.output())}
    assert {f"expert-{index}.safetensors" for index in goes_on} == before.keys()
    for index, steps in goes_on.items():
        assert before[f"expert-{index}.safetensors"]["step.up.weight"] == steps > 0
    for program in (trainer, auxiliary, servers["one"], again):
        assert program.wait(180) == 0, program.output()
        assert_no_survivors(program)
        assert "Traceback" not in program.output(), program.output()
    assert "The run is complete" in again.output()

    history = read_history(swarm.folder / "run" / "metrics.jsonl")
    assert [made["step"] for made in history] == list(range(1, LAST_STEP + 1))
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    for name, path in saved(folder).items():
        assert load_file(path)["step.up.weight"] > before[name]["step.up.weight"], "it was trained after its return"
    [own] = saved(swarm.folder / "trainer").values()
    assert load_file(own)["step.up.weight"] > LAST_STEP, "the trainer's own, for which no server was left"
    checkpoint = swarm.folder / "run" / "checkpoints" / f"step-{LAST_STEP:07}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["held_out_loss"] < history[0]["loss"]
    assert AutoModelForMaskedLM.from_pretrained(checkpoint).config.hidden_size == 32
