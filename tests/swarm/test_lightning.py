"""Lightning modules on several computers: the script of the docs, and what one process would have made of it."""

import csv
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_model

from integrations.lightning import SwarmStrategy
from tests.collab.conftest import daemons, ended
from tests.swarm.lightning_peer import ALONE, EXACT, QUIET, SETTLING, STEPS, Regression
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
            assert program.wait(300) == 0, program.output()
        begun = re.search(r"Starting from global step (\d+)", second.output())
        assert begun and int(begun[1]) >= 1, second.output()
        for program in programs:
            verdicts = ENDED.findall(program.output())
            assert verdicts[-1][0] == "30", program.output()
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
        other = start_peer(tmp_path, 2, "--target_batch_size", "2000", initial_peers=address)
        programs += [other, start_peer(tmp_path, 1, initial_peers=address)]
        assert other.wait(150) == 1
        assert "target_batch_size: 2000 here, 1000 there" in other.output(), "another script is refused by name"
        assert [program.wait(150) for program in programs[::2]] == [0, 0], [each.output() for each in programs]
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


# ---- a peer alone, which is one process with its own batch -------------------------------------------------------


def swarm_of_one(steps: int = STEPS, **options: Any) -> SwarmStrategy:
    """Every batch is a global step."""
    return SwarmStrategy(1000, batch_size=1000, max_global_steps=steps, max_grad_norm=0.5, **EXACT, **ALONE, **options)


@pytest.fixture(scope="module")
def reference() -> Regression:
    module = Regression(0)
    Trainer(max_steps=STEPS, gradient_clip_val=0.5, **QUIET).fit(module)
    return module


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """What a fit starts ends with it, and Ctrl-C works as before."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert ended(daemons()), "a libp2p daemon outlived the fit"
    assert signal.getsignal(signal.SIGINT) in (handler, signal.SIG_IGN)  # Lightning's, after a KeyboardInterrupt
    signal.signal(signal.SIGINT, handler)


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpoint_is_continued_at_the_swarms_step(
    tmp_path: Path, reference: Regression, nothing_left: None, offload: bool
) -> None:
    logger, monitor = CSVLogger(tmp_path), LearningRateMonitor()
    quiet = QUIET | {"logger": logger, "log_every_n_steps": 1}
    first = swarm_of_one(steps=5, offload_optimizer=offload)
    trainer = Trainer(strategy=first, callbacks=[monitor], **quiet)
    trainer.fit(Regression(0))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert first.global_step == trainer.callback_metrics["swarm/global_step"] == 5
    assert first.peer is None and not daemons()
    logger.save()
    [table] = tmp_path.rglob("metrics.csv")
    told = [row for row in csv.DictReader(table.open()) if row["swarm/global_step"]]
    assert [float(row["swarm/global_step"]) for row in told] == [1, 2, 3, 4, 5], "the verdict on every round"
    assert {row["swarm/peers_met"] for row in told} == {"1.0"} and {row["swarm/applied"] for row in told} == {"0.0"}

    module = Regression(0)
    second = swarm_of_one(offload_optimizer=offload)
    Trainer(strategy=second, **QUIET).fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert second.global_step == STEPS and min(module.rates) == 5
    assert module.rates == pytest.approx({step: 0.2 * 0.9**step for step in range(5, STEPS)})
    assert_same_weights(module, reference)


def test_a_strategy_trains_twice(reference: Regression, nothing_left: None) -> None:
    strategy = swarm_of_one()
    trainer = Trainer(strategy=strategy, **QUIET)
    for _ in range(2):
        module = Regression(0)
        trainer.fit(module)
        assert strategy.global_step == STEPS
        assert_same_weights(module, reference)


WAYS: dict[str, dict[str, Any]] = {
    "local updates": {"local_updates": True},
    "delayed": {"delay_optimizer_step": True, "delay_grad_averaging": True},
    "rollback": {"rollback_after": 2},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_other_ways_of_averaging(tmp_path: Path, nothing_left: None, options: dict[str, Any]) -> None:
    module, strategy = Regression(0), swarm_of_one(**options)
    quiet = QUIET | {"enable_checkpointing": True, "default_root_dir": tmp_path}
    Trainer(strategy=strategy, **quiet).fit(module)
    assert strategy.global_step == STEPS
    weights, untrained = module.layers[0].weight, Regression(0).layers[0].weight
    assert isinstance(weights, torch.Tensor) and isinstance(untrained, torch.Tensor)
    assert weights.isfinite().all() and not torch.allclose(weights, untrained, atol=1e-3)


class ByHand(Regression):
    def __init__(self) -> None:
        super().__init__(0)
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]


def test_manual_optimization_with_a_batch_size(reference: Regression, nothing_left: None) -> None:
    module = ByHand()
    Trainer(strategy=swarm_of_one(), **QUIET).fit(module)
    assert_same_weights(module, reference)


class WithTrouble(Regression):
    """Its loss is NaN once; in the end it fails in the way that is asked for."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__(0)
        self.error = error

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN, "Ctrl-C works while it trains"
        if self.error is not None and batch_idx == 3:
            raise self.error
        if batch_idx == 2:
            return None
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 4 else loss


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt(), SystemExit), (ValueError("no"), ValueError)])
def test_nothing_is_left_when_it_ends_early(nothing_left: None, error: BaseException, seen: Any) -> None:
    strategy = swarm_of_one()
    with pytest.raises(seen):
        Trainer(strategy=strategy, **QUIET).fit(WithTrouble(error))
    assert strategy.peer is None and strategy.global_step == 2


@pytest.mark.parametrize(
    "precision", [{"precision": "bf16-mixed"}, {"plugins": [MixedPrecision("16-mixed", "cpu")]}], ids=["bf16", "fp16"]
)
def test_mixed_precision_and_a_batch_that_is_not_finite(
    reference: Regression, nothing_left: None, precision: dict[str, Any]
) -> None:
    module, strategy = WithTrouble(), swarm_of_one()
    Trainer(strategy=strategy, **precision, **QUIET).fit(module)
    assert strategy.global_step == STEPS and strategy.skipped_batches == 1
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=0.05, atol=0.01)
