"""What peers report about themselves: signed, schema-checked records in the DHT, and what they add up to."""

import logging
import time
from typing import Literal, TypeVar

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.schema import BytesWithPublicKey, SchemaValidator
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MPFuture, ValueWithExpiration, get_dht_time
from pydantic.v1 import BaseModel, StrictBool, ValidationError, confloat, conint, conlist, constr

from collab.agreement import NOT_FINITE, SKETCH_SIZE
from collab.peer import Peer, signed_entries
from collab.processes import StopSignal

logger = logging.getLogger(__name__)

MAX_STEP = 10**9
MAX_LOSS = 1e4  # far more than any that is of use
MAX_REASON = 200
MAX_DEVICE = 60
TOLD_WAIT = 0.05
MAX_SAMPLES = 10**15
MAX_RECORD_BYTES = 8192  # signature and all; a real one has 1,400
KEPT_FOR_EACH_PEER = ("progress", "addresses", "manifest", "publishing", "state_averager.all_averagers")
LEAST_LIFETIME = 60.0  # seconds in the DHT: who looks seldom sees the last step of a peer that has left, too
CLOCKS_APART = 10.0  # seconds; hivemind refuses peers that are 3 apart

MAX_HOSTED = 64  # experts of one server: its record has to fit
MAX_EXPERTS = 4096  # of a run

Role = Literal["trainer", "client", "auxiliary"]


