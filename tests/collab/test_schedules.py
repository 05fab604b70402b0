"""Every peer is at the same place of the schedule, whenever it joined."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hivemind.optim.state_averager import TrainingStateAverager, dump_optimizer_state, load_optimizer_state
from torch.optim import lr_scheduler as schedulers

from collab.averager import StateAverager
from collab.errors import UserError
from collab.schedules import ReplayedSchedule

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
STEPS = 9


def sequence(inner: torch.optim.Optimizer) -> schedulers.SequentialLR:
    warm_up = schedulers.LinearLR(inner, 0.1, total_iters=4)
    return schedulers.SequentialLR(inner, [warm_up, schedulers.ExponentialLR(inner, 0.9)], milestones=[4])


def chain(inner: torch.optim.Optimizer) -> schedulers.ChainedScheduler:
    return schedulers.ChainedScheduler([schedulers.ConstantLR(inner, 0.5, 3), schedulers.ExponentialLR(inner, 0.9)])


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda inner: schedulers.LambdaLR(inner, lambda step: 0.9**step),
    "MultiplicativeLR": lambda inner: schedulers.MultiplicativeLR(inner, lambda step: 0.9),
    "StepLR": lambda inner: schedulers.StepLR(inner, 2, 0.5),
    "MultiStepLR": lambda inner: schedulers.MultiStepLR(inner, [2, 5], 0.5),
    "ConstantLR": lambda inner: schedulers.ConstantLR(inner, 0.5, 3),
    "LinearLR": lambda inner: schedulers.LinearLR(inner, 0.1, total_iters=20),
    "ExponentialLR": lambda inner: schedulers.ExponentialLR(inner, 0.9),
    "PolynomialLR": lambda inner: schedulers.PolynomialLR(inner, 20, 2.0),
    "CosineAnnealingLR": lambda inner: schedulers.CosineAnnealingLR(inner, 20),
    "CosineAnnealingWarmRestarts": lambda inner: schedulers.CosineAnnealingWarmRestarts(inner, 4),
    "CyclicLR": lambda inner: schedulers.CyclicLR(inner, 0.01, 0.2, 3, mode="triangular2"),
    "OneCycleLR": lambda inner: schedulers.OneCycleLR(inner, 0.2, 20),
    "SWALR": lambda inner: torch.optim.swa_utils.SWALR(inner, 0.01, 5),
    "SequentialLR": sequence,
    "ChainedScheduler": chain,
}
CHAINABLE = ["MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR"]


def make_inner() -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [torch.nn.Parameter(torch.ones(2))]},
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.3},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.95)


def options(inner: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]


def path_of(make: Callable[[Any], Any], steps: int) -> list[list[dict[str, Any]]]:
    """The options of the optimizer in each global step, in plain PyTorch."""
    inner = make_inner()
    scheduler, path = make(inner), []
    for _ in range(steps):
        path.append(options(inner))
        inner.step()
        scheduler.step()
    return [*path, options(inner)]


def averager_of(kind: type, inner: Any, scheduler: Any, step: int) -> Any:
    """One without processes."""
    averager: Any = object.__new__(kind)
    averager.optimizer, averager.scheduler, averager.local_epoch = inner, scheduler, step
    averager.lock_optimizer, averager._parent_pid = threading.Lock(), 0
    return averager


def joined(kind: type, make: Callable[[Any], Any], scheduled: Callable[[Any], Any]) -> Any:
    """A newcomer that has taken over the state of a donor at global step `STEPS`."""
    donor, inner = make_inner(), make_inner()
    scheduler = make(donor)
    for _ in range(STEPS):
        donor.step()
        scheduler.step()
    averager = averager_of(kind, inner, scheduled(make(inner)), STEPS)
    load_optimizer_state(inner, *dump_optimizer_state(donor))
    averager._taking_over = True
    averager._update_scheduler()
    averager._taking_over = False
    return averager


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_newcomer_goes_on_where_the_others_are(name: str) -> None:
    make = SCHEDULES[name]
    path = path_of(make, STEPS + 6)
    averager = joined(StateAverager, make, ReplayedSchedule)
    for step in range(STEPS, STEPS + 6):
        assert options(averager.optimizer) == path[step], f"global step {step}"
        averager.local_epoch += 1
        averager._update_scheduler()
    assert averager.scheduler._step_count - 1 == STEPS + 6, "the global step that newcomers are told"


@pytest.mark.parametrize("name", CHAINABLE)
def test_stock_hivemind_lets_a_newcomer_decay_twice(name: str) -> None:
    """When this fails, upstream has mended it, and `ReplayedSchedule` can go."""
    averager = joined(TrainingStateAverager, SCHEDULES[name], lambda scheduler: scheduler)
    right = path_of(SCHEDULES[name], STEPS)[STEPS]
    assert [group["lr"] for group in options(averager.optimizer)] != [group["lr"] for group in right]


@pytest.mark.parametrize("name", ["SequentialLR", "ChainedScheduler"])
def test_stock_hivemind_has_no_place_for_schedules_made_of_others(name: str) -> None:
    with pytest.raises(AttributeError, match="_step_count"):
        joined(TrainingStateAverager, SCHEDULES[name], lambda scheduler: scheduler)


def test_a_rate_can_be_a_tensor() -> None:
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1))
    schedule = ReplayedSchedule(schedulers.ExponentialLR(inner, 0.5))
    schedule.step()
    assert float(inner.param_groups[0]["lr"]) == pytest.approx(0.05)
    schedule.start_over()
    assert float(inner.param_groups[0]["lr"]) == pytest.approx(0.1)
    schedule.step()
    schedule.start_over()
    assert float(inner.param_groups[0]["lr"]) == pytest.approx(0.1), "what is kept of the beginning does not move"


def test_plateaus_are_refused() -> None:
    with pytest.raises(UserError, match="metric"):
        ReplayedSchedule(schedulers.ReduceLROnPlateau(make_inner()))
