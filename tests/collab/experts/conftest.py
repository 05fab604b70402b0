"""Experts of a run that is small enough for a test."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

import pytest
import torch

from collab.experts.mixture import Expert, Mixture
from collab.experts.plan import ExpertPlan
from collab.experts.server import TrainedExpert
from tests.collab.conftest import guarded, start_peer  # noqa: F401 - fixtures


class Experts:
    """A directory without a network."""

    def __init__(self, experts: Mapping[int, Expert]) -> None:
        self.experts = dict(experts)
        self.reasons: list[str] = []

    def alive(self) -> Mapping[int, Expert]:
        return self.experts

    def failed(self, expert: Expert, reason: str) -> None:
        self.reasons.append(reason)
        self.experts = {index: other for index, other in self.experts.items() if other is not expert}


class Answering:
    """An expert that answers what `work` gives, or never."""

    is_near = False

    def __init__(self, work: Callable[..., torch.Tensor] | None) -> None:
        self._work, self.asked = work, 0

    def submit(self, *tensors: torch.Tensor) -> "Future[torch.Tensor]":
        self.asked += 1
        future: Future[torch.Tensor] = Future()
        if self._work is not None:
            try:
                future.set_result(self._work(*tensors))
            except ValueError as error:
                future.set_exception(error)
        return future


@pytest.fixture
def plan() -> ExpertPlan:
    """One layer of four experts, of which each token gets two."""
    return ExpertPlan("test_abc", layers=1, experts=4, hidden_size=8, inner_size=16, timeout=60.0, learning_rate=0.01)


@pytest.fixture
def trained(plan: ExpertPlan) -> dict[int, TrainedExpert]:
    """All experts of the plan, with a last matrix that is not zero."""
    experts = {index: TrainedExpert(plan, index) for index in range(plan.total)}
    generator = torch.Generator().manual_seed(1)
    for expert in experts.values():
        with torch.no_grad():
            expert.module.down.weight.normal_(generator=generator)
    return experts


@pytest.fixture
def mixture(plan: ExpertPlan) -> Iterator[Mixture]:
    torch.manual_seed(0)
    made = Mixture(plan, 0)
    with torch.no_grad():
        made.gate.weight.normal_()
    yield made
