"""The codecs as peers meet them: what arrives after hivemind's own functions, and what is refused from strangers."""

import asyncio
import math
from functools import cache

import pytest
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.partition import TensorPartContainer
from hivemind.compression import (
    CompressionBase,
    CompressionInfo,
    Uniform8BitQuantization,
    deserialize_torch_tensor,
    serialization,
    serialize_torch_tensor,
)
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AlbertConfig, AlbertForMaskedLM

from collab.codecs import BLOCK, CODECS, HEADER, INT8_FROM_VALUES, BlockwiseInt8, register

INT8 = runtime_pb2.CompressionType.BLOCKWISE_8BIT
OURS = BlockwiseInt8()


def encode(tensor: torch.Tensor, codec: CompressionBase = OURS) -> runtime_pb2.Tensor:
    """The message after it went over the wire."""
    message = codec.compress(tensor, CompressionInfo.from_tensor(tensor))
    return runtime_pb2.Tensor.FromString(message.SerializeToString())


def send(tensor: torch.Tensor, codec: CompressionBase = OURS) -> torch.Tensor:
    return deserialize_torch_tensor(encode(tensor, codec))


def relative_error(arrived: torch.Tensor, sent: torch.Tensor) -> float:
    return float((arrived.double() - sent.double()).norm() / sent.double().norm())


@cache
def albert_gradients() -> list[torch.Tensor]:
    """The large tensors of a gradient of a small ALBERT."""
    torch.manual_seed(1)
    config = AlbertConfig(
        vocab_size=2000,
        embedding_size=64,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
    )
    model = AlbertForMaskedLM(config)
    tokens = torch.randint(5, config.vocab_size, (4, 64))
    model(input_ids=tokens, labels=tokens).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel() >= INT8_FROM_VALUES]


# ---- what arrives ------------------------------------------------------------------------------------------------


def test_a_real_gradient_arrives_and_hiveminds_codec_of_the_same_size_loses_20_times_more():
    def error_of(codec: CompressionBase) -> float:
        arrived = torch.cat([send(tensor, codec).flatten() for tensor in albert_gradients()])
        return relative_error(arrived, torch.cat([tensor.flatten() for tensor in albert_gradients()]))

    assert len(albert_gradients()) >= 6
    ours = error_of(OURS)
    assert ours < 0.015 and 20 * ours < error_of(Uniform8BitQuantization())


def test_every_tensor_of_a_real_gradient_arrives():
    """Not only the large ones: the attention's is 100 times smaller than the embeddings'."""
    for tensor in albert_gradients():
        assert relative_error(send(tensor), tensor) < 0.015


@pytest.mark.parametrize("values", [INT8_FROM_VALUES, 100_001, 524_288])
def test_a_value_takes_about_a_byte(values):
    assert len(encode(torch.randn(values)).SerializeToString()) / values <= 1.01


shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 7]).map(lambda n: (n,)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)


@settings(deadline=None, max_examples=200)
@given(
    shape=shapes,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_arrives_with_an_error_of_half_a_step_of_its_block(shape, dtype, exponent, seed):
    largest = torch.finfo(dtype).max
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * 10.0**exponent
    sent = values.clamp(-largest, largest).to(dtype)
    arrived = send(sent)
    assert arrived.shape == sent.shape and arrived.dtype == dtype
    # A step is 1 / 127 of the block's largest value, rounded to bfloat16 (2^-8); the result is rounded to its dtype.
    flat, error = sent.double().flatten(), (arrived.double() - sent.double()).flatten().abs()
    for block, errors in zip(flat.split(BLOCK), error.split(BLOCK), strict=True):
        if block.numel():
            peak = float(block.abs().max())
            coarse = torch.finfo(dtype).eps * peak + torch.finfo(dtype).smallest_normal
            assert float(errors.max()) <= 0.5 / 127 * (1 + 2**-8) * peak + coarse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_and_the_smallest_values_of_a_dtype_stay_finite(dtype, sign):
    for value in (torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 4):
        sent = torch.full((BLOCK + 3,), sign * value, dtype=dtype)
        arrived = send(sent)
        assert arrived.isfinite().all()
        if value > 1e-30:
            assert relative_error(arrived, sent) < 0.015
        else:
            assert not arrived.any(), "too small for a scale"


def test_blocks_of_zeros_arrive_as_zeros_next_to_others():
    sent = torch.zeros(3 * BLOCK + 5)
    sent[BLOCK : 2 * BLOCK] = 1e-20
    arrived = send(sent)
    assert not arrived[:BLOCK].any() and not arrived[2 * BLOCK :].any()
    torch.testing.assert_close(arrived[BLOCK : 2 * BLOCK], sent[BLOCK : 2 * BLOCK], rtol=0.005, atol=0)


def test_an_outlier_spoils_only_its_block():
    sent = torch.randn(10 * BLOCK)
    sent[0] = 1e6
    arrived = send(sent)
    assert relative_error(arrived[BLOCK:], sent[BLOCK:]) < 0.015
    assert float(arrived[0]) == pytest.approx(1e6, rel=0.005)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2 * BLOCK + 1])
