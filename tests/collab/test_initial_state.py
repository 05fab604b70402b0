"""Optimizers have their state before the first step, and it changes nothing."""

from functools import partial
from typing import Any

import pytest
import torch

from collab.adamw import AdamW8bit
from collab.errors import UserError
from collab.initial_state import make_state, params_of, refuse_unknown_ways, same_over
from collab.lamb import Lamb

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd with momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "fused sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.1, weight_decay=0.1),
    "amsgrad": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, amsgrad=True),
    "fused adamw": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "a rate that is a tensor": partial(torch.optim.AdamW, lr=torch.tensor(0.1)),
    "nadam": partial(torch.optim.NAdam, lr=0.1, weight_decay=0.1),
    "radam": partial(torch.optim.RAdam, lr=0.1, weight_decay=0.1),
    "adamax": partial(torch.optim.Adamax, lr=0.1, weight_decay=0.1),
    "adadelta": partial(torch.optim.Adadelta, lr=0.1, weight_decay=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, weight_decay=0.1, initial_accumulator_value=0.3),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, weight_decay=0.1, centered=True, momentum=0.9),
    "rprop": partial(torch.optim.Rprop, lr=0.1),
    "asgd": partial(torch.optim.ASGD, lr=0.1, weight_decay=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=0.1, weight_decay=0.1),
    "lamb": partial(Lamb, lr=0.1, weight_decay=0.1),
    "8-bit lamb": partial(Lamb, lr=0.1, eight_bit=True),
    "8-bit adamw": partial(AdamW8bit, lr=0.1, weight_decay=0.1),
}
EVERY = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def params() -> list[torch.nn.Parameter]:
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((70, 80), (16,), ())]


def step(inner: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for param in params_of(inner):
        param.grad = torch.randn_like(param)
    inner.step()


@EVERY
def test_the_first_steps_are_those_of_a_fresh_optimizer(make: Any) -> None:
    fresh, prepared = make(params()), make(params())
    make_state(prepared)
    assert all(param.grad is None for param in params_of(prepared))
    assert all(torch.equal(one, other) for one, other in zip(params_of(fresh), params_of(prepared), strict=True))
    for number in range(3):
        step(fresh, number)
        step(prepared, number)
        for one, other in zip(params_of(fresh), params_of(prepared), strict=True):
            assert torch.equal(one, other), f"after step {number + 1}"
    assert prepared.param_groups[0]["lr"] == fresh.param_groups[0]["lr"]
    assert prepared.param_groups[0].get("weight_decay") == fresh.param_groups[0].get("weight_decay")
    refuse_unknown_ways(make, [{"params": params()}])


@EVERY
def test_a_prepared_state_has_the_structure_of_a_used_one(make: Any) -> None:
    """A newcomer fills its own with the donor's."""
    used, prepared = make(params()), make(params())
    make_state(prepared)
    step(used, 0)
    assert used.state_dict()["state"].keys() == prepared.state_dict()["state"].keys() or not used.state
    for one, other in zip(params_of(used), params_of(prepared), strict=True):
        assert used.state[one].keys() == prepared.state[other].keys()
        for key, value in prepared.state[other].items():
            assert not isinstance(value, torch.Tensor) or value.is_shared(), key


def test_muon_too() -> None:  # for matrices alone
    make = partial(torch.optim.Muon, lr=0.1)
    refuse_unknown_ways(make, [{"params": params()[:1]}])


class WithStateInItsOptions(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["distance"] = self.param_groups[0].get("distance", 0.0) + 1.0
        return super().step(closure)


REFUSED = {
    "first step": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "closure": partial(torch.optim.LBFGS, lr=0.1),
    "dense": partial(torch.optim.SparseAdam, lr=0.1),
    "options of its parameter groups": partial(WithStateInItsOptions, lr=0.1),
}


@pytest.mark.parametrize(("why", "make"), REFUSED.items(), ids=REFUSED)
def test_optimizers_that_a_swarm_cannot_share_are_refused(why: str, make: Any) -> None:
    with pytest.raises(UserError, match=why):
        refuse_unknown_ways(make, [{"params": params()[:1]}])


def test_the_trial_leaves_no_trace() -> None:
    group = {"params": params()}
    weights, random = [param.detach().clone() for param in group["params"]], torch.random.get_rng_state()
    refuse_unknown_ways(partial(torch.optim.AdamW, lr=0.1), [group])
    assert all(torch.equal(one, other) for one, other in zip(weights, group["params"], strict=True))
    assert torch.equal(random, torch.random.get_rng_state())


@EVERY
def test_an_optimizer_is_made_anew_for_other_parameters(make: Any) -> None:
    given = make([{"params": params()[:1], "lr": 0.05}, {"params": params()[1:]}])
    halves = params()[:1], params()[1:]
    groups = [{**group, "params": half} for group, half in zip(given.param_groups, halves, strict=True)]
    other = same_over(given, groups)
    assert type(other) is type(given)
    for number in range(2):
        step(given, number)
        step(other, number)
    for one, made in zip(params_of(given), params_of(other), strict=True):
        assert one is not made and torch.equal(one, made)
