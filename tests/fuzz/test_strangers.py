"""Whatever a stranger sends is refused or left out, one stranger at a time: nothing else raises, hangs or grows."""

import asyncio
import contextlib
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.compression import CompressionInfo, deserialize_torch_tensor
from hivemind.optim.progress_tracker import LocalTrainingProgress
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils import MSGPackSerializer, ValueWithExpiration, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey
from hivemind.utils.multiaddr import Multiaddr
from hypothesis import given, settings
from hypothesis import strategies as st

from collab.averager import StateAverager
from collab.codecs import CODECS
from collab.experts.directory import Remote
from collab.experts.plan import ExpertPlan, holders
from collab.experts.server import TrainedExpert
from collab.lease import claims_in
from collab.link import allreduce_limit, settle_claims, silence_limit
from collab.lookout import addresses_in
from collab.manifest import Manifest
from collab.matchmaking import SwarmMatchmaking
from collab.metrics import auxiliaries_in, records_in, servers_in
from collab.monitor import Monitor
from collab.peer import peer_id_of_public_key
from collab.reachability import addresses_to_dial
from collab.view import as_json, from_json
from collab.watch import Sketches
from tests.collab.test_monitor import record
from tests.fuzz.hostile import VALUES, altered, answers, damaged, examples, guarded
from tests.runs import some_run

KEY = RSAPrivateKey()
OWNER = b"[owner:" + KEY.get_public_key().to_bytes() + b"]"
PEER_ID = peer_id_of_public_key(KEY.get_public_key().to_bytes())
OWNERS = st.one_of(st.just(OWNER), damaged(OWNER), VALUES.filter(lambda value: not isinstance(value, dict | list)))
RECORD = record(PEER_ID, 7, name="somebody").dict()
PROGRESS = LocalTrainingProgress(
    peer_id=b"1" * 34, epoch=7, samples_accumulated=9, samples_per_second=3.0, time=1.0, client_mode=False
).dict()
SERVER = {"name": "gpu", "peer_id": PEER_ID, "version": "1", "reported": 1.0}
SERVER |= {"experts": [{"index": 3, "since": 1.0, "steps": 7, "rows_per_second": 2.0}]}
AUXILIARY = {"name": "aux", "peer_id": PEER_ID, "version": "1", "rounds": 1, "saved_step": 1, "reported": 1.0}


def fuzz(*strategies: Any, most: int = 150) -> Any:
    def decorate(test: Any) -> Any:
        return settings(max_examples=examples(most), deadline=None, derandomize=True, database=None)(
            given(*strategies)(test)
        )

    return decorate


# ---- what peers store in the DHT ---------------------------------------------------------------------------------


@fuzz(answers(OWNERS, altered(RECORD) | VALUES))
def test_records_of_trainers(answer: Any) -> None:
    with guarded():
        for found in records_in(answer):
            assert found.peer_id == PEER_ID


@fuzz(answers(OWNERS, altered(AUXILIARY) | VALUES))
def test_records_of_auxiliary_peers(answer: Any) -> None:
    with guarded():
        auxiliaries_in(answer)


@fuzz(answers(OWNERS, altered(SERVER) | VALUES))
def test_records_of_expert_servers(answer: Any) -> None:
    with guarded():
        holders(servers_in(answer), lifetime=1e12)


@fuzz(answers(OWNERS, VALUES))
def test_claims_of_a_lease(answer: Any) -> None:
    with guarded():
        claims_in(answer)


@fuzz(answers(OWNERS, VALUES | st.lists(damaged(f"/ip4/203.0.113.7/tcp/1/p2p/{PEER_ID}".encode()).map(repr))))
def test_addresses_that_peers_announce(answer: Any) -> None:
    with guarded():
        addresses_in(answer)


