"""A page that is really served, a checkpoint to try, and a headless Chromium to look with."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedTokenizerFast

from collab.background import Health
from collab.events import Event
from collab.fill_mask import FillMask
from collab.page_server import PageServer
from collab.view import PeerView, Round, RunView
from scripts.browser import Browser, find_chromium
from tests.swarm.processes import wait_until

FIRST_PORT = 18484


def some_run(peers: int = 3) -> RunView:
    now = time.time()
    return RunView(
        run_id="bengali-albert",
        task="masked language modelling",
        started=now - 7200,
        updated=now,
        global_step=100,
        max_steps=1000,
        finished=False,
        history=[Round(s, now - (100 - s) * 10, 2 + 8 / s, 90.0, 2 if s == 97 else 3, 3, 3) for s in range(1, 101)],
        peers=[
            PeerView(f"peer {i}", "client" if i % 3 else "trainer", 31.5 + i, 1000 * i, 100, 3, 3, 2.1, "NVIDIA T4",
                     0.02, 3 * 2**30, slow=i == 2) for i in range(peers)
        ],
        join_command="python run_trainer.py --initial_peers /ip4/203.0.113.7/tcp/31337/p2p/QmRunOrganizer",
        checkpoint="runs/bengali-albert/checkpoints/step-0000100",
        tracker="trackio show --project bengali-albert",
        can_fill_mask=True,
        samples=409_600,
        seconds_to_next_step=12.0,
        seconds_to_end=9000.0,
        contributors=[(f"peer {i}", 1000 * i) for i in reversed(range(peers))],
        duties=[Health("Keeping checkpoints", 1, "OSError: disk full", 3.0), Health("Watching the swarm", 0, "", 0.2)],
        events=[Event(now - 60 * i, "alone" if i == 1 else "joined", f"peer {i} came") for i in range(3)],
    )  # fmt: skip


class Served:
    """A page whose view the test can change."""

    def __init__(self, fill_mask: FillMask) -> None:
        self.view = some_run()
        self.told: list[str] = []
        self.server = PageServer(
            "127.0.0.1", FIRST_PORT, lambda: replace(self.view, updated=time.time()), fill_mask, self.told.append
        )
        wait_until(lambda: self.server.address is not None, 20, lambda: self.server.health.last_error)
        self.address = str(self.server.address)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A small model that knows nothing, in the Hub's layout."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    config = AlbertConfig(
        vocab_size=len(tokenizer), embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    AlbertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def serve() -> Iterator[Callable[[FillMask], Served]]:
    served: list[Served] = []

    def start(fill_mask: FillMask) -> Served:
        served.append(Served(fill_mask))
        return served[-1]

    yield start
    for each in served:
        each.server.stop(5)


@pytest.fixture
def page(serve: Callable[[FillMask], Served], checkpoint: Path) -> Served:
    return serve(FillMask(lambda: (100, checkpoint), seconds_between=0))


@pytest.fixture
def browser() -> Iterator[Browser]:
    if (program := find_chromium()) is None:
        pytest.skip("NOT TESTED: the page in a browser, because there is no Chromium. apt-get install chromium")
    with Browser(program) as browser:
        yield browser
