"""Whether this computer's clock agrees with its peers': hivemind refuses peers whose clocks are 3 seconds apart."""

import asyncio
import logging
import re
from collections.abc import Sequence
from functools import partial
from statistics import median

from hivemind import DHT
from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS

from collab.errors import UserError

logger = logging.getLogger(__name__)

TOLERATED_SECONDS = 1.0
ANSWER_SECONDS = 1.0  # who takes longer is not asked: this is a courtesy to the person, joining has checked already


def check_clock(dht: DHT, peers: Sequence[str]) -> None:
    """Compare this clock with those of `peers` (peer ids); if none of them answers in time, nothing is known.

    :raises UserError: hivemind would refuse this peer. Less than that, but more than a second, is a warning.
    """
    offsets = dht.run_coroutine(partial(_offsets, peers=peers), return_future=True).result(2 * ANSWER_SECONDS + 5.0)
    offset = median(offsets) if offsets else 0.0
    if abs(offset) > MAX_DHT_TIME_DISCREPANCY_SECONDS:
        raise UserError(wrong_clock(offset))
    if abs(offset) > TOLERATED_SECONDS:
        logger.warning(
            "The clock of this computer is %s. From %d seconds on peers refuse each other. %s",
            _in_words(offset), MAX_DHT_TIME_DISCREPANCY_SECONDS, HOW_TO_SET_IT,
        )  # fmt: skip


HOW_TO_SET_IT = "To set it, type `sudo timedatectl set-ntp true` on Linux, `sudo sntp -sS time.apple.com` on macOS."


def wrong_clock(offset: float) -> str:
    """The message for a person whose clock is `offset` seconds ahead of the others' (behind, if negative)."""
    return (
        f"The clock of this computer is {_in_words(offset)}, and peers that are more than "
        f"{MAX_DHT_TIME_DISCREPANCY_SECONDS} seconds apart refuse each other: all that they tell each other expires by "
        f"the clock. {HOW_TO_SET_IT} Then start again. If this clock is right, tell the organizer that the other one "
        f"is not."
    )


def offset_in(refusal: str) -> float | None:
    """How far this clock is ahead, from what hivemind says when it refuses to join (dht/protocol.py); None if it is
    about something else."""
    found = re.search(r"local time must be within .*local: ([\d.]+), peer: ([\d.]+)\)", refusal)
    return float(found[1]) - float(found[2]) if found else None


def _in_words(offset: float) -> str:
    return f"{abs(offset):.1f} seconds {'ahead of' if offset > 0 else 'behind'} its peers'"


def clock_ahead(asked: float, told: float, answered: float) -> float:
    """Seconds that this clock is ahead of another, at least: that one was read at some moment in between."""
    return max(asked - told, 0.0) or min(answered - told, 0.0)


async def _offsets(_dht: DHT, node: DHTNode, peers: Sequence[str]) -> list[float]:
    """Runs in the DHT's process. Seconds that this clock is ahead of each peer that answers, at least."""

    async def ask(peer: str) -> float:
        asked = get_dht_time()
        stub = node.protocol.get_stub(PeerID.from_base58(peer))
        answer = await asyncio.wait_for(stub.rpc_ping(dht_pb2.PingRequest()), ANSWER_SECONDS)
        return clock_ahead(asked, answer.dht_time, get_dht_time())

    answers = await asyncio.gather(*map(ask, peers), return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, float)]
