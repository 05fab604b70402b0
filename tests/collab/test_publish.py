"""Publishing, with the real client of the Hub against a Hub of the tests' own."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import BertConfig, BertForMaskedLM

from collab.errors import UserError
from collab.publish import Publisher
from tests.hub_server import HubServer

NAME = "assembly/model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with HubServer() as server:
        yield server


@pytest.fixture
def publisher(hub):
    publisher = Publisher(NAME, endpoint=hub.url, first_pause=0.05)
    yield publisher
    publisher.close(10)


def checkpoint(folder: Path, text: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    (folder / "model.safetensors").write_bytes(text.encode() * 100)
    return folder


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_stranger_opens_the_published_model_by_its_name(hub, publisher, tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "checkpoint")
    publisher.submit(tmp_path / "checkpoint", 7)
    assert publisher.close(20) and publisher.published == 7

    program = (
        "from transformers import AutoModelForMaskedLM\n"
        f"for revision in ('main', 'step-7'):\n"
        f"    model = AutoModelForMaskedLM.from_pretrained({NAME!r}, revision=revision)\n"
        "print(model.bert.embeddings.word_embeddings.weight.double().sum().item())\n"
    )
    offline = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    env = {**offline, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = model.bert.embeddings.word_embeddings.weight.double().sum().item()
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-9)


def test_each_checkpoint_is_one_commit_with_a_tag(hub, publisher, tmp_path):
    for step in (10, 20):
        publisher.submit(checkpoint(tmp_path / "c", f"step {step}"), step)
        until(lambda step=step: publisher.published == step)
    repo = hub.repos[NAME]
    assert [message for _, message, _ in repo.commits] == [
        "Checkpoint of global step 10",
        "Checkpoint of global step 20",
    ]
    assert sorted(repo.tags) == ["step-10", "step-20"]
    assert repo.tree("step-10")["model.safetensors"] == b"step 10" * 100
    assert repo.tree("step-20")["config.json"] == b"step 20"
    assert publisher.close(5) and [path.name for path in tmp_path.iterdir()] == ["c"], "copies are left behind"


def test_copies_of_a_killed_process_are_cleared(hub, publisher, tmp_path):
    checkpoint(tmp_path / ".publishing-3.abc")
    publisher.submit(checkpoint(tmp_path / "c"), 4)
    until(lambda: publisher.published == 4)
    assert publisher.close(5) and [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_waiting_checkpoint_survives_pruning_and_gives_way_to_a_newer_one(hub, publisher, tmp_path):
    hub.paused.clear()
    publisher.submit(checkpoint(tmp_path / "a", "first"), 1)
    until(lambda: publisher._waiting is None)
    for step in (2, 3):
        folder = checkpoint(tmp_path / str(step), f"number {step}")
        publisher.submit(folder, step)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    hub.paused.set()
    assert publisher.close(10)
    assert sorted(hub.repos[NAME].tags) == ["step-1", "step-3"]
    assert hub.repos[NAME].tree("main")["config.json"] == b"number 3"


@pytest.mark.parametrize("status", [503, 429, 500])
def test_an_outage_is_reported_and_outlived(hub, publisher, tmp_path, caplog, status):
    hub.faults.extend([status, status])
    publisher.submit(checkpoint(tmp_path / "c"), 5)
    until(lambda: publisher.published == 5)
    assert publisher.errors == 2
    assert sum("the run goes on" in message for message in caplog.messages) == 2


def test_a_tag_that_failed_makes_no_second_commit(hub, publisher, tmp_path, monkeypatch):
    publisher.submit(checkpoint(tmp_path / "c"), 1)
    until(lambda: publisher.published == 1)
    real, tried = publisher._api.create_tag, []

    def failing_once(*args, **kwargs):
        tried.append(kwargs)
        if len(tried) == 1:
            raise ConnectionError("the line is down")
        real(*args, **kwargs)

    monkeypatch.setattr(publisher._api, "create_tag", failing_once)
    publisher.submit(checkpoint(tmp_path / "c", "second"), 2)
    until(lambda: publisher.published == 2)
    assert len(hub.repos[NAME].commits) == 2 and len(tried) == 2


def test_an_unreachable_hub_never_blocks_the_caller(tmp_path, caplog):
    publisher = Publisher(NAME, endpoint="http://127.0.0.1:9", first_pause=30)
    before = time.monotonic()
    publisher.submit(checkpoint(tmp_path / "c"), 1)
    assert time.monotonic() - before < 1
    until(lambda: publisher.errors == 1)
    assert publisher.close(5) is False
    assert time.monotonic() - before < 5, "it waited for an attempt that close() leaves no time for"
    assert publisher.published is None and "step 1" in caplog.text


def test_a_refused_token_is_told_once_and_ends_publishing(hub, publisher, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_but_wrong")
    with caplog.at_level(logging.DEBUG):
        publisher.submit(checkpoint(tmp_path / "c"), 1)
        publisher._thread.join(10)
        asked = len(hub.requests)
        publisher.submit(checkpoint(tmp_path / "c"), 2)
    assert not publisher._thread.is_alive()
    assert len(hub.requests) == asked
    refusals = [r.message for r in caplog.records if r.levelno >= logging.WARNING and "refuses" in r.message]
    assert len(refusals) == 1 and "hf auth login" in refusals[0] and NAME in refusals[0]
    assert "hf_secret_but_wrong" not in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_the_hub_cannot_accept_is_not_tried_again(hub, publisher, tmp_path):
    hub.faults.append(400)
    publisher.submit(checkpoint(tmp_path / "c"), 1)
    until(lambda: publisher.errors == 1)
    publisher.submit(checkpoint(tmp_path / "c"), 2)
    until(lambda: publisher.published == 2)
    assert sorted(hub.repos[NAME].tags) == ["step-2"]


def test_a_name_that_cannot_be_a_repository_is_refused_before_anything_starts():
    threads = threading.active_count()
    with pytest.raises(UserError, match="organization/name"):
        Publisher("not a name!")
    assert threading.active_count() == threads
