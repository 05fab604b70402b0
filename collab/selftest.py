"""What a peer checks about its own machine before it trains: the limit on open files, the run's codecs, its clock."""

import logging
import resource
from collections.abc import Sequence

import torch
from hivemind.compression import CompressionInfo, deserialize_torch_tensor, serialize_torch_tensor

from collab.clock import check_clock
from collab.codecs import CODECS
from collab.errors import UserError
from collab.peer import Peer, peer_id_in

logger = logging.getLogger(__name__)

OPEN_FILES = 4096
"""Each connection, pipe and data file takes one; usual limits are 1,024 on Linux and 256 on macOS."""
LEAST_OPEN_FILES = 64
"""A process of a trainer that meets two others takes up to 50."""

ERROR_BOUNDS = {"none": 0.0, "float16": 0.001, "scaled_float16": 0.001, "int8": 0.015}
"""The largest relative error that a healthy codec makes on normally distributed values, with room to spare."""

# Both sides of the size from which `int8` sends int8, and neither a multiple of its blocks.
SIZES = (5_000, 100_000)


def self_test(codecs: Sequence[str], peer: Peer) -> None:
    """A few milliseconds, and a round trip to the peers that `peer` joined through.

    :param codecs: names of those that the run uses.
    :raises UserError: what is wrong, and how to mend it.
    """
    check_codecs(codecs)
    check_clock(peer.dht, [peer_id_in(address) for address in peer.initial_peers])


def check_codecs(names: Sequence[str]) -> None:
    """Send random tensors to ourselves the way all-reduce does: there, and the answer back.

    hivemind swallows what goes wrong there: with numpy >= 2.4 its 8-bit codecs cannot be decoded, yet every peer
    reports that it averaged with the others.

    :raises UserError: a codec fails, or what comes back is not what was sent.
    """
    for name in dict.fromkeys(names):
        for size in SIZES:
            sent = 1e-3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
            try:
                message = CODECS[name].compress(sent, CompressionInfo.from_tensor(sent))
                received = deserialize_torch_tensor(message)
                returned = deserialize_torch_tensor(serialize_torch_tensor(received, message.compression))
            except Exception as error:
                raise _broken(name, f"failed on {size:,} values: {type(error).__name__}: {error}") from error
            for before, after in ((sent, received), (received, returned)):
                if before.shape != after.shape or before.dtype != after.dtype:
                    raise _broken(name, f"made a tensor of another kind out of {size:,} values")
                error_size = float((after - before).norm() / before.norm())
                if not error_size <= ERROR_BOUNDS[name]:  # NaN is caught too
                    bound = ERROR_BOUNDS[name]
                    raise _broken(name, f"changed {size:,} values by {error_size:.2g} of their norm (at most {bound})")


def _broken(name: str, what: str) -> UserError:
    return UserError(
        f"The codec {name!r}, which this run uses for what peers send each other, {what}. Averaging would fail without "
        f"a word, and this peer's model would drift away from the others'. The installed packages are probably not "
        f"the pinned ones; install those with: make setup"
    )


def raise_file_limit(wanted: int = OPEN_FILES) -> None:
    """Let this process and its later children open `wanted` files, or as many as the system admits; then it warns.

    :raises UserError: with so few it would break somewhere in the middle.
    """
    possible = possible_files(wanted)
    if possible < LEAST_OPEN_FILES:
        raise UserError(too_few_files(possible, wanted))
    if possible < wanted:
        logger.warning("%s", too_few_files(possible, wanted))


def possible_files(wanted: int = OPEN_FILES) -> int:
    """Raise this process's limit on open files to `wanted`, as far as the system admits; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max(soft, wanted)
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if possible > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    return possible


def too_few_files(possible: int, wanted: int = OPEN_FILES) -> str:
    """The message for a person whose system admits fewer open files than a large swarm, or any peer, needs."""
    cost = "in a large swarm it may lose connections" if possible >= LEAST_OPEN_FILES else "it cannot take part"
    return (
        f"This peer can open {possible} files, fewer than {wanted}: {cost} ('Too many open "
        f"files'). To raise the limit, run `ulimit -n {wanted}` as root in the shell that starts it, or add the line "
        f"`* hard nofile {wanted}` to /etc/security/limits.conf and log in again."
    )
