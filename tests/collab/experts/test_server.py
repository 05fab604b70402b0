"""One expert on its server: what it refuses, and how it is kept."""

import pytest
import torch
from safetensors.torch import load, save

from collab.experts.server import TrainedExpert


def tell(pool, *tensors) -> str:
    """What a queue says of a request."""
    error = pool.submit_task(*tensors).exception(timeout=5)
    return str(error)


def test_requests_that_would_end_an_expert_are_refused(trained) -> None:
    expert = trained[0]
    assert "expected 1 tensors of [rows, 8], got [[3, 9]]" in tell(expert.forward_pool, torch.zeros(3, 9))
    assert "got [[0, 8]]" in tell(expert.forward_pool, torch.zeros(0, 8))
    assert "expected float32" in tell(expert.forward_pool, torch.zeros(3, 8, dtype=torch.float64))
    assert "expected 2 tensors" in tell(expert.backward_pool, torch.zeros(3, 8))
    assert "NaN" in tell(expert.backward_pool, torch.zeros(3, 8), torch.full((3, 8), torch.nan))


def test_a_gradient_that_is_not_finite_changes_nothing(trained) -> None:
    expert = trained[0]
    before = {name: value.clone() for name, value in expert.module.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        expert.backward(torch.full((3, 8), 1e30), torch.full((3, 8), 1e30))
    assert all(torch.equal(value, before[name]) for name, value in expert.module.state_dict().items())
    expert.backward(torch.randn(3, 8), torch.randn(3, 8))
    assert expert.steps == 1 and not torch.equal(expert.module.up.weight, before["up.weight"])


@pytest.mark.parametrize("steps", [0, 3])
def test_a_saved_expert_goes_on_as_if_it_had_not_been_away(plan, trained, steps) -> None:
    one, other = trained[2], TrainedExpert(plan, 2)
    for _ in range(steps):
        one.backward(torch.randn(4, 8), torch.randn(4, 8))
    other.load_bytes(one.as_bytes())
    assert other.steps == steps
    rows, gradients = torch.randn(4, 8), torch.randn(4, 8)
    assert torch.equal(one.backward(rows, gradients)[0], other.backward(rows, gradients)[0])
    for mine, its in zip(one.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, its), "Adam's moments came along"


def test_what_is_damaged_or_of_another_expert_is_refused_and_nothing_changes(plan, trained) -> None:
    good = trained[1].as_bytes()
    wrong = {"module.up.weight": torch.zeros(1)}
    about = {"expert": plan.uid(0), "steps": "5"}
    params = {f"module.{name}": torch.zeros_like(value) for name, value in trained[0].module.named_parameters()}
    nan = {name: torch.full_like(value, torch.nan) for name, value in params.items()}
    cases = [
        good,
        good[:-9],
        b"",
        b"\xff" * 99,
        save(wrong, about),
        save(params, about),
        save(nan, about | {"steps": "0"}),
    ]
    before = {name: value.clone() for name, value in load(trained[0].as_bytes()).items()}
    for data in cases:
        with pytest.raises(ValueError):
            trained[0].load_bytes(data)
        now = load(trained[0].as_bytes())
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
