"""The layer: the same function as its experts put together here, finite whatever they do, and it waits for few."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collab.experts.mixture import Mixture
from collab.experts.plan import ExpertPlan
from tests.collab.experts.conftest import Answering, Experts


def plain(mixture, modules, rows, alive):
    """The mathematics: each token's best two of those alive, weighted by the gate's softmax over these two."""
    logits = mixture.gate(rows)
    absent = torch.tensor([index not in alive for index in range(4)])
    best, chosen = logits.masked_fill(absent, -torch.inf).topk(2)
    weights = best.softmax(1)
    outputs = torch.stack([module(rows) for module in modules], 1)
    return (outputs.gather(1, chosen[..., None].expand(-1, -1, 8)) * weights[..., None]).sum(1)


@pytest.mark.parametrize("alive", [(0, 1, 2, 3), (1, 3)])
def test_outputs_and_gradients_are_those_of_the_same_experts_put_together_here(plan, trained, mixture, alive) -> None:
    modules = [copy.deepcopy(trained[index].module) for index in range(4)]
    rows = torch.randn(2, 5, 8, requires_grad=True)
    mixture.experts = Experts({index: trained[index] for index in alive})
    mixture(rows).square().mean().backward()
    ours = [rows.grad, mixture.gate.weight.grad]
    rows.grad = mixture.gate.weight.grad = None
    output = mixture(rows)
    expected = plain(mixture, modules, rows.reshape(-1, 8), alive).reshape(2, 5, 8)
    first = plain(mixture, [trained[index].module for index in range(4)], rows.reshape(-1, 8), alive)
    assert torch.allclose(output, first.reshape(2, 5, 8), atol=1e-6), "after the step as well"
    expected.square().mean().backward()
    for mine, its in zip(ours, [rows.grad, mixture.gate.weight.grad], strict=True):
        assert torch.allclose(mine, its, atol=1e-6)
    for index in alive:  # a step of Adam with the gradient that autograd finds, clipped
        module, optimizer = modules[index], torch.optim.Adam(modules[index].parameters(), lr=0.01)
        torch.nn.utils.clip_grad_norm_(module.parameters(), plan.max_grad_norm)
        optimizer.step()
        for name, param in module.named_parameters():
            its = dict(trained[index].module.named_parameters())[name]
            assert torch.allclose(param, its, atol=2e-4), (index, name)


@given(st.sets(st.integers(0, 3)), st.booleans())
def test_whoever_fails_the_output_and_the_gradients_are_finite(failing, with_nan) -> None:
    plan = ExpertPlan("test_abc", 1, 4, 8, 16)

    def fail(*tensors):
        if with_nan:
            return torch.full_like(tensors[0], torch.nan)
        raise ValueError("no")

    mixture = Mixture(plan, 0)
    experts = {i: Answering(fail if i in failing else lambda *tensors: tensors[-1] + 1) for i in range(4)}
    mixture.experts = Experts(experts)
    rows = torch.randn(16, 8, requires_grad=True)
    output = mixture(rows)
    (output + rows).sum().backward()
    assert rows.grad is not None and output.isfinite().all() and rows.grad.isfinite().all()
    if not failing:
        assert torch.allclose(output, rows + 1, atol=1e-5), "the weights of a token sum up to 1"
    if len(failing) == 4:
        assert not output.any()
    assert all(reason in ("no", "its answer has NaN or infinite values") for reason in mixture.experts.reasons)


def test_without_experts_it_adds_nothing(mixture) -> None:
    rows = torch.randn(2, 3, 8, requires_grad=True)
    assert not mixture(rows).any()
    mixture.experts = Experts({})
    assert not mixture(rows).any()


def test_the_slow_are_left_behind_once_every_token_has_enough_answers(plan, trained, mixture) -> None:
    slow = Answering(None)
    mixture.experts = Experts({0: trained[0], 1: slow})
    rows = torch.randn(6, 8)
    output = mixture(rows)  # would take a minute otherwise
    assert slow.asked == 1 and "no answer within" in mixture.experts.reasons[0]
    assert torch.allclose(output, trained[0].module(rows), atol=1e-6)


def test_who_has_failed_since_the_forward_pass_is_not_asked_for_gradients(mixture) -> None:
    well, gone = (Answering(lambda *tensors: tensors[-1]) for _ in range(2))
    mixture.experts = Experts({0: well, 1: gone})
    rows = torch.randn(6, 8, requires_grad=True)
    output = mixture(rows)
    mixture.experts.failed(gone, "its server was killed")
    output.sum().backward()
    assert (well.asked, gone.asked) == (2, 1) and rows.grad is not None and rows.grad.any()


def test_an_answer_of_another_shape_counts_as_none(mixture) -> None:
    mixture.experts = Experts({0: Answering(lambda rows: rows[1:]), 1: Answering(lambda rows: rows)})
    rows = torch.randn(6, 8)
    assert torch.allclose(mixture(rows), rows, atol=1e-6)
    assert "[5, 8] instead of float32 [6, 8]" in mixture.experts.reasons[0]


def test_the_balance_is_one_for_even_use_and_its_gradient_takes_work_off_the_busiest(plan, trained, mixture) -> None:
    mixture.experts = Experts(trained)
    rows = torch.randn(256, 8)
    with torch.no_grad():
        mixture.gate.weight.zero_()
        mixture.gate.weight[0] = 0.5
    mixture(rows.abs())  # positive values: expert 0 is everybody's first
    [uneven] = mixture.balance
    uneven.backward()
    assert uneven > 1.1 and (mixture.gate.weight.grad[0].sum() > mixture.gate.weight.grad[1:].sum(1)).all()
    mixture.balance.clear()
    mixture.eval()
    mixture(rows)
    assert not mixture.balance, "nothing is collected in an evaluation"
    even = Mixture(ExpertPlan("t", 1, 2, 8, 16), 0)
    even.experts = Experts({0: trained[0], 1: trained[1]})
    even(rows)
    assert even.balance[0].item() == pytest.approx(1.0), "two of two"


def test_a_layer_calls_its_own_experts_only(trained) -> None:
    plan = ExpertPlan("test_abc", layers=2, experts=2, hidden_size=8, inner_size=16)
    asked = {index: Answering(lambda rows: rows) for index in range(4)}
    second = Mixture(plan, 1)
    second.experts = Experts(asked)
    second(torch.randn(4, 8))
    assert [asked[index].asked for index in range(4)] == [0, 0, 1, 1]
