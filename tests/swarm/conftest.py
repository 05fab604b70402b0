"""A swarm of real programs for a test: `swarm.start(...)`, and everything ends with the test."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.collab.conftest import guarded  # noqa: F401 - a fixture
from tests.swarm.peers import Peers
from tests.swarm.processes import LOOPBACK, Program, assert_no_survivors, end_all, wait_until

TINY_MODEL = """{"model_type": "albert", "architectures": ["AlbertForPreTraining"], "embedding_size": 16,
"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
"classifier_dropout_prob": 0.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}"""


class Swarm:
    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder, self.cache_dir = folder, cache_dir
        self.programs: list[Program] = []
        self.environment: dict[str, str] = {}
        self.cold = False

    def configure(self, **settings: Any) -> Path:
        """A run small enough for a test: a global step every three seconds or so with two trainers."""
        model = self.folder / "model.json"
        model.write_text(TINY_MODEL)
        settings = {
            "run_id": "test",
            "max_global_steps": 6,
            "model_config": str(model),
            "sources": [{"embedded": True}],
            "vocab_size": 600,
            "tokenizer_megabytes": 0.2,
            "seq_length": 32,
            "shuffle_buffer": 100,
            "optimizer": "adamw",
            "learning_rate": 0.002,
            "warmup_steps": 2,
            "target_batch_size": 4096,
            "matchmaking_time": 1.0,
            "averaging_timeout": 15,
            "metadata_expiration": 10,
            "grad_compression": "none",
            "state_compression": "none",
            "save_every": 100,
            "report_to": ["none"],
            "micro_batch_size": 16,
        } | settings
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    def start(self, name: str, program: str, *arguments: str) -> Program:
        command = [program, *LOOPBACK, "--cache_dir", str(self.cache_dir), *arguments]
        started = Program(name, command, self.folder / f"{name}.log", self.environment, cold=self.cold)
        self.programs.append(started)
        return started

    def new_cache(self, name: str) -> Path:
        """The cache folder of another computer: nothing is in it but the embedded text, which takes seconds to read."""
        folder = self.folder / name
        folder.mkdir()
        shutil.copy(self.cache_dir / "embedded_corpus.json", folder)
        return folder

    def start_auxiliary(
        self, config: Path, *arguments: str, run_folder: str = "run", program: str = "run_aux_peer.py"
    ) -> tuple[Program, str]:
        """The auxiliary peer, and the address that it tells newcomers."""
        folder = self.folder / run_folder
        (folder / "join.txt").unlink(missing_ok=True)
        auxiliary = self.start("auxiliary", program, "--config", str(config), "--run_folder", str(folder), *arguments)
        auxiliary.wait_for_output("Others join with", timeout=120)
        wait_until((folder / "join.txt").exists, 10, auxiliary.output)
        return auxiliary, (folder / "join.txt").read_text().split()[-1]

    def start_trainer(self, name: str, address: str, *arguments: str, program: str = "run_trainer.py") -> Program:
        own = ("--public_name", name, "--threads", "1", "--micro_batch_size", "16", "--precision", "float32")
        return self.start(name, program, "--initial_peers", address, *own, *arguments)

    def end(self) -> None:
        for program in reversed(self.programs):
            program.end()
        for program in self.programs:
            assert_no_survivors(program)


@pytest.fixture
def swarm(tmp_path: Path, shared_cache: Path) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path, shared_cache)
    yield swarm
    swarm.end()


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    peers = Peers(tmp_path)
    yield peers
    end_all(peers.programs)
