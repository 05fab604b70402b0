"""A page that is really served, and a checkpoint to try."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedTokenizerFast

from collab.fill_mask import FillMask
from collab.page_server import PageServer
from tests.runs import some_run
from tests.swarm.processes import wait_until

FIRST_PORT = 18484


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