@fuzz(st.lists(altered(RECORD), max_size=4), most=300)
def test_what_adds_up_of_records_is_finite(told: list[dict[str, Any]]) -> None:
    answers = [ValueWithExpiration({OWNER: ValueWithExpiration(one, 1e12)}, 1e12) for one in told]
    monitor = Monitor([], lifetime=60, target_batch_size=100, last_step=1000, start=None)
    sketches = Sketches()
    with guarded():
        for answer in answers:
            records = records_in(answer)
            monitor.update(records)
            sketches.note(records)
        assert not any(map(math.isinf, itertools.chain(*(made.as_metrics().values() for made in monitor.history))))


# ---- what peers say to each other --------------------------------------------------------------------------------


@fuzz(st.lists(VALUES, min_size=1, max_size=5))
def test_claims_of_links(claims: list[Any]) -> None:
    with guarded():
        settled = settle_claims(claims)
        assert all(one is None or one >= 0 for one in settled)
        assert 0 < silence_limit(claims, 1 << 19, at_most=30.0) <= 30.0
        assert 0 < allreduce_limit(claims, 1 << 24, at_most=30.0) <= 30.0


SAID = MSGPackSerializer.dumps([None, 0, MSGPackSerializer.dumps([7, 0.5, None])])


def leader() -> Any:
    """The one who lets others into its group."""
    matchmaking = SwarmMatchmaking.__new__(SwarmMatchmaking)
    matchmaking.__dict__.update(
        client_mode=False, schema_hash=b"hash", current_leader=None, current_followers={}, target_group_size=None,
        lock_looking_for_group=SimpleNamespace(locked=lambda: True),
        assembled_group=SimpleNamespace(done=lambda: False),
        group_key_manager=SimpleNamespace(current_key="run.0b111"), step_control=object(),
        potential_leaders=SimpleNamespace(declared_group_key="run.0b111", declared_expiration_time=1.0), peer_id=1,
    )  # fmt: skip
    return matchmaking


def asking(gather: bytes) -> averaging_pb2.JoinRequest:
    return averaging_pb2.JoinRequest(
        schema_hash=b"hash", expiration=get_dht_time() + 60, client_mode=False, gather=gather, group_key="run.0b111"
    )


def test_who_speaks_as_it_should_is_let_in() -> None:
    assert leader()._check_reasons_to_reject(asking(SAID), SimpleNamespace(remote_id=2)) is None


@fuzz(damaged(SAID) | VALUES.map(MSGPackSerializer.dumps), most=300)
def test_who_says_nothing_that_can_be_understood_is_not_let_in(gather: bytes) -> None:
    """One such follower would end the round of all others."""
    with guarded():
        refused = leader()._check_reasons_to_reject(asking(gather), SimpleNamespace(remote_id=2))
        if refused is None:
            _mbits, mode, told = MSGPackSerializer.loads(gather)
            assert mode in (0, 1, 2)
            MSGPackSerializer.loads(told)


PLAN = ExpertPlan("run", layers=1, experts=4, hidden_size=8, inner_size=16, timeout=60.0, learning_rate=0.01)


@fuzz(VALUES | altered({"forward_schema": ((PLAN.schema,), {}), "outputs_schema": PLAN.schema}))
def test_what_an_expert_server_says_of_itself(info: Any) -> None:
    """The directory asks all servers at once, so that one could keep it from finding any other."""
    server: Any = Remote.__new__(Remote)
    server.__dict__.update(_plan=PLAN, index=0, peer_id="Qm", seconds=math.nan, answered=0.0)

    async def rpc_info(_request: Any) -> Any:
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))

    server._stub, server._expert = SimpleNamespace(rpc_info=rpc_info), SimpleNamespace(uid="run.0")
    with guarded():
        assert isinstance(asyncio.run(server.probe()), str)


EXPERT = TrainedExpert(PLAN, 0)


@fuzz(damaged(EXPERT.as_bytes()))
def test_experts_that_other_servers_hand_out(data: bytes) -> None:
    with guarded(), contextlib.suppress(ValueError):
        EXPERT.load_bytes(data)


