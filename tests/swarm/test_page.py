"""The page and the status of a real run: what people see is what the swarm does."""

import json
import re
import subprocess
import sys
import urllib.request

import pytest

from collab.view import from_json
from scripts.browser import Browser
from tests.swarm.conftest import Swarm
from tests.swarm.processes import LOOPBACK, ROOT

pytestmark = pytest.mark.swarm


def get(address: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=60) as reply:
        return str(reply.read().decode())


def status(swarm: Swarm, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/status.py", "--initial_peers", address, "--cache_dir", str(swarm.cache_dir)]
    return subprocess.run(
        [*command, *LOOPBACK, *options], cwd=ROOT, capture_output=True, text=True, timeout=180, check=True
    )


def test_a_run_is_seen_on_its_page_and_in_a_terminal(swarm: Swarm, browser: Browser) -> None:
    config = swarm.configure(max_global_steps=1000, save_every=2, target_batch_size=256)
    auxiliary, address = swarm.start_auxiliary(config, "--page_port", "18700")
    auxiliary.wait_for_output("The page is at http://127.0.0.1:187")
    served = re.findall(r"The page is at (\S+)", auxiliary.output())[0]
    browser.open(f"{served}/")
    assert "Waiting for peers" in browser.run("document.body.innerText")
    browser.run("window.marker = 1")

    trainers = [swarm.start_trainer(name, address) for name in ("asha", "bela")]
    browser.wait_for(
        "['asha', 'bela'].every((name) => document.getElementById('live-peers').innerText.includes(name))", 180
    )
    auxiliary.wait_for_output("Saved the state", 180)
    browser.wait_for("document.getElementById('live-events').innerText.includes('Saved the checkpoint')")
    browser.run("document.getElementById('sentence').value = 'a [MASK] of words'")
    browser.run("document.querySelector('#try [type=submit]').click()")
    browser.wait_for("document.querySelectorAll('#answer li').length === 5", 120)
    assert browser.run("window.marker") == 1 and browser.complaints == []

    seen = from_json(get(f"{served}/status.json"))
    assert {peer.name for peer in seen.peers} == {"asha", "bela"} and seen.samples > 0
    assert not [duty for duty in seen.duties if duty.failures], seen.duties
    assert 'samiti_peers{run_id="test",role="trainer"} 2\n' in get(f"{served}/metrics")
    in_terminal = status(swarm, address).stdout
    assert all(words in in_terminal for words in ("asha", "bela", "Saved the checkpoint")), in_terminal
    assert "\x1b" not in in_terminal
    told = json.loads(status(swarm, address, "--json").stdout)
    assert told["global_step"] >= seen.global_step and {p["name"] for p in told["peers"]} == {"asha", "bela"}

    trainers[0].interrupt()
    browser.wait_for("document.getElementById('live-events').innerText.includes('asha left')", 120)
    auxiliary.interrupt()
    assert auxiliary.wait() == 0
    left = from_json((swarm.folder / "run" / "status.json").read_text())
    assert left.global_step >= seen.global_step, "what programs read last stays in the run's folder"
