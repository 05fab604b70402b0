"""Publishing by real programs: an auxiliary peer that is killed in the middle of an upload."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub_server import Fault, HubServer
from tests.swarm.conftest import Swarm
from tests.swarm.processes import wait_until

pytestmark = pytest.mark.swarm

NAME = "community/test"
FILL = f"""
import json
from transformers import pipeline
fill = pipeline("fill-mask", {NAME!r})
print(json.dumps([guess["token_str"] for guess in fill("The " + fill.tokenizer.mask_token + " is here.")]))
"""


def environment(hub: HubServer) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}


def assert_each_tag_has_one_whole_commit(hub: HubServer) -> None:
    repo = hub.repos[NAME]
    messages = [message for _, message, _ in repo.commits]
    assert len(messages) == len(set(messages)), f"a step was committed twice: {messages}"
    assert {f"Checkpoint of global step {tag.removeprefix('step-')}" for tag in repo.tags} == set(messages)
    for tag in repo.tags:
        step = json.loads(repo.tree(tag)["trainer_state.json"])["global_step"]
        assert tag == f"step-{step}" and f"global step **{step:,}**" in repo.tree(tag)["README.md"].decode()


@pytest.mark.parametrize("pausing", ["PUT /lfs/", f"POST /api/models/{NAME}/commit"], ids=["files", "commit"])
def test_an_auxiliary_peer_killed_in_the_middle_of_an_upload_publishes_each_step_once(
    swarm: Swarm, pausing: str
) -> None:
    with HubServer() as hub:
        swarm.environment = environment(hub)
        config = swarm.configure(max_global_steps=1000, target_batch_size=1024, save_every=2, repo_id=NAME)
        hub.pausing = pausing
        hub.paused.clear()
        auxiliary, address = swarm.start_auxiliary(config)
        trainer = swarm.start_trainer("trainer", address)
        wait_until(lambda: hub.waiting > 0, 120, auxiliary.output)
        checkpoints = swarm.folder / "run" / "checkpoints"
        assert list(checkpoints.glob(".publishing-*"))
        auxiliary.interrupt(signal.SIGKILL)
        auxiliary.wait()
        left = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
        hub.faults.append(Fault(429, f"POST /api/models/{NAME}/(commit|tag)"))
        hub.paused.set()  # what the dead one had asked for is done now, if it had all been said

        auxiliary, _ = swarm.start_auxiliary(config)
        # What the dead one has left, or a newer one if that was there before the first attempt went well.
        wait_until(lambda: len(hub.repos[NAME].tags) > 1, 120, auxiliary.output)
        assert max(int(tag.removeprefix("step-")) for tag in hub.repos[NAME].tags) >= left
        auxiliary.interrupt()
        assert auxiliary.wait() == 0, auxiliary.output()
        trainer.end()  # it would take half of the computer from what comes now
        assert not list(checkpoints.glob(".publishing-*"))
        assert_each_tag_has_one_whole_commit(hub)
        assert hub.token not in auxiliary.output()

        card = ModelCard(hub.repos[NAME].tree("main")["README.md"].decode())
        assert card.data.to_dict()["pipeline_tag"] == "fill-mask" and "](curve.png)" in card.text
        assert hub.repos[NAME].tree("main")["curve.png"].startswith(b"\x89PNG")
        assert fill_mask(hub, swarm.folder)


def fill_mask(hub: HubServer, folder: Path) -> list[str]:
    """What a stranger's computer says, that has transformers and nothing of ours."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_TOKEN", "HF_HUB_OFFLINE")}
    stranger = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(elsewhere), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FILL], env=stranger, cwd=elsewhere, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    guesses: list[str] = json.loads(done.stdout.splitlines()[-1])
    return guesses
