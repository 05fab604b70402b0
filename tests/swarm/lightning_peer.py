"""A peer of a Lightning run whose data follow from the global step; `python -m tests.swarm.lightning_peer --help`."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_model
from torch.utils.data import DataLoader, IterableDataset

from collab.processes import run_program
from integrations.lightning import SwarmStrategy

STEPS, SETTLING, HALF = 8, 3, 16
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "max_epochs": -1, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
ALONE: dict[str, Any] = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False}
EXACT: dict[str, Any] = {"grad_compression": "none", "state_compression": "none", "matchmaking_time": 2.0}


class Nothing(IterableDataset[torch.Tensor]):
    """Batches without end whose content does not matter."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(HALF)


class Regression(L.LightningModule):
    """Learns from samples that are drawn anew for each global step, one half of them or both.

    In the first `SETTLING` steps the loss is zero, so that it does not matter who makes them.

    :param halves: 0, 1 or both.
    """

    def __init__(self, *halves: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.halves = halves
        self.rates: dict[int, float] = {}

    def now(self) -> int:
        strategy = self.trainer.strategy
        return strategy.global_step if isinstance(strategy, SwarmStrategy) else self.trainer.global_step

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        step = self.now()
        self.rates[step] = self.trainer.optimizers[0].param_groups[0]["lr"]
        samples = torch.randn(2, HALF, 8, generator=torch.Generator().manual_seed(step))[list(self.halves)].flatten(
            0, 1
        )
        loss = torch.nn.functional.mse_loss(self.layers(samples), samples.sum(1, keepdim=True).sin())
        return loss * (step >= SETTLING)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(Nothing(), batch_size=None)


class UntilBothAreThere(L.Callback):
    """After its first batch a peer waits for the other one's."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        strategy, give_up = trainer.strategy, time.monotonic() + 150
        assert isinstance(strategy, SwarmStrategy)
        while batch_idx and strategy.num_peers < 2 and strategy.global_step < SETTLING:
            assert time.monotonic() < give_up, "the other peer did not come"
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("half", type=int)
    parser.add_argument("--target_batch_size", type=int, default=1000)
    given = parser.parse_args()
    # Each says that its batches have `target_batch_size` samples. What counts for more in a round counts for as much:
    # both halves count alike, however many batches a peer computed in a step.
    strategy = SwarmStrategy(
        given.target_batch_size, batch_size=1000, max_global_steps=STEPS, max_grad_norm=0.5, **EXACT, **ALONE
    )
    module = Regression(given.half)
    trainer = L.Trainer(strategy=strategy, callbacks=[UntilBothAreThere()], **QUIET)
    trainer.fit(module)
    assert strategy.global_step == STEPS
    save_model(module, str(given.folder / f"weights-{given.half}.safetensors"))
    print("rates", *(f"{step}:{rate:.6f}" for step, rate in module.rates.items()), flush=True)


if __name__ == "__main__":
    run_program(main)
