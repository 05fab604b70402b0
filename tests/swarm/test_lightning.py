"""Lightning modules on several computers: the script of the docs, and what one process would have made of it."""

import re
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_model

from tests.swarm.lightning_peer import QUIET, SETTLING, STEPS, Regression
from tests.swarm.processes import Program, assert_no_survivors, wait_until

pytestmark = pytest.mark.swarm

ROOT = Path(__file__).resolve().parent.parent.parent
ENDED = re.compile(r"Global step (\d+): averaged (\d) of (\d) peers")


def test_the_script_of_the_docs_trains_two_peers(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "lightning.md").read_text(encoding="utf-8")
    [script] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    first = Program("first", [str(tmp_path / "train.py")], tmp_path / "first.log", environment, cold=True)
    programs = [first]
    try:
        first.wait_for_output("INITIAL_PEERS=")
        wait_until(lambda: "initial_peers=" in first.output(), 5, first.output)
        [addresses] = re.findall("INITIAL_PEERS=(.+) python train.py\n", first.output())
        environment |= {"INITIAL_PEERS": addresses}
        second = Program("second", [str(tmp_path / "train.py")], tmp_path / "second.log", environment, cold=True)
        programs.append(second)
        second.wait_for_output("Global step")
        for program in programs:
            program.remember_family()
            assert program.wait(180) == 0, program.output()
        begun = re.search(r"Starting from global step (\d+)", second.output())
        assert begun and int(begun[1]) >= 1, second.output()
        for program in programs:
            verdicts = ENDED.findall(program.output())
            assert verdicts[-1][0] == "20", program.output()
            assert [verdict[1:] for verdict in verdicts].count(("2", "2")) >= 3, program.output()
            [right] = re.findall(r"right\W+([\d.]+)", program.output())
            assert float(right) > 0.8, "the test at the end, for which no network is needed"
    finally:
        for program in programs:
            program.remember_family()
            program.end()
    for program in programs:
        assert_no_survivors(program)


def start_peer(folder: Path, half: int, *arguments: str, initial_peers: str = "") -> Program:
    command = ["-m", "tests.swarm.lightning_peer", str(folder), str(half), *arguments]
    return Program(f"half-{half}", command, folder / f"half-{half}.log", {"INITIAL_PEERS": initial_peers})


def test_two_peers_are_one_process_with_the_doubled_batch(tmp_path: Path) -> None:
    programs = [start_peer(tmp_path, 0)]
    try:
        programs[0].wait_for_output("initial_peers=")
        [address] = re.findall("INITIAL_PEERS=(.+) python", programs[0].output())
        other = start_peer(tmp_path, 1, "--target_batch_size", "2000", initial_peers=address)
        programs.append(other)
        assert other.wait(60) == 1
        assert "target_batch_size: 2000 here, 1000 there" in other.output(), "another script is refused by name"
        programs.append(start_peer(tmp_path, 1, initial_peers=address))
        assert [program.wait(120) for program in programs[::2]] == [0, 0], [each.output() for each in programs]
    finally:
        for program in programs:
            program.end()

    reference = Regression(0, 1)
    Trainer(max_steps=STEPS, gradient_clip_val=0.5, **QUIET).fit(reference)
    for half, program in enumerate(programs[::2]):
        verdicts = {int(step): (met, of) for step, met, of in ENDED.findall(program.output())}
        assert all(verdicts[step + 1] == ("2", "2") for step in range(SETTLING, STEPS)), program.output()
        model = Regression(half)
        load_model(model, str(tmp_path / f"weights-{half}.safetensors"))
        for name, value in model.state_dict().items():
            assert not torch.allclose(value, Regression(half).state_dict()[name], atol=1e-3), "it has learnt something"
            torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-5, atol=1e-6)
        rates = dict(part.split(":") for part in program.output().rsplit("rates ", 1)[1].split())
        for step in range(SETTLING, STEPS):
            assert float(rates[str(step)]) == pytest.approx(0.2 * 0.9**step, abs=1e-6)
