"""The state of LAMB and AdamW, in float32 and in 8 bits: how it travels, and what it costs the updates."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hivemind.compression import CompressionInfo, NoCompression, deserialize_torch_tensor
from hivemind.optim.state_averager import dump_optimizer_state, load_optimizer_state

import collab.moments
from collab.adamw import AdamW8bit
from collab.checkpoint import load_checkpoint, save_checkpoint
from collab.lamb import Lamb
from collab.moments import EIGHT_BIT_FROM_VALUES, float32_state

LAMB8 = partial(Lamb, eight_bit=True)
EIGHT_BIT = pytest.mark.parametrize("kind", [LAMB8, AdamW8bit])
FLOAT32: dict[Callable[..., Any], Callable[..., Any]] = {LAMB8: Lamb, AdamW8bit: torch.optim.AdamW}
SHAPES = [(70, 67), (200, 1000), (64,)]  # a last block that is partly empty; more than a piece; a small one


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Of one thread as well: these tensors are too small to be worth more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(collab.moments, "CPU_PIECE", 2**16)
    yield
    torch.set_num_threads(threads)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: Any, params: list[torch.nn.Parameter], steps: range) -> None:
    """Gradients whose sizes differ a thousandfold between rows, and with noise."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            rows = 10.0 ** -torch.linspace(0, 3, len(param)).view(-1, *[1] * (param.dim() - 1))
            param.grad = rows * (torch.randn(param.shape, generator=generator) + 0.3)
        optimizer.step()


def bits(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params]


@EIGHT_BIT
def test_updates_are_those_of_the_same_optimizer_in_float32(kind):
    coded, plain = parameters(), parameters()
    coded_optimizer, plain_optimizer = kind(coded, lr=1e-3), FLOAT32[kind](plain, lr=1e-3)
    train(coded_optimizer, coded, range(100))
    train(plain_optimizer, plain, range(100))
    before_coded, before_plain = bits(coded), bits(plain)
    train(coded_optimizer, coded, range(100, 101))
    train(plain_optimizer, plain, range(100, 101))
    for start, one, other_start, other in zip(before_plain, plain, before_coded, coded, strict=True):
        update, coded_update = one - start, other - other_start
        assert (coded_update - update).norm() < 0.06 * update.norm()
        assert coded_update.abs().max() < 1.3 * update.abs().max()


@EIGHT_BIT
def test_large_tensors_take_two_bytes_a_value_and_small_ones_stay_exact(kind):
    params = parameters()
    optimizer = kind(params)
    train(optimizer, params, range(1))
    for param in params:
        size = sum(value.nbytes for value in optimizer.state[param].values()) - 4  # the step's
        assert size / param.numel() == pytest.approx(2 if param.numel() >= EIGHT_BIT_FROM_VALUES else 8, rel=0.03)


@EIGHT_BIT
def test_peers_with_other_numbers_of_threads_have_equal_states(kind):
    states = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = parameters()
        optimizer = kind(params)
        train(optimizer, params, range(2))
        states.append([value for param in params for value in optimizer.state[param].values()])
    assert all(map(torch.equal, *states))


@EIGHT_BIT
@pytest.mark.parametrize("way", ["state_dict", "checkpoint", "hivemind"])
def test_it_continues_exactly_from_a_state_that_travelled(kind, way, tmp_path):
    straight = parameters()
    train(kind(straight), straight, range(6))

    params = parameters()
    donor = kind(params)
    train(donor, params, range(3))
    newcomers = [torch.nn.Parameter(param.detach().clone()) for param in params]
    newcomer = kind(newcomers)
    if way == "state_dict":
        newcomer.load_state_dict(copy.deepcopy(donor.state_dict()))
    elif way == "checkpoint":
        save_checkpoint(
            tmp_path / "c",
            save_pretrained=lambda folder: None,
            optimizer_state=donor.state_dict(),
            trainer_state={},
            model_card="",
        )
        newcomer.load_state_dict(load_checkpoint(tmp_path / "c").optimizer_state)
    else:
        metadata, tensors = dump_optimizer_state(donor)
        codec = NoCompression()
        sent = [deserialize_torch_tensor(codec.compress(each, CompressionInfo.from_tensor(each))) for each in tensors]
        train(newcomer, newcomers, range(1))  # hivemind needs a state to load into
        for param, start in zip(newcomers, params, strict=True):
            param.data.copy_(start.data)
        load_optimizer_state(newcomer, metadata, sent)
    train(newcomer, newcomers, range(3, 6))
    assert all(map(torch.equal, straight, newcomers))


@EIGHT_BIT
def test_a_loaded_state_stays_in_the_shared_memory_where_the_old_one_was(kind):
    params = parameters()
    optimizer = kind(params)
    train(optimizer, params, range(2))
    places = [value.data_ptr() for param in params for value in optimizer.state[param].values()]
    train(optimizer, params, range(2, 4))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(4, 6))
    assert places == [value.data_ptr() for param in params for value in optimizer.state[param].values()]


@EIGHT_BIT
def test_the_state_of_another_model_is_refused_and_changes_nothing(kind):
    params, others = parameters(), [torch.nn.Parameter(torch.zeros(shape)) for shape in [(70, 67), (300, 1000), (64,)]]
    optimizer, other = kind(params), kind(others)
    train(optimizer, params, range(2))
    train(other, others, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.load_state_dict(other.state_dict())
    for param, index in zip(params, before["state"], strict=True):
        assert all(torch.equal(value, before["state"][index][key]) for key, value in optimizer.state[param].items())


@EIGHT_BIT
def test_a_float32_checkpoint_goes_on_in_8_bits_and_back(kind):
    params = parameters()
    plain = FLOAT32[kind](params)
    train(plain, params, range(20))
    coded = kind(params)
    coded.load_state_dict(plain.state_dict())
    back = FLOAT32[kind](params)
    if isinstance(back, torch.optim.AdamW):
        back.register_load_state_dict_pre_hook(float32_state)
    back.load_state_dict(coded.state_dict())
    for param in params:
        assert back.state[param]["step"] == 20
        for name in ("exp_avg", "exp_avg_sq"):
            true, found = plain.state[param][name], back.state[param][name]
            assert found.dtype == torch.float32 and (found - true).norm() < 0.03 * true.norm()
    train(back, params, range(20, 21))


def test_a_tensor_in_another_memory_layout_is_updated_like_any_other():
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(4, 3, 5, 5))
    strange = torch.nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    gradient = torch.randn(4, 3, 5, 5)
    for param in (plain, strange):
        optimizer = Lamb([param], lr=0.1, eight_bit=True)
        for _ in range(3):
            param.grad = gradient.clone()
            optimizer.step()
    assert not strange.is_contiguous()
    torch.testing.assert_close(plain, strange)


@EIGHT_BIT
def test_it_learns_what_the_float32_one_learns(kind):
    """A linear regression whose inputs differ in size by a factor of a thousand."""
    losses = []
    for make in (kind, FLOAT32[kind]):
        generator = torch.Generator().manual_seed(0)
        scales = 10.0 ** torch.linspace(-2, 1, 64)
        true = torch.randn(64, 64, generator=generator) / scales
        weight = torch.nn.Parameter(0.01 * torch.randn(64, 64, generator=generator))
        optimizer = make([weight], lr=0.02, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
        for _ in range(300):
            inputs = scales * torch.randn(32, 64, generator=generator)
            loss = (inputs @ (weight - true).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
