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


SIZES = [
    pytest.param(["16", "16"], id="two peers"),
    pytest.param(["16,4,29", "8,24"], id="two peers, uneven micro-batches"),
    pytest.param(["16,4,29", "8,24", "12"], id="three peers, uneven micro-batches"),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_peers_end_at_the_weights_of_one_process(tmp_path: Path, sizes: list[str]) -> None:
    """Each peer accumulates the gradients of dozens of micro-batches for a global step."""
    numbers = range(len(sizes))
    programs = [start_worker(tmp_path, 0, sizes[0])]
    try:
        wait_until((tmp_path / "address-0").exists, 30, programs[0].output)
        address = (tmp_path / "address-0").read_text()
        programs += [start_worker(tmp_path, number, sizes[number], address) for number in numbers[1:]]
        wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == len(sizes), 90, programs[-1].output)
        (tmp_path / "go").touch()
        assert [program.wait() for program in programs] == [0] * len(sizes), [p.output() for p in programs]
    finally:
        for program in programs:
            program.end()
    logs = [json.loads((tmp_path / f"log-{number}.json").read_text()) for number in numbers]
    # Without this, peers that had trained apart could pass by the likeness of their samples.
    for log in logs:
        assert sum(report["applied"] and report["met"] == len(sizes) for report in log["reports"]) >= STEPS - 1, logs
        assert all(len(batches) >= 3 for batches in log["by_step"].values()), "nothing was accumulated"

    reference = train_alone([log["by_step"] for log in logs])
    for number in numbers:
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
