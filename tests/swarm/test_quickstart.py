"""The quick start: parameters are averaged in the background while each peer trains for itself."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

from arguments import read_config
from collab.trackers import read_history
from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program, assert_no_survivors, wait_until

pytestmark = pytest.mark.swarm

ROOT = Path(__file__).resolve().parent.parent.parent
STARTED = re.compile(r"Starting from global step (\d+)")


def test_two_trainers_share_what_each_learns_for_itself(swarm: Swarm) -> None:
    config = swarm.folder / "run.yaml"
    settings = read_config(ROOT / "configs" / "quickstart.yaml")
    config.write_text(json.dumps(settings | {"save_every": 1000, "report_to": ["none"], "page_port": 0}))
    auxiliary, address = swarm.start_auxiliary(config)
    first = swarm.start_trainer("first", address, "--micro_batch_size", "32", "--threads", "1")
    first.wait_for_output("step 2/20")
    second = swarm.start_trainer("second", address, "--micro_batch_size", "32", "--threads", "1")
    for program in (auxiliary, first, second):
        assert program.wait(240) == 0, program.output()

    begun = STARTED.search(second.output())
    assert begun and int(begun[1]) >= 2, second.output()
    history = read_history(swarm.folder / "run" / "metrics.jsonl")
    steps = [int(made["step"]) for made in history]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] == 20
    averaged = [made for made in history if made["peers_averaged"] == 2]
    assert len(averaged) >= 5, history
    assert not any(made["peers_alone"] for made in averaged)

    checkpoint = swarm.folder / "run" / "checkpoints" / "step-0000020"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["held_out_accuracy"] > 0.8 and state["data"] == "the data set digits"
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    assert model.config.id2label[3] == "3"
    assert "image-classification" in (checkpoint / "README.md").read_text()


def test_the_script_of_the_docs_trains_two_peers(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    [script] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "quickstart.py").write_text(script)
    environment = {"PYTHONPATH": str(ROOT)}
    first = Program("first", [str(tmp_path / "quickstart.py")], tmp_path / "first.log", environment, cold=True)
    programs = [first]
    try:
        first.wait_for_output("--initial_peers")
        wait_until(lambda: first.output().endswith("\n"), 5, first.output)
        [addresses] = re.findall("--initial_peers (.+)\n", first.output())
        command = [str(tmp_path / "quickstart.py"), "--initial_peers", *addresses.split()]
        programs.append(Program("second", command, tmp_path / "second.log", environment, cold=True))
        for program in programs:
            assert program.wait(180) == 0, program.output()
        told = "".join(program.output() for program in programs)
        assert "averaged 2 of 2 peers" in told, told
        rights = [float(share) for share in re.findall(r"([\d.]+)% right", first.output())]
        assert rights[-1] > 75, first.output()
    finally:
        for program in programs:
            program.remember_family()
            program.end()
    for program in programs:
        assert_no_survivors(program)