class PeerRecord(BaseModel):
    """What a trainer says after each of its global steps. Bounds keep a liar from writing anything at all."""

    name: constr(strict=True, max_length=40)  # type: ignore[valid-type]
    peer_id: constr(strict=True, max_length=64)  # type: ignore[valid-type]
    version: constr(strict=True, max_length=32)  # type: ignore[valid-type]
    device: constr(strict=True, max_length=MAX_DEVICE)  # type: ignore[valid-type]
    """What it computes on, for people: `collab.device.in_words`."""
    step: conint(strict=True, ge=0, le=MAX_STEP)  # type: ignore[valid-type]
    """The global step that this peer has just finished; the first one is 1."""
    loss: confloat(strict=True, ge=0.0, le=MAX_LOSS)  # type: ignore[valid-type]
    """Mean training loss of the samples that this peer put into that step, in nats; 0 if it put in none."""
    samples: conint(strict=True, ge=0, le=MAX_SAMPLES)  # type: ignore[valid-type]
    """Samples that this peer put into that step."""
    tokens: conint(strict=True, ge=0, le=MAX_SAMPLES)  # type: ignore[valid-type]
    """Real tokens, without padding, in those samples."""
    round_samples: confloat(strict=True, ge=0.0, le=1e15)  # type: ignore[valid-type]
    """Samples of all peers in the part of the average that this peer computed; 0 if it computed none."""
    samples_total: conint(strict=True, ge=0, le=MAX_SAMPLES)  # type: ignore[valid-type]
    """Samples of this session that were really averaged into the common model."""
    samples_per_second: confloat(strict=True, ge=0.0, le=1e9)  # type: ignore[valid-type]
    """While this peer computes."""
    tokens_per_second: confloat(strict=True, ge=0.0, le=1e12)  # type: ignore[valid-type]
    """Real tokens, without padding, since the last step; waiting included."""
    mfu: confloat(strict=True, ge=0.0, le=1.0)  # type: ignore[valid-type]
    """Model FLOP utilisation: share of the devices' peak in what those tokens cost; 0 where the peak is not known."""
    peers_met: conint(strict=True, ge=1, le=10**6)  # type: ignore[valid-type]
    """Peers whose gradients are in this peer's step, itself included: 1 if it made the step alone."""
    peers_expected: conint(strict=True, ge=1, le=10**6)  # type: ignore[valid-type]
    """Peers that reported progress for this step when the round began, this one included."""
    applied: StrictBool
    """Whether the averaged gradient, rather than this peer's own, went into the step."""
    parts: confloat(strict=True, ge=0.0, le=1.0)  # type: ignore[valid-type]
    """Share of the tensor parts that were averaged as they should; 0 if there was no round."""
    bytes_sent: conint(strict=True, ge=0, le=MAX_SAMPLES)  # type: ignore[valid-type]
    """Payload of this peer's gradient averaging in this step, both roles together."""
    bytes_received: conint(strict=True, ge=0, le=MAX_SAMPLES)  # type: ignore[valid-type]
    matchmaking_seconds: confloat(strict=True, ge=0.0, le=1e6)  # type: ignore[valid-type]
    """From enough samples to a group."""
    allreduce_seconds: confloat(strict=True, ge=0.0, le=1e6)  # type: ignore[valid-type]
    """From the group to the average."""
    grad_norm: confloat(strict=True, ge=-1.0, le=1e30)  # type: ignore[valid-type]
    """Norm of the averaged gradient before clipping; -1 if it was not finite and the step was held back."""
    sketch: conlist(confloat(strict=True, ge=-NOT_FINITE, le=NOT_FINITE), max_items=SKETCH_SIZE)  # type: ignore[valid-type]
    """`agreement.sketch` of the parameters after this step."""
    skipped_batches: conint(strict=True, ge=0, le=MAX_SAMPLES)  # type: ignore[valid-type]
    """Micro-batches of this session that were dropped for a NaN or infinite gradient."""
    data_wait: confloat(strict=True, ge=0.0, le=1.0)  # type: ignore[valid-type]
    """Share of the time since the last step in which this peer's device waited for samples."""
    compute_share: confloat(strict=True, ge=0.0, le=1.0)  # type: ignore[valid-type]
    """Share of it in the forward and backward passes."""
    averaging_wait: confloat(strict=True, ge=0.0, le=1.0)  # type: ignore[valid-type]
    """Share of it in which the device waited for the peers and for the optimizer."""
    memory: conint(strict=True, ge=0, le=MAX_SAMPLES)  # type: ignore[valid-type]
    """The most bytes that this peer has taken in this session: RAM of all its processes after a step, GPUs' at peak."""
    client_mode: StrictBool
    time: confloat(strict=True, ge=0.0, le=1e11)  # type: ignore[valid-type]
    """Swarm time (hivemind's `get_dht_time`) in seconds at which the step was finished."""
    reported: confloat(strict=True, ge=0.0, le=1e11)  # type: ignore[valid-type]
    """Swarm time at which the peer last said that it is still there."""
    left: StrictBool = False
    """Whether this was its goodbye."""
    reason: constr(strict=True, max_length=MAX_REASON) = ""  # type: ignore[valid-type]
    """Why the round was not applied, in a few words; empty if it was."""

    @property
    def role(self) -> Role:
        return "client" if self.client_mode else "trainer"

    @property
    def alone(self) -> bool:
        """Whether others were there, but the step was made without them."""
        return self.peers_expected > 1 and not (self.applied and self.peers_met > 1)

    def as_line(self, last_step: int) -> str:
        """The step for a person at a terminal."""
        verdict = "" if self.applied or self.peers_expected == 1 else f"  NOT averaged: {self.reason or 'no group'}"
        traffic = ""
        if self.applied:
            megabytes = (self.bytes_sent + self.bytes_received) / 10**6
            traffic = f" ({self.parts:.0%} of the parts, {megabytes:.1f} MB, {self.allreduce_seconds:.1f} s)"
        waits = {"data": self.data_wait, "peers": self.averaging_wait}
        told = [f"{share:.0%} for {what}" for what, share in waits.items() if share >= TOLD_WAIT]
        waited = f"  waited {' and '.join(told)}" if told else ""
        peak = f" ({self.mfu:.0%} of the peak)" if self.mfu else ""
        unit = "samples" if self.tokens == self.samples else "tokens"  # pictures have none
        return (
            f"step {self.step}/{last_step}  loss {self.loss:.3f}  {self.tokens_per_second:,.0f} {unit}/s{peak}  "
            f"peers {self.peers_met}/{self.peers_expected}{traffic}  {self.samples_total:,} samples given"
            f"{waited}{verdict}"
        )


class AuxRecord(BaseModel):
    """What an auxiliary peer says of itself, every few seconds."""

    name: constr(strict=True, max_length=40)  # type: ignore[valid-type]
    peer_id: constr(strict=True, max_length=64)  # type: ignore[valid-type]
    version: constr(strict=True, max_length=32)  # type: ignore[valid-type]
    rounds: conint(strict=True, ge=0, le=MAX_STEP)  # type: ignore[valid-type]
    """Averaging rounds of this session that it helped with."""
    saved_step: conint(strict=True, ge=0, le=MAX_STEP)  # type: ignore[valid-type]
    """Global step of its newest checkpoint; 0 if it has none."""
    reported: confloat(strict=True, ge=0.0, le=1e11)  # type: ignore[valid-type]
    """Swarm time in seconds."""
    left: StrictBool = False
    """Whether this was its goodbye."""

    @property
    def role(self) -> Role:
        return "auxiliary"


