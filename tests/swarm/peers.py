"""Swarms of regression peers (benchmarks/regression_peer.py): `peers.start(...)`, and everything ends with the test."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.swarm.processes import Program, wait_until


class Peers:
    """Regression peers that start together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []

    def start(
        self,
        role: str = "trainer",
        steps: int = 4,
        module: str = "benchmarks.regression_peer",
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        network: str | None = None,
        through: int = 0,
        **settings: Any,
    ) -> Program:
        """Start one and wait until it is ready.

        :param options: of its command line.
        :param network: name of the network namespace that it is in; None: the test's.
        :param through: the number of a peer that it joins, unless it is the first one.
        """
        number = len(self.programs)
        command = ["-m", module, str(self.folder), "--number", str(number), "--role", role]
        command += ["--steps", str(steps), "--settings", json.dumps(settings), *options]
        if self.programs:
            command += ["--initial_peers", (self.folder / f"address-{through}").read_text()]
        program = Program(f"{role}-{number}", command, self.folder / f"peer-{number}.log", environment, network)
        self.programs.append(program)
        wait_until((self.folder / f"ready-{number}").exists, 60, program.output)
        program.remember_family()
        return program

    def go(self) -> None:
        (self.folder / "go").touch()

    def step(self, number: int) -> int:
        """The latest global step that a running peer has made."""
        path = self.folder / f"step-{number}"
        return int(path.read_text()) if path.exists() else 0

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"weights-{number}.safetensors")

    def log(self, number: int) -> dict[str, Any]:
        """What a peer that has ended writes (benchmarks/regression_peer.py)."""
        return json.loads((self.folder / f"log-{number}.json").read_text())

    def verdicts(self, number: int) -> list[dict[str, Any]]:
        """A peer's reports up to now, also if it was killed."""
        path = self.folder / f"reports-{number}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reports(self, number: int) -> list[dict[str, Any]]:
        return self.log(number)["reports"]
