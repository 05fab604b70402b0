"""LAMB against Algorithm 2 of You et al. (2020), written out one number at a time."""

import math

import pytest
import torch

import collab.moments
from collab.lamb import Lamb


def algorithm_2(weights, gradients, *, lr, beta1, beta2, eps, weight_decay, bound):
    """The weights of one layer (a list of floats) after one update for each of `gradients`.

    phi, the function of the layer's norm, is min(norm, bound); a layer without a norm is not scaled.
    """
    m, v = [0.0] * len(weights), [0.0] * len(weights)
    for t, gradient in enumerate(gradients, start=1):
        m = [beta1 * a + (1 - beta1) * g for a, g in zip(m, gradient, strict=True)]
        v = [beta2 * a + (1 - beta2) * g * g for a, g in zip(v, gradient, strict=True)]
        corrected = [(a / (1 - beta1**t), b / (1 - beta2**t)) for a, b in zip(m, v, strict=True)]
        update = [a / (math.sqrt(b) + eps) + weight_decay * x for (a, b), x in zip(corrected, weights, strict=True)]
        norm, update_norm = math.hypot(*weights), math.hypot(*update)
        ratio = min(norm, bound) / update_norm if norm > 0 and update_norm > 0 else 1.0
        weights = [x - lr * ratio * u for x, u in zip(weights, update, strict=True)]
    return weights


def parameter(*shape: int, scale: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(scale * torch.randn(*shape, dtype=torch.float64))


def gradients_of(params, steps: int) -> list[list[torch.Tensor]]:
    """Small and large ones: the second moment has to matter, and eps as well."""
    return [
        [torch.randn_like(param) * 10 ** float(torch.empty(1).uniform_(-5, 1)) for param in params]
        for _ in range(steps)
    ]


def take_steps(optimizer, params, gradients) -> None:
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_several_steps_of_several_tensors_follow_the_paper(weight_decay):
    torch.manual_seed(0)
    params = [
        parameter(3, 4),
        parameter(5),
        parameter(1),
        parameter(2, 2, 2, scale=100.0),
    ]  # the last: beyond the bound
    settings = dict(lr=0.02, eps=1e-3, weight_decay=weight_decay)
    gradients = gradients_of(params, steps=7)
    expected = [
        algorithm_2(
            param.detach().flatten().tolist(),
            [step[index].flatten().tolist() for step in gradients],
            **settings, beta1=0.8, beta2=0.95, bound=10.0,
        )
        for index, param in enumerate(params)
    ]  # fmt: skip
    take_steps(Lamb(params, betas=(0.8, 0.95), **settings), params, gradients)
    for param, values in zip(params, expected, strict=True):
        torch.testing.assert_close(
            param.detach().flatten(), torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0
        )


def test_the_norm_in_the_trust_ratio_is_bounded():
    """Of two tensors with the same direction and gradient, both beyond the bound, the longer moves no further."""
    moved = []
    for norm in (10.0, 1000.0):
        param = torch.nn.Parameter(torch.tensor([norm, 0.0]))
        optimizer = Lamb([param], lr=0.1, weight_decay=0.0)
        take_steps(optimizer, [param], [[torch.tensor([0.0, 1.0])]])
        moved.append(param.detach()[1].item())
    assert moved[0] == pytest.approx(-0.1 * 10) and moved[1] == pytest.approx(moved[0])


def test_a_tensor_that_is_worked_through_in_pieces_has_one_trust_ratio(monkeypatch):
    torch.manual_seed(0)
    moved = []
    gradients = None
    for places in (10**6, 64):
        monkeypatch.setattr(collab.moments, "_piece_size", lambda param, places=places: places)
        param = torch.nn.Parameter(torch.linspace(-1, 3, 300, dtype=torch.float64).view(20, 15))
        gradients = gradients or gradients_of([param], steps=3)
        take_steps(Lamb([param], lr=0.1), [param], gradients)
        moved.append(param.detach())
    torch.testing.assert_close(*moved, rtol=1e-12, atol=0)


def test_groups_have_their_own_weight_decay():
    params = [torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2)]
    groups = [{"params": [params[0]], "weight_decay": 0.5}, {"params": [params[1]], "weight_decay": 0.0}]
    take_steps(Lamb(groups, lr=0.1), params, [[torch.zeros(2), torch.zeros(2)]])
    torch.testing.assert_close(params[0].detach(), torch.tensor([2.7, 3.6]))  # 10 % shorter: the ratio undoes the 0.5
    torch.testing.assert_close(params[1].detach(), torch.tensor([3.0, 4.0]))


def test_a_tensor_of_zeros_takes_the_plain_step():
    """A fresh bias has no norm to be scaled to; scaled to it, it would never move."""
    param = torch.nn.Parameter(torch.zeros(4))
    take_steps(Lamb([param], lr=0.1), [param], [[torch.tensor([1.0, -2.0, 3.0, 0.0])]])
    torch.testing.assert_close(param.detach(), torch.tensor([-0.1, 0.1, -0.1, 0.0]), rtol=1e-4, atol=1e-6)


def test_a_gradient_of_zeros_moves_nothing_and_stays_finite():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(3))]
    take_steps(Lamb(params, lr=0.1, weight_decay=0.0), params, [[torch.zeros(3), torch.zeros(3)]] * 3)
    assert params[0].tolist() == [1.0] * 3 and params[1].tolist() == [0.0] * 3


def test_a_parameter_without_a_gradient_is_left_alone():
    still, moving = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    moving.grad = torch.ones(3)
    optimizer = Lamb([still, moving], lr=0.1)
    optimizer.step()
    assert still.tolist() == [1.0] * 3 and still not in optimizer.state
    assert moving.tolist() != [1.0] * 3


def test_it_continues_exactly_from_a_state_dict():
    torch.manual_seed(0)
    straight = [parameter(3, 4), parameter(5)]
    gradients = gradients_of(straight, steps=6)
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in straight]
    take_steps(Lamb(straight, lr=0.05), straight, gradients)

    before = Lamb(resumed, lr=0.05)
    take_steps(before, resumed, gradients[:3])
    after = Lamb(resumed, lr=123.0)
    after.load_state_dict(before.state_dict())
    take_steps(after, resumed, gradients[3:])
    for left, right in zip(straight, resumed, strict=True):
        assert torch.equal(left, right)


def test_a_schedule_changes_the_learning_rate():
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lamb([param], lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    take_steps(optimizer, [param], [[torch.ones(2)]])
    assert param.tolist() == [3.0, 4.0]


def test_it_finds_the_bottom_of_a_quadratic():
    torch.manual_seed(0)
    target = torch.randn(8)
    param = torch.nn.Parameter(torch.randn(8))
    optimizer = Lamb([param], lr=0.05, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=200)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param - target).square().sum()
        loss.backward()
        return loss.item()

    first = closure()
    for _ in range(200):
        optimizer.step(closure)
        schedule.step()
    assert first > 1.0 and closure() < 1e-3 * first
