"""Mistakes of a person, made with the real programs: one message that names the culprit, and nothing left behind."""

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from arguments import agreed_settings, read_config
from tasks.mlm.task import MaskedLM

ROOT = Path(__file__).resolve().parents[1]
MODEL: dict[str, Any] = {
    "model_type": "albert", "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
SOMEBODY = "QmXk1hoyp6R4eRvDFbXPQqRkpV3dNQJ2RDhsiTWRcytnDa"
SECONDS = 60.0  # no program may take longer to tell a mistake; the Hub's own client tries for half of that

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(150)]


class Attempt:
    """One start of a program that should fail.

    :param program: run_trainer.py or run_aux_peer.py.
    :param folder: the program's folder for temporary files lies here.
    """

    def __init__(self, program: str, folder: Path, *arguments: str | Path) -> None:
        self.mark = uuid.uuid4().hex  # inherited by all children: that is how they are found afterwards
        (folder / "tmp").mkdir(exist_ok=True)
        environment = os.environ | {
            "BAD_INPUT_TEST": self.mark,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(folder / "hub"),
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        self.process = subprocess.Popen(
            [sys.executable, program, *map(str, arguments)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def message(self) -> str:
        """The one message, after everything that has to be true of every failed start was checked."""
        try:
            out, err = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"It did not end within {SECONDS:.0f} s:\n{out}\n{err}")
        everything = f"{out}\n{err}"
        assert self.process.returncode == 1, everything
        assert "Traceback" not in everything, everything
        assert everything.count("error: ") == 1 and "\nerror: " in err, everything
        assert not self.survivors(), "a process was left behind"
        return err.rpartition("\nerror: ")[2]

    def survivors(self, seconds: float = 10.0) -> list[str]:
        deadline = time.monotonic() + seconds
        while (left := self._family()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def _family(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("BAD_INPUT_TEST") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(repr(process))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def configure(folder: Path, cache_dir: Path, **changes) -> Path:
    """A run that would start at once, if it were not for `changes`."""
    (folder / "model.json").write_text(json.dumps(MODEL))
    settings = {
        "run_id": "bad", "max_global_steps": 3, "model_config": str(folder / "model.json"), "vocab_size": 400,
        "sources": [{"files": str(cache_dir / "corpus.txt")}], "seq_length": 32, "report_to": ["none"],
        "host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False, "cache_dir": str(cache_dir / "cache"),
        "run_folder": str(folder / "run"), **changes,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def half_files(*folders: Path) -> list[Path]:
    """What an interrupted write would leave."""
    return [
        path for folder in folders for path in folder.rglob("*") if "partial" in path.name or path.stat().st_size == 0
    ]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A small corpus, and a cache folder in which its tokenizer is ready."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "corpus.txt").write_text(
        "\n\n".join(
            f"Document {number} is about rivers and towns. The town of {chr(97 + number % 26) * 3} lies at the river "
            f"{chr(97 + 7 * number % 26) * 4}. Nobody knows why its water is so cold in the year {1700 + number}."
            for number in range(300)
        )
    )
    settings = agreed_settings(read_config(configure(folder, folder)))
    MaskedLM.prepare(settings, folder / "cache")
    return folder


@pytest.fixture(scope="module")
def without_network(tmp_path_factory, shared) -> Iterator[Attempt]:
    """Started with the first test and asked by the last: the Hub's client goes on trying for half a minute."""
    folder = tmp_path_factory.mktemp("network")
    config = configure(folder, shared, sources=[{"hub": "org/name"}])
    attempt = Attempt("run_aux_peer.py", folder, "--config", config)
    yield attempt
    attempt.end()


@pytest.fixture
def message_of(tmp_path, shared, without_network):
    """Starts a program with one mistake in its settings, and gives the message."""
    attempts: list[Attempt] = []

    def start(program: str, *arguments: str | Path, **changes) -> str:
        config = configure(tmp_path, shared, **changes)
        attempts.append(Attempt(program, tmp_path, "--config", config, *arguments))
        message = attempts[-1].message()
        run_folder = tmp_path / "run"
        assert not run_folder.exists() or {path.name for path in run_folder.iterdir()} <= {"identity.key"}
        assert not half_files(run_folder, shared / "cache")
        assert len(list((shared / "cache" / "tokenizers").iterdir())) == 1, "the tokenizer of a refused run was kept"
        return message

    yield start
    for attempt in attempts:
        attempt.end()


# ---- settings ----------------------------------------------------------------------------------------------------


def test_a_typo_in_the_config(message_of):
    message = message_of("run_trainer.py", learning_rte=0.1)
    assert "'learning_rte'" in message and "learning_rate" in message and "run.yaml" in message


def test_no_such_config(message_of, tmp_path):
    message = message_of("run_aux_peer.py", "--config", tmp_path / "other.yaml")
    assert str(tmp_path / "other.yaml") in message and "run.yaml" in message


def test_no_such_task(message_of):
    assert "'mml'" in message_of("run_aux_peer.py", task="mml")


def test_no_such_device(message_of):
    assert "'cuda:99'" in message_of("run_trainer.py", "--device", "cuda:99")


# ---- text and models ---------------------------------------------------------------------------------------------


def test_a_corpus_that_is_not_utf_8(message_of, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Le café est ouvert.".encode("latin-1"))
    message = message_of("run_aux_peer.py", sources=[{"files": str(tmp_path / "latin.txt")}])
    assert str(tmp_path / "latin.txt") in message and "UTF-8" in message and "byte 6" in message


def test_an_empty_corpus(message_of, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    assert str(tmp_path / "empty.txt") in message_of(
        "run_aux_peer.py", sources=[{"files": str(tmp_path / "empty.txt")}]
    )


def test_no_such_tokenizer(message_of, tmp_path):
    message = message_of("run_aux_peer.py", tokenizer=str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in message and "`tokenizer`" in message


def test_a_model_type_that_does_not_exist(message_of, tmp_path):
    (tmp_path / "typo.json").write_text(json.dumps(MODEL | {"model_type": "albrt"}))
    message = message_of("run_aux_peer.py", model_config=str(tmp_path / "typo.json"))
    assert str(tmp_path / "typo.json") in message and "albrt" in message


# ---- the network -------------------------------------------------------------------------------------------------


def test_a_port_in_use(message_of):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        assert address in message_of("run_aux_peer.py", "--host_maddrs", address)


def test_peers_that_do_not_answer(message_of):
    address = f"/ip4/127.0.0.1/tcp/9/p2p/{SOMEBODY}"
    assert f"{address}: 127.0.0.1 is there, but nobody" in message_of("run_trainer.py", "--initial_peers", address)


# ---- the disk ----------------------------------------------------------------------------------------------------


def test_a_run_folder_where_none_can_be(message_of, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file" / "run") in message_of("run_aux_peer.py", run_folder=str(tmp_path / "file" / "run"))


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A disk of 1 MB on which nothing is free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full disk needs the right to mount one ({mounted.stderr.strip()})")
    try:
        (disk / "run").mkdir()
        with (disk / "film").open("wb", buffering=0) as film:
            while True:
                try:
                    film.write(bytes(4096))
                except OSError:
                    break
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk(message_of, full_disk):
    message = message_of("run_aux_peer.py", run_folder=str(full_disk / "run"))
    assert str(full_disk / "run") in message and "No space left" in message
    assert list((full_disk / "run").iterdir()) == [], "an empty identity would be in the way of the next start"


# ---- the Hub: last, for its client tries for half a minute -------------------------------------------------------


def test_a_dataset_without_network(without_network):
    message = without_network.message()
    assert "org/name" in message and "network" in message
