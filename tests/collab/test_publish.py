"""Publishing, with the real client of the Hub against a Hub of the tests' own."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import close_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from collab.archive import Archive, Saved
from collab.errors import UserError
from collab.publish import LONGEST_PAUSE, Publisher, Publishing, pause_after
from tests.hub_server import Fault, HubServer

NAME, SWARM = "assembly/model", "run_0123"
COMMIT, FILES = f"POST /api/models/{NAME}/commit", "PUT /lfs/"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with HubServer() as server:
        yield server
    close_session()
    set_client_factory(default_client_factory)


@pytest.fixture
def publisher(hub) -> Publisher:
    return Publisher(NAME, endpoint=hub.url)


class StubKeeper:
    newest: Saved | None = None


class StubLease:
    is_mine = True


@pytest.fixture
def start(publisher, tmp_path) -> Iterator[Callable[..., Publishing]]:
    """Starts the duty for checkpoints in tmp_path/checkpoints, with short pauses."""
    started = []

    def start(lease: Any = StubLease, **options: Any) -> Publishing:
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        given: dict[str, Any] = {"archive": Archive(tmp_path / "checkpoints", SWARM), "first_pause": 0.02}
        publishing = Publishing(publisher, StubKeeper(), lease(), **(given | options))  # type: ignore[arg-type]
        started.append(publishing)
        return publishing

    yield start
    for publishing in started:
        publishing.stop(20)


def checkpoint(folder: Path, step: int, text: str = "", swarm_id: str = SWARM) -> Saved:
    folder.mkdir(parents=True, exist_ok=True)
    text = text or f"step {step} "
    (folder / "config.json").write_text(text)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    (folder / "optimizer.json").write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "swarm_id": swarm_id}))
    (folder / "model.safetensors").write_bytes(text.encode() * 100)
    (folder / "optimizer.safetensors").write_bytes(text.encode() * 200)
    return Saved(step, folder)


def save(publishing: Publishing, folder: Path, step: int) -> Saved:
    saved = checkpoint(folder / "checkpoints" / f"step-{step:07d}", step)
    publishing._keeper.newest = saved
    return saved


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def is_whole(hub: HubServer, revision: str = "main") -> bool:
    """Whether all files of a revision are of the same step."""
    files = hub.repos[NAME].tree(revision)
    text = files["config.json"]
    return (files["model.safetensors"], files["optimizer.safetensors"]) == (text * 100, text * 200)


def test_a_stranger_opens_the_published_model_by_its_name(hub, publisher, tmp_path):
    folder = tmp_path / "checkpoint"
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", "the", "river", "rises"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    config = BertConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config)
    saved = checkpoint(folder, 7)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    ).save_pretrained(folder)
    assert publisher.publish(saved)

    program = (
        "from transformers import pipeline\n"
        "for revision in ('main', 'step-7'):\n"
        f"    fill = pipeline('fill-mask', {NAME!r}, revision=revision)\n"
        "    best = fill('the [MASK] rises', top_k=6)\n"
        "print(len(best), fill.model.bert.embeddings.word_embeddings.weight.double().sum().item())\n"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE", "PYTHONPATH")}
    env = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, total = done.stdout.split()[-2:]
    assert int(count) == 6
    assert float(total) == pytest.approx(model.bert.embeddings.word_embeddings.weight.double().sum().item(), abs=1e-9)


def test_each_checkpoint_is_one_commit_with_a_tag(hub, start, tmp_path):
    publishing = start()
    for step in (10, 20):
        save(publishing, tmp_path, step)
        until(lambda: publishing.published and publishing.published.step == step)  # noqa: B023 - called at once
    repo = hub.repos[NAME]
    assert [message for _, message, _ in repo.commits] == [
        "Checkpoint of global step 10",
        "Checkpoint of global step 20",
    ]
    assert [repo.tags["step-10"], repo.tags["step-20"]] == [oid for oid, _, _ in repo.commits]
    assert is_whole(hub, "step-10") and repo.tree("step-20")["config.json"] == b"step 20 "
    assert publishing.close(10) and publishing.health.failures == 0
    assert not list((tmp_path / "checkpoints").glob(".publishing-*")), "copies are left behind"


def test_what_is_on_the_hub_is_not_published_again(hub, publisher, tmp_path):
    saved = checkpoint(tmp_path / "c", 5)
    assert publisher.publish(saved)
    other = Publisher(NAME, endpoint=hub.url)
    assert not other.publish(checkpoint(tmp_path / "another peer's", 5, "a bit different"))
    assert not publisher.publish(saved)
    assert len(hub.repos[NAME].commits) == 1 and list(hub.repos[NAME].tags) == ["step-5"]


def test_two_peers_that_publish_the_same_step_at_once_make_one_commit_and_one_tag(hub, publisher, tmp_path):
    publisher.publish(checkpoint(tmp_path / "before", 1))
    hub.pausing, hub.waiting = COMMIT, 0
    hub.paused.clear()  # both have looked at main, and both commit on top of it
    outcomes: list[object] = []

    def publish(name: str) -> None:
        try:
            outcomes.append(Publisher(NAME, endpoint=hub.url).publish(checkpoint(tmp_path / name, 2, name)))
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)

    threads = [threading.Thread(target=publish, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    until(lambda: hub.waiting == 2)
    hub.paused.set()
    for thread in threads:
        thread.join(30)
    assert sorted(map(str, outcomes)) == ["412", "True"]
    assert not publisher.publish(checkpoint(tmp_path / "one", 2, "one")), "the second attempt finds it there"
    assert len(hub.repos[NAME].commits) == 2 and sorted(hub.repos[NAME].tags) == ["step-1", "step-2"]
    assert is_whole(hub)


def test_main_never_goes_back(hub, publisher, tmp_path, caplog):
    publisher.publish(checkpoint(tmp_path / "new", 20))
    assert not publisher.publish(checkpoint(tmp_path / "old", 10))
    assert len(hub.repos[NAME].commits) == 1 and "step 20" in caplog.text and "--repo_id" in caplog.text


def test_another_run_in_the_same_repository_goes_on_from_its_own_step(hub, publisher, tmp_path, caplog):
    publisher.publish(checkpoint(tmp_path / "a", 20, swarm_id="another"))
    first = hub.repos[NAME].tags["step-20"]
    assert publisher.newest_step(SWARM) == -1 and publisher.newest_step("another") == 20
    assert publisher.publish(checkpoint(tmp_path / "b", 10)) and publisher.publish(checkpoint(tmp_path / "c", 20))
    assert len(hub.repos[NAME].commits) == 3 and hub.repos[NAME].tags["step-20"] == first
    assert "step-20" in caplog.text and "another run" in caplog.text


@pytest.mark.parametrize(
    "state", [b"", b"[]", b'{"global_step": null}', b'{"global_step": "x", "swarm_id": "run_0123"}']
)
def test_a_file_of_somebody_else_on_main_says_nothing(hub, publisher, tmp_path, state):
    publisher.publish(checkpoint(tmp_path / "a", 1))
    hub.repos[NAME].commits[-1][2]["trainer_state.json"] = state
    assert publisher.publish(checkpoint(tmp_path / "b", 2))


def test_what_a_killed_process_left_is_published_once_and_its_copies_are_cleared(hub, publisher, start, tmp_path):
    kept = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint(kept / f"step-{step:07d}", step)
    checkpoint(kept / "step-0000009", 9, swarm_id="another run")
    checkpoint(kept / ".publishing-abc", 2)
    publishing = start()
    until(lambda: publishing.published)
    assert not (kept / ".publishing-abc").exists()
    assert publishing.close(10) and list(hub.repos[NAME].tags) == ["step-2"]
    again = start()
    until(lambda: again.published)
    assert again.published.step == 2 and len(hub.repos[NAME].commits) == 1


def test_a_commit_that_a_killed_process_could_not_tag_is_tagged_before_the_next_one(hub, publisher, tmp_path, caplog):
    publisher.publish(checkpoint(tmp_path / "a", 1))
    killed = hub.repos[NAME].tags.pop("step-1")
    again = Publisher(NAME, endpoint=hub.url)
    assert again.publish(checkpoint(tmp_path / "b", 2)) and again.publish(checkpoint(tmp_path / "c", 3))
    assert list(hub.repos[NAME].tags) == ["step-1", "step-2", "step-3"] and hub.repos[NAME].tags["step-1"] == killed
    assert not caplog.text


def test_folders_that_are_no_checkpoints_of_this_run_are_not_found(tmp_path):
    assert Archive(tmp_path / "none", SWARM).newest() is None
    checkpoint(tmp_path / "step-0000005", 5, swarm_id="another")
    (tmp_path / "step-0000007").mkdir()
    (tmp_path / "step-0000008").write_text("a file")
    assert Archive(tmp_path, SWARM).newest() is None
    assert Archive(tmp_path, "another").newest() == Saved(5, tmp_path / "step-0000005")


def test_a_checkpoint_that_is_pruned_during_its_upload_arrives_whole(hub, start, tmp_path):
    hub.pausing = FILES
    hub.paused.clear()
    publishing = start()
    saved = save(publishing, tmp_path, 1)
    until(lambda: hub.waiting)
    for file in saved.folder.iterdir():
        file.unlink()
    saved.folder.rmdir()
    for step in (2, 3):
        save(publishing, tmp_path, step)
    hub.paused.set()
    assert publishing.close(20)
    assert sorted(hub.repos[NAME].tags) == ["step-1", "step-3"], "the newer one takes the place of the one that waits"
    assert is_whole(hub, "step-1") and is_whole(hub, "step-3")


def test_half_a_checkpoint_is_never_published(hub, publisher, tmp_path):
    saved = checkpoint(tmp_path / "c", 1)
    (saved.folder / "optimizer.safetensors").unlink()  # pruning has begun
    with pytest.raises(OSError, match="optimizer"):
        publisher.publish(saved)
    assert not hub.requests and [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503, COMMIT), Fault(429, COMMIT), Fault(500, "POST /api/models/.*/tag"), Fault(500, "GET /api/models"),
        Fault("drop", COMMIT), Fault("drop", FILES), Fault("drop", "POST .*/info/lfs"), Fault(409, COMMIT),
        Fault("lost", COMMIT), Fault("lost", FILES), Fault("lost", "POST /api/models/.*/tag"),
        Fault("lost", "POST /api/repos/create"), Fault(400, COMMIT), Fault(404, "GET /assembly/model/resolve"),
    ],
    ids=lambda fault: f"{fault.what} {fault.at}",
)  # fmt: skip
def test_whatever_fails_once_is_outlived_and_leaves_one_commit_and_one_tag(hub, start, tmp_path, fault):
    hub.faults.append(fault)
    publishing = start()
    save(publishing, tmp_path, 5)
    until(lambda: publishing.published)
    assert not hub.faults, "the fault did not happen"
    repo = hub.repos[NAME]
    assert [message for _, message, _ in repo.commits] == ["Checkpoint of global step 5"]
    assert repo.tags == {"step-5": repo.commits[0][0]} and is_whole(hub)
    assert publishing.close(10)


def test_failures_are_counted_and_success_forgets_the_pauses(hub, start, tmp_path, caplog):
    hub.faults.extend([500, 503])
    publishing = start()
    save(publishing, tmp_path, 5)
    until(lambda: publishing.published)
    health = publishing.health
    assert (health.name, health.failures) == ("Publishing", 2) and "503" in health.last_error
    assert caplog.text.count("Publishing failed, and goes on") == 2
    assert publishing._attempts == 0 and publishing.published.step == 5


def test_an_answer_that_does_not_come_is_not_waited_for(hub, start, tmp_path, monkeypatch):
    publishing = start()
    publishing._publisher = Publisher(NAME, endpoint=hub.url, patience=0.2)
    hub.pausing = COMMIT
    hub.paused.clear()
    save(publishing, tmp_path, 5)
    until(lambda: publishing.health.failures == 2)
    assert "Timeout" in publishing.health.last_error
    hub.paused.set()  # now the Hub makes the commit that nobody waits for any more
    until(lambda: publishing.published)
    assert len(hub.repos[NAME].commits) == 1 and list(hub.repos[NAME].tags) == ["step-5"]


def http_error(status: int, headers: dict[str, str], hub: HubServer) -> HfHubHTTPError:
    hub.faults.append(Fault(status, "GET /api/whoami-v2", headers))
    with pytest.raises(HfHubHTTPError) as caught:
        huggingface_hub.HfApi(endpoint=hub.url).whoami()
    return caught.value


def test_pauses_grow_and_the_hub_may_make_them_longer(hub):
    lost = ConnectionError("the line is down")
    pauses = [pause_after(lost, attempts) for attempts in range(3600)]
    assert pauses[:4] == [2, 4, 8, 16] and pauses == sorted(pauses) and pauses[-1] == LONGEST_PAUSE
    assert pause_after(http_error(429, {}, hub), 0) == 2
    assert pause_after(http_error(429, {"Retry-After": "77"}, hub), 0) == 77
    assert pause_after(http_error(429, {"RateLimit": '"api";r=0;t=55'}, hub), 0) == 55
    assert pause_after(http_error(503, {"Retry-After": "1"}, hub), 5) == 64
    assert pause_after(http_error(429, {"Retry-After": "9" * 400}, hub), 0) == 3600
    assert pause_after(http_error(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, hub), 0) == 2


def test_an_unreachable_hub_never_blocks_the_end(start, hub, tmp_path, caplog):
    publishing = start(first_pause=30)
    publishing._publisher = Publisher(NAME, endpoint="http://127.0.0.1:9")
    save(publishing, tmp_path, 1)
    until(lambda: publishing.health.failures == 1)
    before = time.monotonic()
    assert publishing.close(20) is False
    assert time.monotonic() - before < 15, "it waited for an attempt that close() leaves no time for"
    assert publishing.published is None and f"hf upload {NAME}" in caplog.text


def test_the_last_checkpoint_is_published_on_leaving(hub, start, tmp_path):
    publishing = start()
    publishing.stop(20)
    publishing = start()
    hub.faults.append(500)
    save(publishing, tmp_path, 3)
    assert publishing.close(30) and list(hub.repos[NAME].tags) == ["step-3"]


def test_a_refused_token_is_told_once_and_one_that_is_mended_is_found(hub, start, tmp_path, caplog, monkeypatch):
    publishing = start(first_pause=0.001)
    save(publishing, tmp_path, 1)
    until(lambda: publishing.published)
    hub.token = "hf_new"  # the old one was revoked
    with caplog.at_level(logging.DEBUG):
        save(publishing, tmp_path, 2)
        until(lambda: publishing.health.failures == 3)
        refusals = [r.message for r in caplog.records if r.levelno >= logging.WARNING and "refuses" in r.message]
        assert len(refusals) == 1 and "hf auth login" in refusals[0] and NAME in refusals[0]
        monkeypatch.delenv("HF_TOKEN")
        (tmp_path / "token").write_text("hf_new")  # as `hf auth login` does
        until(lambda: publishing.published.step == 2)
    assert len(hub.repos[NAME].commits) == 2 and is_whole(hub)
    assert "hf_good" not in caplog.text and "hf_new" not in caplog.text


def test_who_holds_no_lease_publishes_only_what_the_holder_does_not(hub, publisher, start, tmp_path, monkeypatch):
    class Others(StubLease):
        is_mine = False

    monkeypatch.setattr("collab.publish.PATIENCE", 0.05)
    holder = Publisher(NAME, endpoint=hub.url)
    holder.publish(checkpoint(tmp_path / "holder's", 100))
    publishing = start(Others)
    save(publishing, tmp_path, 130)
    until(lambda: publishing.published)
    assert publishing.published.step == 100 and list(hub.repos[NAME].tags) == ["step-100"]
    save(publishing, tmp_path, 230)  # since 130 nothing new has come from the holder
    until(lambda: publishing.published.step == 230)
    assert list(hub.repos[NAME].tags) == ["step-100", "step-230"] and is_whole(hub)


def test_who_holds_no_lease_has_nothing_to_finish(start, hub, tmp_path):
    class Others(StubLease):
        is_mine = False

    publishing = start(Others)
    save(publishing, tmp_path, 1)
    assert publishing.close(10) and not hub.requests


def test_the_faster_protocol_fails_cleanly_where_the_hub_does_not_speak_it(hub, start, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    publishing = start()
    save(publishing, tmp_path, 1)
    until(lambda: publishing.health.failures, 60)
    assert any("xet-write-token" in request for request in hub.requests)
    assert not hub.repos[NAME].commits and not hub.repos[NAME].tags
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    until(lambda: publishing.published)
    assert is_whole(hub)


def test_a_name_that_cannot_be_a_repository_is_refused_before_anything_starts():
    with pytest.raises(UserError, match="organization/name"):
        Publisher("not a name!")