def test_a_receiver_can_tell_that_a_block_is_not_finite(poison, place):
    sent = torch.randn(2 * BLOCK + 9)
    sent[place] = poison
    arrived = send(sent)
    block = slice(place // BLOCK * BLOCK, place // BLOCK * BLOCK + BLOCK)
    assert arrived[block].isnan().all()
    assert int(arrived.isfinite().sum()) == len(sent) - len(sent[block])


def test_views_and_parameters_arrive_and_stay_as_they_are():
    weight = torch.nn.Parameter(torch.randn(300, 70))
    before = weight.detach().clone()
    for sent in (weight, weight.T, weight[::3, 5:], weight.detach()):
        arrived = deserialize_torch_tensor(OURS.compress(sent, CompressionInfo.from_tensor(sent), allow_inplace=True))
        assert relative_error(arrived.detach(), sent.detach()) < 0.015
        assert arrived.requires_grad == sent.requires_grad
    assert torch.equal(weight, before)


def test_what_arrived_can_be_changed():
    message = encode(torch.ones(1000))
    deserialize_torch_tensor(message).zero_()
    torch.testing.assert_close(deserialize_torch_tensor(message), torch.ones(1000), rtol=0.005, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_a_dtype_that_it_cannot_keep_is_refused(dtype):
    with pytest.raises(ValueError, match="float32"):
        encode(torch.ones(3, dtype=dtype))


# ---- inside hivemind ---------------------------------------------------------------------------------------------


def test_hivemind_encodes_and_decodes_with_it_by_its_number():
    sent = torch.randn(3, 1000)
    message = serialize_torch_tensor(sent, INT8)
    assert message.compression == INT8 and message.buffer.startswith(HEADER)
    chunks = list(split_for_streaming(message, chunk_size_bytes=1000))
    assert len(chunks) > 3
    assert relative_error(deserialize_torch_tensor(combine_from_streaming(chunks)), sent) < 0.015


def test_registering_again_changes_nothing():
    register()
    register()
    assert isinstance(serialization._BASE_COMPRESSION_TYPES["BLOCKWISE_8BIT"], BlockwiseInt8)
    assert len(serialization._BASE_COMPRESSION_TYPES) == len(runtime_pb2.CompressionType.keys())


def parts_of(tensors: list[torch.Tensor], part_size_bytes: int) -> list[runtime_pb2.Tensor]:
    """What all-reduce sends to each of two peers."""

    async def collect() -> list[runtime_pb2.Tensor]:
        container = TensorPartContainer(
            tensors, peer_fractions=[0.3, 0.7], compression=CODECS["int8"], part_size_bytes=part_size_bytes
        )
        return [part for peer in range(2) async for part in container.iterate_input_parts_for(peer)]

    return asyncio.run(collect())


@pytest.mark.timeout(90)
def test_two_peers_average_with_it(start_peer):
    """The averagers are processes of their own; an error in them would be swallowed, and leave the local values."""
    torch.manual_seed(0)
    first = start_peer()
    peers = [first, start_peer(initial_peers=first.addresses())]
    sizes = (300_000, INT8_FROM_VALUES, 700_001, 4000, 1)
    tensors = [[torch.randn(size) for size in sizes] for _ in peers]
    averagers = [
        DecentralizedAverager(
            own, peer.dht, prefix="codecs", target_group_size=2, start=True, compression=CODECS["int8"],
            min_matchmaking_time=3.0, request_timeout=1.5,
        )
        for own, peer in zip(tensors, peers, strict=True)
    ]  # fmt: skip
    try:
        means = [(left + right) / 2 for left, right in zip(*tensors, strict=True)]
        rounds = [averager.step(wait=False, timeout=60) for averager in averagers]
        for averager, control in zip(averagers, rounds, strict=True):
            assert len(control.result(60)) == 2
            with averager.get_tensors() as averaged:
                for arrived, mean in zip(averaged, means, strict=True):
                    assert relative_error(arrived, mean) < 0.015
    finally:
        for averager in averagers:
            averager.shutdown()


@pytest.mark.parametrize("part_size_bytes", [100, 10_000, 2**19])
def test_all_parts_of_a_tensor_go_the_same_way(part_size_bytes):
    """Also parts that are smaller than a block, and than the size from which int8 is used."""
    torch.manual_seed(0)
    large, small = torch.randn(300, 222), torch.randn(INT8_FROM_VALUES - 1)
    for tensor, kind in ((large, INT8), (small, runtime_pb2.CompressionType.MEANSTD_16BIT)):
        parts = parts_of([tensor], part_size_bytes)
        assert {part.compression for part in parts} == {kind}
        arrived = torch.cat([deserialize_torch_tensor(part) for part in parts])
        assert relative_error(arrived, tensor.flatten()) < 0.015


def test_parts_are_whole_blocks():
    parts = parts_of([torch.randn(1_200_000)], part_size_bytes=2**19)
    assert [math.prod(part.size) % BLOCK for part in parts[:-1]] == [0] * (len(parts) - 1) and len(parts) == 3


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1000),
        torch.full((1000,), 0.1),
        torch.full((1000,), 1e-12),
        torch.full((3,), 1e18),
        torch.tensor([0.0]),
        torch.tensor([-7.3]),
        torch.empty(0),
        1e-9 * torch.randn(1000, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["zeros", "constant", "tiny constant", "huge constant", "zero", "one value", "nothing", "tiny gradient"],
)
def test_small_tensors_arrive_almost_exactly(tensor):
    arrived = send(tensor, CODECS["int8"])
    assert arrived.shape == tensor.shape
    torch.testing.assert_close(arrived, tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().sum() / (len(tensor) or 1)))


