"""What SwarmStrategy makes of its arguments and of the Trainer's, before there is any network."""

import importlib.util
import random
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from lightning.pytorch import callbacks
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from collab.errors import UserError
from integrations import lightning as ours
from integrations.lightning import SwarmStrategy
from tests.collab.conftest import daemons

ROOT = Path(__file__).resolve().parent.parent.parent
ADDRESS = "/ip4/203.0.113.7/tcp/31337/p2p/QmRunOrganizer"
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Module(L.LightningModule):
    def __init__(self, make: Any = None, *, automatic: bool = True, frozen: bool = False, batch_norm: bool = False):
        super().__init__()
        self.automatic_optimization = automatic
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        if batch_norm:
            self.layers.append(torch.nn.BatchNorm1d(1))
        self.layers[0].requires_grad_(not frozen)
        self.make = make or (lambda params: torch.optim.SGD(params, lr=0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4)


def fit(strategy: SwarmStrategy, module: L.LightningModule, **options: Any) -> None:
    L.Trainer(**QUIET | {"strategy": strategy} | options).fit(module, loader())


# ---- its arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [ADDRESS, f"{ADDRESS},{ADDRESS}", f"{ADDRESS} {ADDRESS}", [ADDRESS], (ADDRESS,)])
def test_addresses_come_as_text_or_as_lists(given: Any) -> None:
    assert set(SwarmStrategy(8, initial_peers=given).network.initial_peers) == {ADDRESS}


@pytest.mark.parametrize("name", ["INITIAL_PEERS", "PL_INITIAL_PEERS"])
def test_addresses_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, f"{ADDRESS},{ADDRESS}")
    assert SwarmStrategy(8).network.initial_peers == [ADDRESS, ADDRESS]
    assert SwarmStrategy(8, initial_peers="/ip4/x").network.initial_peers == ["/ip4/x"], "the argument comes first"
    assert SwarmStrategy(8, initial_peers=[]).network.initial_peers == [], "a new swarm, in spite of it"


def test_options_reach_the_settings_and_the_network() -> None:
    strategy = SwarmStrategy(
        64, run_id="mine", max_grad_norm=2, quorum=1, grad_compression="none", max_global_steps=7,
        host_maddrs=("/ip4/127.0.0.1/tcp/0",), client_mode=True,
    )  # fmt: skip
    wanted = {"target_batch_size": 64, "run_id": "mine", "max_grad_norm": 2, "quorum": 1.0, "grad_compression": "none"}
    assert wanted.items() <= strategy.settings.items() and strategy.settings["max_global_steps"] == 7
    options = strategy.network.peer_options()
    assert options["client_mode"] is True and options["host_maddrs"] == ["/ip4/127.0.0.1/tcp/0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matchmaking_tme": 3.0}, "no option matchmaking_tme.*matchmaking_time"),
        ({"vocab_size": 100}, "no option vocab_size"),
        ({"learning_rate": 0.1}, "no option learning_rate"),
        ({"quorum": "all"}, "quorum is 'all', but it must be a number"),
        ({"grad_compression": "int4"}, "one of none, float16"),
        ({"matchmaking_time": 0.5}, "at least 1 second"),
        ({"run_id": "a run"}, "run_id"),
        ({"delay_grad_averaging": True}, "delay_optimizer_step"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SwarmStrategy(8, **options)


def test_what_is_printed_for_the_others_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py"])
    message = ours.join_message([ADDRESS, f"{ADDRESS}x"])
    assert f"INITIAL_PEERS={ADDRESS},{ADDRESS}x python train.py" in message
    [argument] = re.findall(r'initial_peers="(.*)"', message)
    assert SwarmStrategy(8, initial_peers=argument).network.initial_peers == [ADDRESS, f"{ADDRESS}x"]


# ---- what it refuses ---------------------------------------------------------------------------------------------


def scheduled(make: Any, **config: Any) -> Any:
    def optimizer_and_schedule(params: Any) -> Any:
        optimizer = torch.optim.SGD(params, lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step", **config}}

    return optimizer_and_schedule


def two_schedules(params: Any) -> Any:
    optimizer = torch.optim.SGD(params, lr=0.1)
    return [optimizer], [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)]


class Clipping(Module):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


class Scheduling(Module):
    def lr_scheduler_step(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


def half_each(params: Any) -> Any:
    return [torch.optim.SGD(params[:2], lr=0.1), torch.optim.SGD(params[2:], lr=0.1)]


REFUSED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "accumulation": ("target_batch_size together", Module(), {"accumulate_grad_batches": 2}),
    "clipping": ("max_grad_norm", Module(), {"gradient_clip_val": 1.0}),
    "own clipping": ("max_grad_norm", Clipping(), {}),
    "devices": ("devices=1", Module(), {"devices": 2}),
    "half precision": ("float32", Module(), {"precision": "bf16-true"}),
    "plateaus": ("metric", Module(scheduled(schedulers.ReduceLROnPlateau, monitor="loss")), {}),
    "two schedules": ("SequentialLR", Module(two_schedules), {}),
    "frequency": ("frequency", Module(scheduled(lambda each: schedulers.StepLR(each, 1), frequency=3)), {}),
    "own scheduling": ("lr_scheduler_step", Scheduling(), {}),
    "manual optimization": ("samples of each call", Module(automatic=False), {}),
    "several optimizers": ("parameter groups", Module(half_each, automatic=False), {}),
    "frozen": ("layers.0.weight is frozen", Module(frozen=True), {}),
    "dampening": (
        "dampening=0",
        Module(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)),
        {},
    ),
    "closure": ("without a closure", Module(lambda params: torch.optim.LBFGS(params)), {}),
    "accumulation scheduler": (
        "GradientAccumulationScheduler",
        Module(),
        {"callbacks": [callbacks.GradientAccumulationScheduler({1: 2})]},
    ),
    "weight averaging": (
        "StochasticWeightAveraging",
        Module(),
        {"callbacks": [callbacks.StochasticWeightAveraging(0.1)]},
    ),
}