class HostedExpert(BaseModel):
    """An expert as its server sees it."""

    index: conint(strict=True, ge=0, lt=MAX_EXPERTS)  # type: ignore[valid-type]
    """Which of the run's experts it is."""
    since: confloat(strict=True, ge=0.0, le=1e11)  # type: ignore[valid-type]
    """Swarm time in seconds at which the server has claimed it: of two claims the earlier one counts."""
    steps: conint(strict=True, ge=0, le=MAX_SAMPLES)  # type: ignore[valid-type]
    """Optimizer steps that it has made in its life."""
    rows_per_second: confloat(strict=True, ge=0.0, le=1e12)  # type: ignore[valid-type]
    """Tokens that it has computed lately, in both passes together."""


class ServerRecord(BaseModel):
    """What a server of experts says of itself, every few seconds."""

    name: constr(strict=True, max_length=40)  # type: ignore[valid-type]
    peer_id: constr(strict=True, max_length=64)  # type: ignore[valid-type]
    version: constr(strict=True, max_length=32)  # type: ignore[valid-type]
    experts: conlist(HostedExpert, max_items=MAX_HOSTED)  # type: ignore[valid-type]
    reported: confloat(strict=True, ge=0.0, le=1e11)  # type: ignore[valid-type]
    """Swarm time in seconds."""
    left: StrictBool = False
    """Whether this was its goodbye."""


Record = TypeVar("Record", PeerRecord, AuxRecord, ServerRecord)


class _MetricsSchema(BaseModel):
    metrics: dict[BytesWithPublicKey, PeerRecord]
    auxiliaries: dict[BytesWithPublicKey, AuxRecord]
    servers: dict[BytesWithPublicKey, ServerRecord]


class OneForEachPeer(RecordValidatorBase):
    """Guards keys under which each peer has a record of its own, before anything parses it.

    Refused are records longer than any honest one, and a value in the place of all records: with a late expiration it
    would take them all away, and let nobody put one there again (hivemind's dht/storage.py). So is whoever speaks for
    longer than anybody may: a trainer whose clock was an hour ahead had its word an hour after it had died, and what
    all others gave was lost while they waited for the step that it had made alone.

    :param most: bytes.
    :param longest: seconds for which a record may count.
    """

    def __init__(self, keys: list[str], most: int, longest: float) -> None:
        self._limits = {DHTID.generate(source=key).to_bytes(): (most, longest) for key in keys}

    def validate(self, record: DHTRecord) -> bool:
        if record.key not in self._limits:
            return True
        most, longest = self._limits[record.key]
        is_one = record.subkey not in DHTProtocol.RESERVED_SUBKEYS and len(record.value) + len(record.subkey) <= most
        return is_one and record.expiration_time <= get_dht_time() + longest + CLOCKS_APART

    @property
    def priority(self) -> int:
        return 100  # validators run from the highest to the lowest: before the signature's, which has 10

    def merge_with(self, other: RecordValidatorBase) -> bool:
        if not isinstance(other, OneForEachPeer):
            return False
        self._limits |= other._limits
        return True


def run_validators(run_id: str, swarm_id: str, lifetime: float) -> list[RecordValidatorBase]:
    """Validators that every peer of a run adds to its DHT: records that break the schema, that are longer than
    `MAX_RECORD_BYTES`, that count for too long, or that stand in the place of all peers' are not stored anywhere.

    :param lifetime: seconds for which a peer's word counts: the run's `metadata_expiration`.
    """
    keys = [_key(run_id), _auxiliaries_key(run_id), _servers_key(run_id)]
    keys += [f"{swarm_id}_{what}" for what in KEPT_FOR_EACH_PEER]
    return [
        SchemaValidator(_MetricsSchema, prefix=run_id),
        OneForEachPeer(keys, MAX_RECORD_BYTES, max(lifetime, LEAST_LIFETIME)),
    ]