# ---- from strangers ----------------------------------------------------------------------------------------------


def forged(**changes) -> runtime_pb2.Tensor:
    """A good message of 1,000 values with some fields changed."""
    message = encode(torch.randn(1000))
    for field, value in changes.items():
        if field == "size":
            del message.size[:]
            message.size.extend(value)
        else:
            setattr(message, field, value)
    return message


GOOD = encode(torch.randn(1000)).buffer


@pytest.mark.parametrize(
    "changes",
    [
        dict(buffer=b""),
        dict(buffer=GOOD[:3]),
        dict(buffer=HEADER),
        dict(buffer=GOOD[:-1]),
        dict(buffer=GOOD + b"\0"),
        dict(buffer=HEADER[:-1] + b"\x02" + GOOD[len(HEADER) :]),
        dict(buffer=b"\x04\0\0\0\0\0\0\0" + GOOD[8:]),  # the codec whose place it takes begins with a count
        dict(size=[999]),
        dict(size=[]),
        dict(size=[0]),
        dict(size=[2**31, 2**15]),  # allocated, it would be another error
        dict(size=[2**32 - 1] * 30),
        dict(size=[0] + [2**32 - 1] * 3, buffer=HEADER),
        dict(size=[1] * 65),
        dict(size=[1000] + [1] * 100_000),
        dict(dtype="float64"),
        dict(dtype="int8"),
        dict(dtype="load"),
        dict(dtype=""),
        dict(dtype="x" * 100_000),
    ],
    ids=lambda changes: ", ".join(f"{key}={str(value)[:24]}" for key, value in changes.items()),
)
def test_a_message_that_cannot_be_right_is_refused(changes):
    message = forged(**changes)
    with pytest.raises(ValueError, match="Refused a tensor") as caught:
        deserialize_torch_tensor(message)
    assert len(str(caught.value)) < 1000, "a stranger must not fill the log"


@settings(deadline=None, max_examples=300)
@given(
    body=st.binary(max_size=700), size=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 20), max_size=5),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]), head=st.booleans(),
)  # fmt: skip
def test_garbage_is_refused_or_becomes_a_tensor_of_the_announced_shape(body, size, dtype, head):
    message = runtime_pb2.Tensor(buffer=HEADER * head + body, size=size, dtype=dtype, compression=INT8)
    try:
        arrived = deserialize_torch_tensor(message)
    except ValueError:
        return
    assert list(arrived.shape) == size


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_makes_a_block_of_nan(scale):
    """An infinite one must not end as the largest finite value."""
    scales = torch.tensor([scale, 1.0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    message = forged(size=[BLOCK + 10], buffer=HEADER + scales + bytes(range(256))[:BLOCK] + b"\x01" * 10)
    arrived = deserialize_torch_tensor(message)
    assert arrived[:BLOCK].isnan().all() and arrived[BLOCK:].tolist() == [1.0] * 10
