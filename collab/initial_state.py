"""The state of an optimizer that has made no step yet, in full, so that a newcomer's can be loaded into it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from collab.errors import UserError

ParamGroups = Sequence[dict[str, Any]]

TRIAL_SIZE = 4  # of each dimension, at most
TRIAL_STEPS = 2


def make_state(inner: torch.optim.Optimizer) -> None:
    """Give every parameter its optimizer state, as if it had been there before the first step.

    In shared memory before the averagers' processes are forked, as each of them would keep a copy of what moves there
    later; and without any gradient, for the same reason.

    Left to itself hivemind makes one real step with gradients of zero (optim/state_averager.py): weight decay would
    change the weights that were just loaded from a checkpoint, and the bias correction would be one step ahead.
    """
    params = params_of(inner)
    before = [dict(group) for group in inner.param_groups]
    for param in params:
        param.grad = torch.zeros_like(param)
    for group in inner.param_groups:  # with both at zero neither weights nor moments move
        group["lr"] = 0.0
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    inner.step()
    for group, options in zip(inner.param_groups, before, strict=True):
        group.update(options)
        for param in group["params"]:
            param.grad = None
            _undo_the_step(inner.state[param], group["lr"])
            share_memory(inner.state[param].values())


def _undo_the_step(state: dict[str, Any], rate: Any) -> None:
    """What a step without gradient and rate has changed all the same; names are those of torch.optim."""
    untouched = {"step": 0, "mu_product": 1, "eta": rate, "step_size": rate}  # the latter of NAdam, ASGD and Rprop
    for name in untouched.keys() & state.keys():
        if isinstance(state[name], torch.Tensor):
            state[name].fill_(untouched[name])
        else:
            state[name] = untouched[name]


def refuse_unknown_ways(make: Callable[[ParamGroups], torch.optim.Optimizer], groups: ParamGroups) -> None:
    """Refuse an optimizer whose first steps would be others after `make_state`, or that a swarm cannot share.

    Found out by trying, on a few small parameters like those of `groups`: any class may be given, also one of which
    nothing is known here.

    :param make: makes the optimizer of parameter groups.
    :raises UserError: why it cannot be used.
    """
    trials = []
    with torch.random.fork_rng(devices=[]):
        for prepared in (False, True):
            small = _small_groups(groups)
            torch.default_generator.manual_seed(0)  # of the CPU alone
            try:
                inner = make(small)
                name = type(inner).__name__
                if prepared:
                    make_state(inner)
                options = _options(inner)
                for _ in range(TRIAL_STEPS):
                    for param in params_of(inner):
                        param.grad = torch.randn(param.shape).to(param)
                    inner.step()
            except Exception as error:
                raise UserError(
                    f"{type(error).__name__} in a trial of the optimizer: {error}. It has to step with dense gradients "
                    f"and without a closure. Use another one, such as AdamW."
                ) from error
            if _options(inner) != options:
                raise UserError(
                    f"{name} keeps what it learns in the options of its parameter groups, which peers do not average. "
                    f"Use another optimizer, such as AdamW."
                )
            trials.append(params_of(inner))
    if not all(torch.equal(one, other) for one, other in zip(*trials, strict=True)):
        raise UserError(
            f"{name} makes another first step when its state is there before: the peers of a swarm, which hand their "
            f"state to newcomers, would differ from one process. With SGD, set dampening=0; or use another optimizer, "
            f"such as AdamW."
        )


def _small_groups(groups: ParamGroups) -> list[dict[str, Any]]:
    """The same options, and a corner of one parameter of each kind."""
    small = []
    for group in groups:
        kinds = {(param.dim(), param.dtype, param.device): param for param in group["params"]}
        corners = [param.detach()[(slice(TRIAL_SIZE),) * param.dim()].clone() for param in kinds.values()]
        small.append({**group, "params": [torch.nn.Parameter(corner) for corner in corners]})
    return small


def _options(inner: torch.optim.Optimizer) -> list[dict[str, Any]]:
    groups = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
    return [{key: float(v) if isinstance(v, torch.Tensor) else v for key, v in group.items()} for group in groups]


def params_of(inner: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All its parameters, in the order of its groups."""
    return [param for group in inner.param_groups for param in group["params"]]


def share_memory(values: Iterable[Any]) -> None:
    """Move the CPU tensors among `values` to shared memory; see `SwarmOptimizer.share_state_memory`."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            value.share_memory_()


def same_over(given: torch.optim.Optimizer, groups: ParamGroups) -> torch.optim.Optimizer:
    """An optimizer of the same class and options as `given`, for other parameters, without state.

    Not made by its class, whose arguments need not be among its defaults (AdamW's are not).

    :param groups: parameter groups; options that they leave out are those of `given`.
    """
    other = object.__new__(type(given))
    own = {key: value for key, value in vars(given).items() if key not in ("step", "state", "param_groups")}
    hooks = {key: type(value)() for key, value in own.items() if key.endswith("_hooks") and isinstance(value, Mapping)}
    vars(other).update(own | hooks)
    torch.optim.Optimizer.__setstate__(other, {"state": defaultdict(dict), "param_groups": []})
    for group in groups:
        other.add_param_group(dict(group))
    return other