def is_live(record: PeerRecord | AuxRecord | ServerRecord, lifetime: float, now: float | None = None) -> bool:
    """Whether the peer is there by its own word; the DHT holds records longer than that.

    :param lifetime: seconds for which its word counts: the run's `metadata_expiration`. A time in the future does not.
    :param now: swarm time.
    """
    now = get_dht_time() if now is None else now
    return not record.left and now - lifetime <= record.reported <= now + CLOCKS_APART


def publish_auxiliary(peer: Peer, run_id: str, record: AuxRecord, lifetime: float) -> MPFuture:
    """Store an auxiliary peer's record under its signature, for `lifetime` seconds."""
    return peer.publish(_auxiliaries_key(run_id), record.dict(), lifetime)


def ask_for_auxiliaries(peer: Peer, run_id: str) -> MPFuture:
    """The auxiliary peers' records: give the result to `auxiliaries_in`."""
    return peer.dht.get(_auxiliaries_key(run_id), latest=True, return_future=True)


def auxiliaries_in(answer: ValueWithExpiration | None) -> list[AuxRecord]:
    """`records_in` for auxiliary peers."""
    return _signed_in(answer, AuxRecord)


def publish_server(peer: Peer, run_id: str, record: ServerRecord, lifetime: float) -> MPFuture:
    """Store an expert server's record under its signature, for `lifetime` seconds."""
    return peer.publish(_servers_key(run_id), record.dict(), lifetime)


def ask_for_servers(peer: Peer, run_id: str) -> MPFuture:
    """The expert servers' records: give the result to `servers_in`."""
    return peer.dht.get(_servers_key(run_id), latest=True, return_future=True)


def servers_in(answer: ValueWithExpiration | None) -> list[ServerRecord]:
    """`records_in` for expert servers."""
    return _signed_in(answer, ServerRecord)


def publish_record(peer: Peer, run_id: str, record: PeerRecord, lifetime: float) -> MPFuture:
    """Store `record` in the DHT under this peer's signature, for `lifetime` seconds, without waiting for it."""
    return peer.publish(_key(run_id), record.dict(), lifetime)


def read_records(peer: Peer, run_id: str) -> list[PeerRecord]:
    """The latest record of each peer that has reported within its record's lifetime."""
    return records_in(ask_for_records(peer, run_id).result())


def ask_for_records(peer: Peer, run_id: str) -> MPFuture:
    """`read_records` in two parts, for who cannot wait: give the result to `records_in`."""
    return peer.dht.get(_key(run_id), latest=True, return_future=True)


def records_in(answer: ValueWithExpiration | None) -> list[PeerRecord]:
    """The records in a DHT's answer whose signature, peer id and fields are as they should be."""
    return _signed_in(answer, PeerRecord)


def _signed_in(answer: ValueWithExpiration | None, kind: type[Record]) -> list[Record]:
    records = []
    for peer_id, said in signed_entries(answer).items():
        try:
            record = kind.parse_obj(said)
            # The signature tells who wrote it, and contributions are counted by what it says.
            if record.peer_id != peer_id:
                raise ValueError(f"it claims the peer id {record.peer_id} under the key of another")
            records.append(record)
        except (ValidationError, ValueError, TypeError) as error:
            logger.debug("A record was left out: %s", error)
    return records


def announce_saved(peer: Peer, run_id: str, step: int) -> None:
    """Tell the swarm that the state of global step `step` is safely on disk."""
    peer.dht.store(f"{run_id}_saved", value=step, expiration_time=get_dht_time() + 600)


def wait_until_saved(peer: Peer, run_id: str, step: int, timeout: float, stop: StopSignal) -> bool:
    """Stay until somebody has announced a checkpoint of `step` or later, `timeout` seconds at most: a swarm whose peers
    all leave at the last step would take that state with them."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        answer = peer.dht.get(f"{run_id}_saved", latest=True)
        if answer is not None and isinstance(answer.value, int) and answer.value >= step:
            return True
        if stop.wait(0.5):
            break
    return False


def _key(run_id: str) -> str:
    return f"{run_id}_metrics"


def _auxiliaries_key(run_id: str) -> str:
    return f"{run_id}_auxiliaries"


def _servers_key(run_id: str) -> str:
    return f"{run_id}_servers"
