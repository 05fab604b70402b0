"""Peers that average are one process with the samples of all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model

from benchmarks.regression_peer import SETTINGS, loss_of, make_model, plain_optimizer
from tests.swarm.processes import Program, wait_until

pytestmark = pytest.mark.swarm
STEPS = 5


@pytest.mark.parametrize("sizes", [["16", "16"], ["16,4,29", "8,24"]], ids=["even", "uneven micro-batches"])
def test_two_peers_end_at_the_weights_of_one_process(tmp_path: Path, sizes: list[str]) -> None:
    programs = [start_worker(tmp_path, 0, sizes[0])]
    try:
        wait_until((tmp_path / "address-0").exists, 30, programs[0].output)
        programs.append(start_worker(tmp_path, 1, sizes[1], (tmp_path / "address-0").read_text()))
        wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, 60, programs[1].output)
        (tmp_path / "go").touch()
        assert [program.wait(120) for program in programs] == [0, 0], [program.output() for program in programs]
    finally:
        for program in programs:
            program.end()
    logs = [json.loads((tmp_path / f"log-{number}.json").read_text()) for number in (0, 1)]
    # Without this, peers that had trained apart could pass by the likeness of their samples.
    for log in logs:
        assert sum(report["applied"] and report["met"] == 2 for report in log["reports"]) >= STEPS - 1, logs

    reference = train_alone([log["by_step"] for log in logs])
    for number in (0, 1):
        model = make_model()
        load_model(model, tmp_path / f"weights-{number}.safetensors")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-4, atol=1e-5)


def start_worker(folder: Path, number: int, sizes: str, *initial_peers: str) -> Program:
    command = ["-m", "benchmarks.regression_peer", str(folder), "--number", str(number), "--steps", str(STEPS)]
    command += ["--sizes", *sizes.split(","), "--initial_peers", *initial_peers]
    return Program(f"worker-{number}", command, folder / f"worker-{number}.log")


def train_alone(by_step_of_peers: list[dict[str, list[tuple[int, int]]]]) -> torch.nn.Module:
    """The same global steps in plain PyTorch: the mean gradient over all samples, clipped, AdamW, the schedule."""
    model = make_model()
    optimizer, schedule = plain_optimizer(model)
    for step in range(STEPS):
        batches = [tuple(batch) for by_step in by_step_of_peers for batch in by_step.get(str(step), [])]
        total = sum(size for _, size in batches)
        optimizer.zero_grad()
        for seed, size in batches:
            (loss_of(model, seed, size) * size / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_grad_norm"])
        optimizer.step()
        schedule.step()
    return model