@pytest.mark.parametrize("codec", CODECS)
@fuzz(st.data())
def test_tensors(codec: str, data: st.DataObject) -> None:
    tensor = torch.randn(70, generator=torch.Generator().manual_seed(1))
    whole = CODECS[codec].compress(tensor, CompressionInfo.from_tensor(tensor))
    message = runtime_pb2.Tensor(
        buffer=data.draw(damaged(whole.buffer)),
        size=data.draw(st.just(list(whole.size)) | st.lists(st.integers(0, 2**32 - 1), max_size=5)),
        dtype=data.draw(st.sampled_from(["float32", "bfloat16", "", "object", "int64", "torch.float32", "__import__"])),
        compression=data.draw(st.sampled_from([whole.compression, *runtime_pb2.CompressionType.values()])),
    )
    with guarded(), contextlib.suppress(Exception):  # the round, or the donor, is given up
        deserialize_torch_tensor(message)


@fuzz(st.data())
def test_a_state_that_a_donor_hands_out(data: st.DataObject) -> None:
    """The averager gives the donor up, and takes no more from it than a state can have."""
    ours = [torch.zeros(70)]
    metadata = MSGPackSerializer.dumps({"epoch": 3, "group_bits": None, "optimizer_metadata": {}})
    parts = []
    for _ in range(data.draw(st.integers(0, 4))):
        tensor = CODECS["none"].compress(ours[0], CompressionInfo.from_tensor(ours[0]))
        if data.draw(st.booleans()):
            tensor.size[:] = data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=3))
        tensor.buffer = data.draw(damaged(tensor.buffer))
        tensor.chunks = data.draw(st.integers(0, 3))
        told = data.draw(st.one_of(st.just(b""), damaged(metadata), VALUES.map(MSGPackSerializer.dumps)))
        parts.append(averaging_pb2.DownloadData(tensor_part=tensor, metadata=told))
    averager: Any = StateAverager.__new__(StateAverager)

    async def stream() -> Any:
        for part in parts:
            yield part

    async def rpc_download_state(_request: Any) -> Any:
        return stream()

    averager.__dict__.update(
        _averaged_tensors=ours, _parent_pid=0, not_before=0, last_step=100, serializer=MSGPackSerializer, _p2p=None,
        prefix="run",
        _donor=SimpleNamespace(value=b""),
        get_stub=lambda *_, **__: SimpleNamespace(rpc_download_state=rpc_download_state),
    )  # fmt: skip
    with guarded():
        try:
            found = asyncio.run(averager._download(PeerID(b"1" * 34), 1.0))
        except Exception:
            return
        assert found is None or isinstance(found[0]["epoch"], int)


# ---- documents ---------------------------------------------------------------------------------------------------


def manifest() -> bytes:
    settings = {"run_id": "run", "max_global_steps": 10}
    return Manifest.found(settings, {"tokenizer/a.json": b"{}"}, KEY, {"torch": "2.13.0"}).signed


SIGNED = manifest()


@fuzz(damaged(SIGNED), most=300)
def test_manifests(content: bytes) -> None:
    with guarded():
        try:
            read = Manifest.from_bytes(content)
        except ValueError:
            return
        assert read.organizer == PEER_ID


@fuzz(damaged(b'["/tcp/31337", "/udp/31337/quic"]') | VALUES.map(lambda value: repr(value).encode()))
def test_questions_for_a_dial_back(request: bytes) -> None:
    with guarded():
        for address in addresses_to_dial(Multiaddr("/ip4/203.0.113.7/tcp/4"), request):
            assert str(address).startswith("/ip4/203.0.113.7/")


VIEW = as_json(some_run()).encode()


@fuzz(damaged(VIEW))
def test_views_of_another_computer(text: bytes) -> None:
    with guarded(), contextlib.suppress(ValueError):
        from_json(text)
