"""The page with 500 peers in a real DHT: how long a browser needs for it, and what it costs the auxiliary peer."""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from hivemind.dht import DHT
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from benchmarks.report import Report, run_benchmark
from collab.background import Repeated
from collab.fill_mask import FillMask
from collab.metrics import PeerRecord, read_records, run_validators
from collab.monitor import Monitor
from collab.page import render_page
from collab.page_server import PageServer
from collab.peer import Peer, peer_id_of_key
from collab.processes import guard_children
from collab.recorder import PERIOD
from collab.view import Round, RunView, as_json, peer_views
from scripts.browser import Browser, find_chromium

RUN_ID = "many"
PEERS = 500
PORT = 18600
LIFETIME = 600.0
LOADS = 9
KEY_BITS = 1024  # half of what peers have: a signature is checked as it is, and 500 keys are made in seconds


@dataclass(frozen=True)
class Crowd:
    """An auxiliary peer's eyes on a swarm whose records lie with another peer."""

    holder: Peer
    reader: Peer
    monitor: Monitor

    def read(self) -> None:
        self.monitor.update(read_records(self.reader, RUN_ID))

    def look(self) -> RunView:
        return view_of(self.monitor)


def view_of(monitor: Monitor) -> RunView:
    now = time.time()
    history = [Round(step, now - 1000 + step, 2 + 8 / step, 9e3, PEERS, PEERS, PEERS) for step in range(1, 1001)]
    names = [(record.name, record.samples_total) for record in monitor.live]
    return RunView(
        RUN_ID, "masked language modelling", now - 1000, now, 1000, 2000, False, history, peer_views(monitor.live),
        join_command="python run_trainer.py", contributors=names, can_fill_mask=True,
    )  # fmt: skip


@contextmanager
def crowd(peers: int = PEERS) -> Iterator[Crowd]:
    """Two peers on this computer; one holds `peers` signed records, each under a key of its own."""
    options = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False}
    holder = Peer(**options)  # type: ignore[arg-type]
    try:
        holder.dht.add_validators(run_validators(RUN_ID, RUN_ID, LIFETIME))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "records")
            file.write_bytes(MSGPackSerializer.dumps(signed_records(peers)))
            stored = holder.dht.run_coroutine(partial(_hold, file=file), return_future=True).result(300)
        if stored != peers:
            raise RuntimeError(f"Only {stored} of {peers} records are as peers store them")
        reader = Peer(initial_peers=holder.addresses(), **options)  # type: ignore[arg-type]
        try:
            reader.dht.add_validators(run_validators(RUN_ID, RUN_ID, LIFETIME))
            yield Crowd(holder, reader, Monitor())
        finally:
            reader.close()
    finally:
        holder.close()


def signed_records(peers: int) -> list[tuple[bytes, bytes, float]]:
    """Subkey, signed value and end of each peer's record, as a peer stores it."""
    key_id, expires, records = DHTID.generate(f"{RUN_ID}_metrics").to_bytes(), get_dht_time() + LIFETIME, []
    for number in range(peers):
        key = RSAPrivateKey.__new__(RSAPrivateKey)
        key._private_key = rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)
        validator = RSASignatureValidator(key)
        owner = validator.local_public_key
        subkey = MSGPackSerializer.dumps(owner)
        value = MSGPackSerializer.dumps(record_of(number, peer_id_of_key(owner)).dict())
        records.append((owner, validator.sign_value(DHTRecord(key_id, subkey, value, expires)), expires))
    return records


def record_of(number: int, peer_id: str) -> PeerRecord:
    return PeerRecord(
        name=f"volunteer {number}", peer_id=peer_id, version="0.1.0", step=1000, loss=2.0 + number / 1000, samples=8,
        samples_total=8000 - number, samples_per_second=10.0 + number % 30, tokens_per_second=900.0, mfu=0.0,
        peers_met=PEERS, peers_expected=PEERS, applied=True, parts=1.0, bytes_sent=10**6, bytes_received=10**6,
        matchmaking_seconds=1.0, allreduce_seconds=2.0, grad_norm=1.0, sketch=[1.0] * 16, skipped_batches=0,
        data_wait=0.01, compute_share=0.9, averaging_wait=0.05, memory=2**31, client_mode=number % 3 == 0,
        time=get_dht_time(), device="cpu, 2 threads", tokens=700, round_samples=4000.0, reported=get_dht_time(),
    )  # fmt: skip


async def _hold(_dht: DHT, node: DHTNode, file: Path) -> int:
    key_id, stored = DHTID.generate(f"{RUN_ID}_metrics"), 0
    for owner, value, expires in MSGPackSerializer.loads(file.read_bytes()):
        subkey = MSGPackSerializer.dumps(owner)
        if node.protocol.record_validator.validate(DHTRecord(key_id.to_bytes(), subkey, value, expires)):
            stored += node.protocol.storage.store(key_id, value, expires, subkey=owner)
    return stored


def load_seconds(browser: Browser, address: str, times: int = LOADS) -> list[float]:
    """How long the page took to load, each time without anything in the browser's cache."""
    browser.call("Network.setCacheDisabled", cacheDisabled=True)
    return [browser.open(address) for _ in range(times)]


def cpu_milliseconds(work: Sequence[object], times: int = LOADS) -> float:
    function, *arguments = work
    taken = []
    for _ in range(times):
        began = time.process_time()
        function(*arguments)  # type: ignore[operator]
        taken.append(1000 * (time.process_time() - began))
    return statistics.median(taken)


def measure(report: Report) -> None:
    """Loads in Chromium, then the parts of the work."""
    if (program := find_chromium()) is None:
        sys.exit("error: NOT MEASURED: there is no Chromium. apt-get install chromium")
    guard_children()
    with crowd() as swarm:
        swarm.read()
        seen = swarm.look()
        report.figure("peers in the DHT", len(seen.peers), "")
        watching = Repeated("Watching the swarm", swarm.read, PERIOD)  # as the auxiliary peer does
        server = PageServer("127.0.0.1", PORT, swarm.look, FillMask(lambda: None), lambda where: None)
        try:
            while server.address is None:
                time.sleep(0.05)
            with Browser(program) as browser:
                loads = load_seconds(browser, f"{server.address}/")
            report.at_most("load of the page, median", statistics.median(loads), "s", 1.0)
            report.figure("load of the page, slowest", max(loads), "s")
        finally:
            server.stop(5)
            watching.stop(5)
        report.figure("reading the records", cpu_milliseconds((read_records, swarm.reader, RUN_ID)), "ms of CPU")
        report.figure("the page", cpu_milliseconds((render_page, seen)), "ms of CPU")
        report.figure("JSON", cpu_milliseconds((as_json, seen)), "ms of CPU")
        report.figure("size of the page", len(render_page(seen).encode()) / 1000, "kB")


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure)
