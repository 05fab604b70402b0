"""What gradients and parameters look like on the wire: the codecs that a run can choose, one of them ours.

Measured by `python -m benchmarks.codecs` on a gradient of a small ALBERT (hidden 256, 4 layers, vocabulary 8,000):

    codec                      relative error    bytes a value
    none                       0                 4
    float16                    0.0002            2
    scaled_float16             0.0002            2
    int8 (BlockwiseInt8)       0.009             1.008
    hivemind's uniform 8-bit   0.37              1.00

Error is norm(decoded - sent) / norm(sent). An all-reduce encodes twice: what each peer sends, and the difference to it
that comes back. So the averages that peers end up with are not quite equal; two peers that averaged normally
distributed values with int8 came within 0.5 to 0.9 % of the mean and 1.2 % of each other (float16: 0.03 % and 0.04 %).
(Measured once, not by the benchmark.) That is little noise for a gradient, and much for parameters: a state should be
averaged in 16 bits or more.
"""

import math
from collections.abc import Iterator

import torch
from hivemind.compression import (
    CompressionBase,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    ScaledFloat16Compression,
    SizeAdaptiveCompression,
    serialization,
)
from hivemind.proto import runtime_pb2

INT8_FROM_VALUES = 65_536
"""Tensors with fewer values (biases, norms, small projections) are few bytes, and are sent in 16 bits instead."""

BLOCK = 256
"""Values that share a scale.

With the 2 bytes of its scale, a block of 256 costs 1.008 bytes a value. On the gradient above its error is 0.009. Tried
once there: 0.012 with 512 values and a scale in float32, which cost the same, and 0.016 with 1,024.
"""

HEADER = b"SI8\x01"
"""Says whose bytes these are; its last byte is the version of the format."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_DIMENSIONS = 64  # of a torch tensor in most operations

SCALE_DTYPE = torch.bfloat16  # float32's range; in float16 the scale of a block that stays below 4e-6 would be 0
SCALE_BYTES = 2
LARGEST_CODE = 127


class BlockwiseInt8(CompressionBase):
    """Symmetric int8: each block of 256 values has a scale of its own, so one outlier spoils no more than its block.

    It needs neither bitsandbytes nor a certain numpy (fault 1: with numpy >= 2.4 hivemind's 8-bit codecs cannot be
    decoded, and all-reduce hides the error).

    In the buffer: `HEADER`; a bfloat16 scale for each block; an int8 for each value, the last block may be shorter.
    A value is its code times its block's scale. Bytes are little-endian, as everywhere in hivemind.

    - The error of a value is at most half a scale: 0.4 % of the largest magnitude in its block.
    - A block with a NaN or an infinite value decodes to NaN as a whole, so the receiver can tell. Every other block
      decodes to finite values.
    - A block whose largest magnitude is below 1.5e-36 decodes to zeros; its scale would be subnormal.
    - float32, float16 and bfloat16 are sent; the receiver gets the dtype that was sent.
    """

    # The engine looks decoders up by this enum, and all of its values are taken. This one belongs to a codec that
    # needs bitsandbytes, which we do not install. See `register`.
    compression_type = runtime_pb2.CompressionType.BLOCKWISE_8BIT

    def compress(self, tensor: torch.Tensor, info: CompressionInfo, allow_inplace: bool = False) -> runtime_pb2.Tensor:
        """Encode a tensor, or a part of one, of any shape. :raises ValueError: its dtype is not one of `DTYPES`."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"BlockwiseInt8 cannot send {dtype} tensors, only {', '.join(DTYPES)}")
        values = tensor.detach().to("cpu", torch.float32).reshape(-1)
        buffer = bytearray(_wire_size(len(values)))
        buffer[: len(HEADER)] = HEADER
        if len(values):
            scales, codes = _open(buffer, len(values))
            for (rows, scale), (row_codes, _) in zip(
                _in_blocks(values, scales), _in_blocks(codes, scales), strict=True
            ):
                exact = rows.abs().amax(dim=1, keepdim=True) / LARGEST_CODE
                scale.copy_(torch.where(exact < torch.finfo(torch.float32).tiny, 0.0, exact))
                # Rounding to bfloat16 makes a scale at most 2^-8 too small, so codes stay below 127.5: no clamping.
                # Codes of a block that is not finite do not matter.
                inverse = torch.where(scale > 0, scale.float().reciprocal(), 0.0)
                row_codes.copy_(rows.mul(inverse).round_())
        return runtime_pb2.Tensor(
            compression=self.compression_type,
            buffer=bytes(buffer),
            size=tensor.shape,
            dtype=dtype,
            requires_grad=tensor.requires_grad,
        )

    def extract(self, serialized_tensor: runtime_pb2.Tensor) -> torch.Tensor:
        """Decode what anybody sent. It never allocates more than a small multiple of the bytes that really came.

        :raises ValueError: the bytes are not of this codec and version, or do not fit the declared shape and dtype.
        """
        buffer, shape = serialized_tensor.buffer, tuple(serialized_tensor.size)
        dtype = DTYPES.get(serialized_tensor.dtype)
        if dtype is None:
            raise ValueError(f"Refused a tensor of dtype {serialized_tensor.dtype[:20]!r}: only {', '.join(DTYPES)}")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"Refused a tensor of {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        if not buffer.startswith(HEADER):
            raise ValueError(
                f"Refused a tensor that begins with {buffer[: len(HEADER)]!r} instead of {HEADER!r}: its sender "
                f"runs another version, or hivemind's own BLOCKWISE_8BIT codec"
            )
        count = math.prod(shape)
        if len(buffer) != _wire_size(count):
            raise ValueError(f"Refused a tensor of {len(buffer)} bytes: {count} values take {_wire_size(count)}")

        values = torch.empty(0)
        if count:
            scales, codes = _open(bytearray(buffer), count)  # a copy, because torch wants memory that can be written
            # An infinite scale is nothing that `compress` sends for a finite block.
            scales = torch.where(scales.isfinite(), scales, torch.nan).float()
            values = codes.to(torch.float32)
            for rows, scale in _in_blocks(values, scales):
                rows.mul_(scale)
        # A scale that was rounded up could lift the largest values of a dtype to infinity.
        largest = torch.finfo(dtype).max
        values = values.clamp_(-largest, largest).to(dtype)
        try:
            return values.reshape(shape).requires_grad_(serialized_tensor.requires_grad)
        except RuntimeError as error:  # an empty tensor whose other dimensions are huge
            raise ValueError(f"Refused a tensor of shape {shape}: {error}") from error

    def estimate_compression_ratio(self, info: CompressionInfo) -> float:
        """Without the scales, so that all-reduce cuts tensors into parts of whole blocks."""
        return 8 / torch.finfo(info.descriptor.dtype).bits