@pytest.mark.parametrize(("reason", "module", "options"), REFUSED.values(), ids=REFUSED)
def test_what_would_train_something_else_is_refused(reason: str, module: Any, options: dict[str, Any]) -> None:
    strategy = SwarmStrategy(8)
    with pytest.raises(UserError, match=reason):
        fit(strategy, module, **options)
    assert strategy.peer is None and not daemons(), "nothing was started"


def test_batch_norm_is_refused_with_local_updates() -> None:
    with pytest.raises(UserError, match="is a BatchNorm1d with running"):
        fit(SwarmStrategy(8, local_updates=True), Module(batch_norm=True))


def test_other_accelerators_are_refused() -> None:
    class Abacus(L.pytorch.accelerators.CPUAccelerator.__bases__[0]):  # type: ignore[name-defined]
        def __getattr__(self, name: str) -> Any: ...

    Abacus.__abstractmethods__ = frozenset()
    strategy = SwarmStrategy(8)
    strategy.accelerator = Abacus()
    with pytest.raises(UserError, match="not with Abacus"):
        _ = strategy.root_device


def test_other_entry_points_need_no_network() -> None:
    seen = []

    class Tested(Module):
        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            assert isinstance(self.trainer.strategy, SwarmStrategy)
            seen.append((self.trainer.strategy.peer, self.trainer.strategy.num_peers))

        validation_step = predict_step = test_step

    trainer = L.Trainer(**QUIET | {"strategy": SwarmStrategy(8, initial_peers=ADDRESS)})
    for run in (trainer.test, trainer.validate, trainer.predict):
        run(Tested(), loader())
    assert set(seen) == {(None, 1)} and len(seen) == 6


# ---- batches -----------------------------------------------------------------------------------------------------


class Unreadable:
    """A batch that nobody can look into."""


@pytest.mark.parametrize(
    "batch", [torch.ones(6, 4), (torch.ones(6, 4), torch.ones(6)), {"x": torch.ones(6, 4)}, [{"x": [torch.ones(6)]}]]
)
def test_the_batch_size_is_that_of_the_batch(batch: Any) -> None:
    strategy = SwarmStrategy(8)
    strategy.on_train_batch_start(batch, 0)
    assert strategy._samples == 6
    strategy.on_train_batch_start(torch.ones(2, 4), 1)
    assert strategy._samples == 2, "the last one of an epoch may be smaller"


