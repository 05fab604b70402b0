"""The codecs on a real gradient: what they lose, what they weigh, and what they cost beside hivemind's 8-bit codec."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from hivemind.compression import (
    CompressionBase,
    CompressionInfo,
    Uniform8BitQuantization,
    deserialize_torch_tensor,
)
from transformers import AlbertConfig, AlbertForMaskedLM

from benchmarks.report import Report, run_benchmark
from collab.codecs import CODECS, INT8_FROM_VALUES, BlockwiseInt8

OURS, THEIRS = "int8", "uniform 8-bit (hivemind)"
ROUNDS = 100
MIB_VALUES = 2**20 // 4  # of fp32


def albert_gradient() -> list[torch.Tensor]:
    """The tensors of one backward pass on random tokens from which int8 is used: 96 % of the values."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=8000,
        embedding_size=128,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
    )
    model = AlbertForMaskedLM(config)
    tokens = torch.randint(5, config.vocab_size, (8, 128))
    labels = torch.where(torch.rand(tokens.shape) < 0.15, tokens, -100)
    model(input_ids=tokens, labels=labels).loss.backward()
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    return [gradient for gradient in gradients if gradient.numel() >= INT8_FROM_VALUES]


def send(codec: CompressionBase, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What arrives, and the bytes that it took."""
    message = codec.compress(tensor, CompressionInfo.from_tensor(tensor))
    return deserialize_torch_tensor(message), message.ByteSize()


def quality(codec: CompressionBase, tensors: list[torch.Tensor]) -> tuple[float, float]:
    """Relative error of all tensors together, each sent by itself, and bytes a value."""
    squared_error, squared_norm, sent = 0.0, 0.0, 0
    for tensor in tensors:
        arrived, size = send(codec, tensor)
        squared_error += float((arrived - tensor).double().square().sum())
        squared_norm += float(tensor.double().square().sum())
        sent += size
    return (squared_error / squared_norm) ** 0.5, sent / sum(tensor.numel() for tensor in tensors)


def milliseconds(work: Callable[[], object]) -> float:
    """How long it takes once."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def measure(report: Report) -> None:
    """Error and size on the whole gradient, then time on one MiB of it."""
    codecs = {name: codec for name, codec in CODECS.items() if name != OURS}
    codecs |= {THEIRS: Uniform8BitQuantization(), OURS: BlockwiseInt8()}
    tensors = albert_gradient()
    errors = {}
    for name, codec in codecs.items():
        errors[name], size = quality(codec, tensors)
        if name == OURS:
            report.at_most(f"{name}: relative error", errors[name], "", 0.015)
            report.at_most(f"{name}: size", size, "bytes a value", 1.01)
        else:
            report.figure(f"{name}: relative error", errors[name], "")
            report.figure(f"{name}: size", size, "bytes a value")
    report.at_least("error of hivemind's 8-bit codec to ours", errors[THEIRS] / errors[OURS], "x", 20)

    part = torch.cat([tensor.flatten() for tensor in tensors])[:MIB_VALUES].clone()
    info = CompressionInfo.from_tensor(part)
    messages = {name: codec.compress(part, info) for name, codec in codecs.items()}
    encoding: dict[str, list[float]] = {name: [] for name in codecs}
    decoding: dict[str, list[float]] = {name: [] for name in codecs}
    for _ in range(ROUNDS):  # in turn, so that whatever else the machine does meets all of them
        for name, codec in codecs.items():
            encoding[name].append(milliseconds(partial(codec.compress, part, info)))
            decoding[name].append(milliseconds(partial(deserialize_torch_tensor, messages[name])))
    for name in codecs:
        report.figure(f"{name}: encode", statistics.median(encoding[name]), "ms/MiB")
        report.figure(f"{name}: decode", statistics.median(decoding[name]), "ms/MiB")
    for what, times in (("encode", encoding), ("decode", decoding)):
        ratio = statistics.median(times[OURS]) / statistics.median(times[THEIRS])
        report.at_most(f"time to {what}, ours to hivemind's 8-bit codec", ratio, "x", 1.0)


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure)