def _wire_size(count: int) -> int:
    return len(HEADER) + SCALE_BYTES * -(-count // BLOCK) + count


def _open(buffer: bytearray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and the codes in a buffer of at least one value; they share its memory."""
    blocks = -(-count // BLOCK)
    scales = torch.frombuffer(buffer, dtype=SCALE_DTYPE, offset=len(HEADER), count=blocks)
    codes = torch.frombuffer(buffer, dtype=torch.int8, offset=len(HEADER) + SCALE_BYTES * blocks, count=count)
    return scales, codes


def _in_blocks(values: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of (values as rows, their scales as a column): first all whole blocks, then a shorter one if there is."""
    whole = len(values) // BLOCK
    if whole:
        yield values[: whole * BLOCK].view(whole, BLOCK), scales[:whole].unsqueeze(1)
    if whole < len(scales):
        yield values[whole * BLOCK :].unsqueeze(0), scales[whole:].unsqueeze(1)


def register() -> None:
    """Let hivemind decode `BlockwiseInt8`; done when this module is imported, and harmless when done again.

    hivemind finds the decoder, and the encoder of all-reduce's answers, in a table with one entry for each value of a
    protobuf enum (compression/serialization.py), and no value is free. `BlockwiseInt8` takes the place of the codec
    that needs bitsandbytes. The price: a stock peer that sends with that codec is refused here, and one that receives
    from here fails. Such a peer is no member of our runs; the manifest compares versions.
    """
    name = runtime_pb2.CompressionType.Name(BlockwiseInt8.compression_type)
    serialization._BASE_COMPRESSION_TYPES[name] = BlockwiseInt8()


register()

# ScaledFloat16Compression is safe for the small ones: it bounds the deviation from below, so constant, all-zero and
# single values come back; values that differ by more than 1e19 become NaN; and all-reduce hands it flat tensors only,
# while it could not encode one without a dimension.
# The choice depends on the size of the whole tensor, so all parts of it go the same way (averaging/partition.py).
CODECS: dict[str, CompressionBase] = {
    "none": NoCompression(),
    "float16": Float16Compression(),
    "scaled_float16": ScaledFloat16Compression(),
    "int8": SizeAdaptiveCompression(INT8_FROM_VALUES, less=ScaledFloat16Compression(), greater_equal=BlockwiseInt8()),
}