def test_a_batch_that_does_not_tell_its_size_needs_a_word() -> None:
    with pytest.raises(UserError, match=r"Unreadable.*SwarmStrategy\(batch_size="):
        SwarmStrategy(8).on_train_batch_start(Unreadable(), 0)
    strategy = SwarmStrategy(8, batch_size=5)
    strategy.on_train_batch_start(Unreadable(), 0)
    assert strategy._samples == 5


# ---- what scripts have to have in common -------------------------------------------------------------------------


def script(
    module: Any = None, rate: float = 0.1, make: Any = torch.optim.SGD, gamma: Any = None, **options: Any
) -> Any:
    module = module or Module()
    optimizer = make(module.parameters(), lr=rate)
    schedule = gamma and schedulers.ExponentialLR(optimizer, gamma)
    return ours._script(SwarmStrategy(8, **options).settings, module, optimizer, schedule)


def test_equal_scripts_are_equal_whatever_a_computer_chooses_for_itself() -> None:
    fused = lambda params, lr: torch.optim.SGD(params, lr=lr, fused=True)  # noqa: E731
    assert script(gamma=0.9) == script(gamma=0.9)
    assert script() == script(make=fused, batch_size=3, bandwidth=10.0, offload_optimizer=True)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"rate": 0.2}, "parameter group 0, lr"),
        ({"make": torch.optim.Adagrad}, "optimizer"),
        ({"gamma": 0.9}, "schedule"),
        ({"quorum": 1.0}, "quorum"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"module": Module(batch_norm=True)}, "parameter layers.2.weight"),
    ],
)
def test_other_scripts_differ_by_name(other: dict[str, Any], name: str) -> None:
    one, two = script(), script(**other)
    assert one.get(name) != two.get(name)
    assert ours._fingerprint(one) != ours._fingerprint(two), "they never meet"


def test_what_strangers_say_is_shown_without_harm() -> None:
    assert ours._short("a\x1b[2Jb\n") == "a?[2Jb?"
    assert len(ours._short(list(range(10_000)))) < 300


# ---- around ------------------------------------------------------------------------------------------------------


def test_peers_of_one_script_see_other_data() -> None:
    drawn = []
    for peer_id in ("QmOne", "QmTwo"):
        L.seed_everything(0)
        ours._see_other_data(type("Peer", (), {"peer_id": peer_id})())
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert all(one != other for one, other in zip(*drawn, strict=True))


@pytest.mark.filterwarnings("ignore:Seems like:UserWarning")
def test_an_offloaded_schedule_moves_the_offloaded_optimizer() -> None:
    module = Module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, betas=(0.8, 0.9))
    schedule = schedulers.LambdaLR(optimizer, lambda step: len(list(module.parameters())) * 3 * 0.5**step)
    copies = [{"params": [torch.nn.Parameter(param.detach().clone()) for param in module.parameters()]}]
    inner = ours.same_over(optimizer, [{**optimizer.param_groups[0], **copies[0]}])
    assert ours._same(optimizer.param_groups, optimizer) and not ours._same(copies, optimizer)
    bound = ours._bound(schedule, optimizer, inner, module)
    optimizer.step()
    bound.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.6) and optimizer.param_groups[0]["lr"] == pytest.approx(1.2)
    assert inner.param_groups[0]["betas"] == (0.8, 0.9)


def test_without_lightning_people_are_told_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    [pinned] = re.findall(r"^lightning==\S+", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    spec = importlib.util.spec_from_file_location("another", ROOT / "integrations" / "lightning.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(UserError, match=f"pip install {pinned}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_nothing_else_needs_lightning() -> None:
    folders = ("collab", "tasks", "tokenizer", "scripts", "benchmarks")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 50
    assert not [file for file in files if re.search(r"^\s*(import|from) lightning", file.read_text(), re.MULTILINE)]
    assert "lightning" not in (ROOT / "requirements.txt").read_text()
