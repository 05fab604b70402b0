"""A person's own learning rate schedule in a swarm: every peer, whenever it joins, is where the others are."""

from copy import deepcopy
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from collab.errors import UserError


class ReplayedSchedule(LRScheduler):
    """Any scheduler of torch, one step for each global step.

    A newcomer downloads the rate of the others, and hivemind then replays all steps of the schedule on it
    (optim/state_averager.py, `_update_scheduler`): schedulers that multiply the rate they find, as most of torch's do,
    decay twice. And those that are made of others have no count of their own for that. Here the steps are counted, and
    replayed on what was there at the start (`start_over`).

    :param scheduler: as it is before its first step.
    :raises UserError: it is a ReduceLROnPlateau: each peer would follow a metric of its own.
    """

    def __init__(self, scheduler: Any) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError(
                "ReduceLROnPlateau follows a metric, and each peer of a swarm has another one: their learning rates "
                "would differ. Use a schedule that depends on the number of steps alone, such as CosineAnnealingLR."
            )
        self.optimizer, self.scheduler = scheduler.optimizer, scheduler
        self._options = [_options(group) for group in self.optimizer.param_groups]
        self._beginning = deepcopy(scheduler.state_dict())
        self._step_count = 1  # as torch counts: hivemind steps it while this is not above the global step

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next global step."""
        self.scheduler.step()
        self._step_count += 1

    def start_over(self) -> None:
        """Back to the beginning, with all that a scheduler may have moved in the optimizer's options."""
        for group, options in zip(self.optimizer.param_groups, self._options, strict=True):
            group.update({key: _copied(value) for key, value in options.items()})
        self.scheduler.load_state_dict(deepcopy(self._beginning))
        self._step_count = 1

    def get_last_lr(self) -> list[Any]:
        """The rates of the parameter groups."""
        rates: list[Any] = self.scheduler.get_last_lr()
        return rates

    def state_dict(self) -> dict[str, Any]:
        """That of the scheduler itself."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: where the schedule is follows from the global step."""


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) for key, value in group.items() if key != "params"}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
